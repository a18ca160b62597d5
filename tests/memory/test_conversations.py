"""Sessions kept by a client, on both databases."""

from asyncio import gather

import pytest

from agent_server.domain.base import utcnow
from agent_server.domain.errors import NotFound
from agent_server.domain.ids import Tenant
from agent_server.memory.conversations import Conversations
from agent_server.memory.session_store import append_items
from agent_server.storage.database import Database

US, THEM = Tenant("us"), Tenant("them")


async def test_what_a_client_adds_while_runs_end_has_a_place_of_its_own(database: Database) -> None:
    kept = Conversations(database)
    await kept.create(US, "conv_1", {"a": "b"}, [{"n": "first"}])

    async def end_of_run(number: int) -> None:
        said = [{"n": f"run {number}"}]
        await database.write(
            lambda c: append_items(c, US, "conv_1", f"run_{number}", said, utcnow())
        )

    both = [kept.add(US, "conv_1", [{"n": f"client {n}"}]) for n in range(12)]
    await gather(*both, *map(end_of_run, range(12)))
    items, more = await kept.page(US, "conv_1", behind=None, newest=False, limit=100)
    assert [item.position for item in items] == list(range(25)) and not more
    assert len({item.item["n"] for item in items}) == 25
    cut = await kept.cut(US, "conv_1", 24)
    assert cut.item_count == 24 and cut.metadata == {"a": "b"}


async def test_another_tenant_finds_no_conversation(database: Database) -> None:
    kept = Conversations(database)
    await kept.create(US, "conv_1", {}, [{"n": 1}])
    for asked in (
        kept.item(THEM, "conv_1", 0),
        kept.page(THEM, "conv_1", behind=None, newest=True, limit=1),
        kept.add(THEM, "conv_1", [{"n": 2}]),
        kept.cut(THEM, "conv_1", 0),
        kept.label(THEM, "conv_1", {"stolen": "yes"}),
    ):
        with pytest.raises(NotFound):
            await asked
    items, _ = await kept.page(US, "conv_1", behind=None, newest=True, limit=9)
    assert len(items) == 1
