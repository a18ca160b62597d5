"""The store of long-term memory, on both databases, and what holds of ours alone."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import Connection, func, select

from agent_server.domain.errors import Conflict, PreconditionFailed
from agent_server.domain.memories import MemoryChange, MemoryFilter, MemoryQuery, MemorySource
from agent_server.memory.rows import Ready
from agent_server.memory.store import MemoryStore
from agent_server.memory.text_index import rebuild
from agent_server.memory.words import index_words, stem
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from agent_server.testing.memory_store import ONE, MemoryStoreContract, fact


class TestStore(MemoryStoreContract):
    pass


async def test_servers_that_start_at_the_same_moment_make_the_index_together(
    postgres_url: str,
) -> None:
    async def start() -> None:
        database = database_at(postgres_url)
        await database.open()
        try:
            await database.write(upgrade)
            await MemoryStore(database).open()
        finally:
            await database.close()

    await asyncio.gather(*(start() for _ in range(8)))


async def test_the_index_is_made_anew_from_the_rows(store: MemoryStore, url: str) -> None:
    await store.add(ONE, [fact("a zeppelin", metadata={"a": 1}), fact("tea")])
    table = "memory_words" if url.startswith("sqlite") else None
    await store.database.write(
        lambda c: c.exec_driver_sql(
            f"INSERT INTO {table}({table}) VALUES ('delete-all')"
            if table
            else "UPDATE memories SET lexemes = NULL"
        )
    )
    query = MemoryQuery(query="zeppelin", filter={"a": 1})
    assert await store.search(ONE, query) == []
    await store.database.write(rebuild)
    assert [one.memory.content for one in await store.search(ONE, query)] == ["a zeppelin"]


async def test_of_a_very_long_query_the_rarest_words_are_looked_for(store: MemoryStore) -> None:
    common = " ".join(f"common{n}" for n in range(60))
    await store.add(ONE, [fact(f"{common} {n}") for n in range(3)] + [fact("a zeppelin")])
    found = await store.search(ONE, MemoryQuery(query=f"{common} zeppelin"))
    assert "a zeppelin" in [one.memory.content for one in found]


async def test_nothing_of_what_was_deleted_is_left_in_the_file(
    sqlite_store: MemoryStore, tmp_path: Path
) -> None:
    store = sqlite_store
    secret = "xylophonequartz"
    [kept, *gone] = await store.add(
        ONE,
        [fact("keep this zeppelin")]
        + [
            fact(f"{secret} {i}", author=secret, subject=secret, key=f"{secret}{i}")
            for i in range(50)
        ],
    )
    await store.edit(
        ONE, gone[0].memory.id, MemoryChange(content=f"{secret} edited"), source=MemorySource()
    )
    await store.add(ONE, [fact(f"other {i}") for i in range(200)])

    def holds() -> bool:
        return any(
            word.encode() in path.read_bytes()
            for path in (tmp_path / "data").iterdir()
            for word in (secret, stem(secret))
        )

    assert holds()
    assert await store.delete_where(ONE, MemoryFilter(subject=secret)) == 50
    assert not holds()
    assert (await store.get(ONE, kept.memory.id)).content == "keep this zeppelin"


async def test_what_was_bought_answers_a_question_about_buying(store: MemoryStore) -> None:
    await store.add(ONE, [fact("We bought it in Paris."), fact("The children slept."), fact("Tea")])
    for query, found in (
        ("buy", "We bought it in Paris."),
        ("a sleeping child", "The children slept."),
    ):
        results = await store.search(ONE, MemoryQuery(query=query))
        assert [one.memory.content for one in results] == [found]


async def test_one_writer_and_four_readers_never_meet_a_locked_database(
    store: MemoryStore,
) -> None:
    async def read() -> None:
        for _ in range(15):
            await store.search(ONE, MemoryQuery(query="turn number"))

    async def write() -> None:
        for i in range(15):
            await store.add(ONE, [fact(f"turn number {i} {n}") for n in range(20)])

    await asyncio.gather(write(), *(read() for _ in range(4)))
    assert (await store.stats(ONE)).memories == 300


async def test_two_writers_on_one_key_leave_one_that_holds(store: MemoryStore) -> None:
    await asyncio.gather(*(store.add(ONE, [fact(f"v{i}", key="k")]) for i in range(12)))
    page = await store.page(ONE, MemoryFilter(key="k"), limit=20, cursor=None)
    assert len(page.data) == 1
    whole = await store.page(ONE, MemoryFilter(key="k", replaced=True), limit=20, cursor=None)
    assert len(whole.data) == 12


async def test_two_writers_in_one_session_take_no_place_twice(store: MemoryStore) -> None:
    await asyncio.gather(
        *(store.add(ONE, [fact(f"{i} {n}", session_id="s") for n in range(3)]) for i in range(8))
    )
    page = await store.page(ONE, MemoryFilter(session_id="s"), limit=50, cursor=None)
    assert sorted(m.position or 0 for m in page.data) == list(range(24))


async def test_of_writers_at_once_under_one_id_one_writes_and_the_others_find_it(
    store: MemoryStore,
) -> None:
    for n in range(5):
        writes = (store.add(ONE, [fact(f"{n} {i}", id=f"mem_{n}")]) for i in range(8))
        added = [one for [one] in await asyncio.gather(*writes)]
        assert sum(one.new for one in added) == 1
        assert len({one.memory.content for one in added}) == 1


async def test_edits_at_once_are_a_version_each_or_told_that_they_are_late(
    store: MemoryStore,
) -> None:
    [made] = await store.add(ONE, [fact("first")])
    there = made.memory.id

    async def edit(n: int, expected: int | None = None) -> int | None:
        change = MemoryChange(content=f"edit {n}")
        try:
            edited = await store.edit(
                ONE, there, change, source=MemorySource(), expected_version=expected
            )
        except PreconditionFailed:
            return None
        return edited.version

    versions = await asyncio.gather(*(edit(n) for n in range(8)))
    assert sorted(v for v in versions if v) == list(range(2, 10))
    late = await asyncio.gather(*(edit(n, 9) for n in range(8)))
    assert [v for v in late if v] == [10]
    held = [version for version in await store.history(ONE, there) if version.replaced_at is None]
    assert len(held) == 1


def test_words_are_the_same_whichever_threads_make_them_at_once() -> None:
    """An import in a thread, a search in another: the same word is found under one form."""
    stem.cache_clear()
    texts = [f"{n}relational {n}happenings {n}decisively" for n in range(3_000)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(index_words, texts))
    stem.cache_clear()
    assert made == [index_words(text) for text in texts]


async def test_an_edit_beside_a_write_under_the_same_key_leaves_one_that_holds(
    store: MemoryStore,
) -> None:
    """Whoever is second: the edit is refused as one of history, or its words are superseded."""
    [first] = await store.add(ONE, [fact("0", key="k")])
    held = first.memory
    for n in range(1, 13):

        async def edited(identity: str = held.id, words: str = f"{n} edited") -> bool:
            try:
                await store.edit(ONE, identity, MemoryChange(content=words), source=MemorySource())
            except Conflict:
                return False
            return True

        done, added = await asyncio.gather(edited(), store.add(ONE, [fact(f"{n}", key="k")]))
        [held] = (await store.page(ONE, MemoryFilter(key="k"), limit=9, cursor=None)).data
        assert (held.content, held.supersedes) == (f"{n}", added[0].memory.supersedes)
        past = await store.history(ONE, held.supersedes or "")
        assert [version.content for version in past][1:] == [f"{n} edited"] * done


async def test_a_query_whose_connection_ends_under_it_is_asked_again(
    postgres_url: str,
) -> None:
    database = database_at(postgres_url)
    await database.open()
    ends = Ready(select(func.pg_terminate_backend(func.pg_backend_pid())))
    tries: list[int] = []

    def asked(connection: Connection) -> int:
        tries.append(1)
        if len(tries) == 1:
            ends.rows(connection, {})
        return len(tries)

    assert await database.read(asked) == 2
    await database.close()
