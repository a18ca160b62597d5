"""A search of all that a tenant has: as if it were in one namespace, however many there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from agent_server.domain.memories import Found, MemoryQuery
from agent_server.memory.store import MemoryStore
from agent_server.memory.vector_index import Numpy
from agent_server.testing.memory_store import ONE, TWO, fact
from tests.memory.test_embedding import Embedded, Spread
from tests.support.until import until

WORDS = ("apple", "pear", "plum")


@contextmanager
def statements(store: MemoryStore) -> Iterator[list[str]]:
    """What is asked of the database as long as this lasts."""
    database: Any = store.database
    seen: list[str] = []

    def asked(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    engine = getattr(database._reader, "sync_engine", database._reader)
    event.listen(engine, "before_cursor_execute", asked)
    yield seen
    event.remove(engine, "before_cursor_execute", asked)


def told(found: list[Found]) -> list[tuple[Any, float]]:
    return [(one.memory.content, round(one.score, 4)) for one in found]


async def _settled(store: MemoryStore) -> bool:
    return (await store.stats(TWO)).waiting == 0


@pytest.mark.parametrize("index", ["own", "numpy"])
@pytest.mark.parametrize("narrow", [False, True])
async def test_what_is_found_in_many_namespaces_is_what_is_found_in_one(
    store: MemoryStore, index: str, narrow: bool
) -> None:
    if index == "numpy":
        store.vectors = Numpy(store.database.dialect)
    for tenant, spread in ((ONE, 40), (TWO, 1)):
        await store.add(
            tenant,
            [
                fact(
                    f"{WORDS[n % 3]} {'kitten' if n % 7 == 0 else 'stone'} number{n}",
                    namespace=f"space{n % spread}",
                    metadata={"odd": n % 2 == 1},
                )
                for n in range(200)
            ],
        )
    async with Embedded(store, Spread()) as world:
        await world.settled()
        await until(lambda: _settled(store))
        for mode in ("text", "vector", "hybrid"):
            query = MemoryQuery(
                query="a plum for the cat", limit=20, mode=mode,
                filter={"odd": True} if narrow else {},
            )  # fmt: skip
            many, one = [told(await store.search(tenant, query)) for tenant in (ONE, TWO)]
            assert len(many) == 20
            if mode == "text":  # Many are found by the same words alone.
                many, one = [[("", score) for _, score in found] for found in (many, one)]
            assert sorted(many) == sorted(one)


async def test_however_many_namespaces_there_are_as_many_statements_are_made(
    store: MemoryStore,
) -> None:
    counted = []
    query = MemoryQuery(query=" ".join(["apple", *(f"word{n}" for n in range(60))]), limit=5)
    for last in (2, 60):
        await store.add(ONE, [fact(f"apple {n}", namespace=f"s{n}") for n in range(last)])
        await store.search(ONE, query)
        with statements(store) as seen:
            assert len(await store.search(ONE, query)) == min(last, 5)
        counted.append(len(seen))
    assert counted[0] == counted[1] <= 6, counted
