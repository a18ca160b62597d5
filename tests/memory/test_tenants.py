"""Two tenants with the same names for everything never meet, below the doors that name them too."""

from pathlib import Path

import pytest
from sqlalchemy import delete

from agent_server.domain.base import utcnow
from agent_server.domain.errors import NotFound
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.memories import MemoryQuery, MemorySource
from agent_server.domain.memory_api import MemoryInput
from agent_server.execution import store as execution
from agent_server.execution.runs import Idempotency
from agent_server.memory.consolidation import CONSOLIDATES, said_in
from agent_server.memory.consolidator import _unconsolidated
from agent_server.memory.conversations import Conversations
from agent_server.memory.desk import MemoryDesk
from agent_server.memory.documents import Documents
from agent_server.memory.recall import Recall
from agent_server.memory.session_store import SessionStore, Summary, append_items
from agent_server.memory.store import MemoryStore
from agent_server.storage.tables import memories
from agent_server.testing.memory_store import ONE, fact
from tests.memory.kit import home

US, THEM = DEFAULT_TENANT, Tenant("them")


async def test_sessions_of_one_name_keep_their_items_and_summaries_apart(
    store: MemoryStore,
) -> None:
    kept, both = Conversations(store.database), SessionStore(store.database, store)
    for tenant, count in ((US, 3), (THEM, 1)):
        await kept.create(tenant, "s", {"of": tenant}, [{"n": n} for n in range(count)])
    for tenant, count in ((US, 3), (THEM, 1)):
        items, _ = await kept.page(tenant, "s", behind=None, newest=False, limit=9)
        assert [item.item["n"] for item in items] == list(range(count))
        assert len(await both.of(tenant).items("s")) == count
        listed = await both.list(tenant, limit=9, cursor=None)
        assert [one.metadata for one in listed.data] == [{"of": tenant}]
    ours, theirs = Summary(2, "ours"), Summary(1, "theirs")
    await both.of(US).keep_summary("s", ours)
    assert await both.of(THEM).summary("s") is None
    await both.of(THEM).keep_summary("s", theirs)
    newer = Summary(3, "ours, more")
    await both.of(US).keep_summary("s", newer)
    assert [await both.of(t).summary("s") for t in (US, THEM)] == [newer, theirs]


async def test_a_run_is_consolidated_for_its_own_tenant_alone(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        run = (await server.run("We met in Bergen.", session_id="s"))["id"]
        database = server.parts.database
        held = {"fingerprint": "f", "run_id": "", "response": [], "created_at": utcnow()}
        held |= {"tenant": THEM, "key": f"{CONSOLIDATES}{run}"}
        said = [{"role": "user", "content": "Something else."}]
        await database.write(lambda c: append_items(c, THEM, "s", run, said, utcnow()))
        assert await database.write(lambda c: execution.take_key(c, held))
        begun = await database.read(lambda c: _unconsolidated(c, 9))
        assert [row.id for row in begun] == [run]
        lines = await database.read(lambda c: said_in(c, US, run))
        assert lines == ["user: We met in Bergen.", "assistant: ok"]
        with pytest.raises(NotFound):
            await database.read(lambda c: said_in(c, THEM, run))


async def test_a_key_of_a_repeated_write_is_answered_with_the_memories_of_its_tenant(
    store: MemoryStore,
) -> None:
    desk = MemoryDesk(store.database, store, Documents())
    once = Idempotency("k", "f")

    async def written(tenant: Tenant) -> tuple[str, bool]:
        told = [MemoryInput(kind="context", content="x")]
        done = await desk.write(tenant, told, source=MemorySource(), idempotency=once)
        return done.memories[0].id, done.replayed

    first = [await written(tenant) for tenant in (US, THEM)]
    again = [await written(tenant) for tenant in (US, THEM)]
    assert again == [(identity, True) for identity, _ in first]
    assert not any(replayed for _, replayed in first)


async def test_a_memory_that_is_deleted_while_it_is_sought_is_left_out(store: MemoryStore) -> None:
    """On PostgreSQL each statement of a search sees what was committed before it."""

    class Late(Recall):
        def _answer(self, connection, kept, ranked):  # type: ignore[no-untyped-def]  # as there
            connection.execute(delete(memories).where(memories.c.id == gone))
            return super()._answer(connection, kept, ranked)

    added = await store.add(ONE, [fact("an apple"), fact("another apple")])
    gone = added[0].memory.id
    looking = Late(store)
    query = MemoryQuery(query="apple")
    found = await store.database.write(lambda c: looking._found(c, ONE, query, ()))
    assert [one.memory.content for one in found] == ["another apple"]
