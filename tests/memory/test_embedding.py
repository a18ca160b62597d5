"""Vectors follow memories, whatever happens to the embedder."""

import asyncio
import json
import math
from array import array
from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ConfigurationError, InvalidRequest, Unavailable
from agent_server.domain.memories import MemoryChange, MemoryQuery, MemorySource
from agent_server.memory import embedding
from agent_server.memory.embedders import OpenAIEmbedder, unit
from agent_server.memory.embedding import Embedding
from agent_server.memory.recall import TEXT_CANDIDATES, Recall
from agent_server.memory.store import MemoryStore
from agent_server.memory.vector_index import Halfvec, Numpy, SqliteVec
from agent_server.storage.database import Database
from agent_server.testing.memory_store import ONE, MemoryStoreContract, fact
from tests.support.until import until

SENSES = {"cat": 0, "kitten": 0, "feline": 0, "car": 1, "auto": 1, "tea": 2, "brew": 2}


class Senses:
    """Knows a few words by their sense; everything else points elsewhere."""

    provider, version, batch = "test", "1", 4

    def __init__(self, dimension: int = 8, model: str = "senses") -> None:
        self.model = model
        self.dimension = dimension
        self.down = False
        self.asked: list[str] = []
        self.closed = False
        self.hung: anyio.Event | None = None

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        if self.down:
            raise Unavailable("down")
        if self.hung is not None:
            self.asked += texts
            await self.hung.wait()
        if any("poison" in text for text in texts):
            raise ConfigurationError("refused")
        if any("void" in text for text in texts):
            raise Unavailable("a vector without a direction")
        self.asked += texts
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> bytes:
        values = [0.01] * self.dimension
        for word in text.lower().replace(".", " ").split():
            known = SENSES.get(word)
            values[self.dimension - 1 if known is None else known] += 0.1 if known is None else 1
        return unit(values)

    async def close(self) -> None:
        self.closed = True


class Embedded:
    """A store whose memories get vectors, as long as the ``with`` block lasts."""

    def __init__(self, store: MemoryStore, embedder: Senses, old: Senses | None = None) -> None:
        self.embedding = Embedding(store, embedder, lambda provider, model: old)
        self.store = store
        Recall(store, self.embedding)

    async def __aenter__(self) -> "Embedded":
        self._task = asyncio.create_task(self.embedding.run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def settled(self) -> None:
        async def none_waits() -> bool:
            stats = await self.store.stats(ONE)
            return stats.waiting == 0

        await until(none_waits)

    async def found(self, text: str, **more: Any) -> list[str]:
        answer = await self.store.search(ONE, MemoryQuery(query=text, **more))
        return [one.memory.content for one in answer]


async def test_a_meaning_is_found_without_a_common_word(store: MemoryStore) -> None:
    async with Embedded(store, Senses()) as world:
        await store.add(ONE, [fact("a kitten"), fact("an auto"), fact("some brew")])
        await world.settled()
        assert (await world.found("feline"))[0] == "a kitten"
        [best] = await store.search(ONE, MemoryQuery(query="feline", limit=1, mode="vector"))
        assert set(best.matched) == {"vector"}
        assert await world.found("feline", mode="text") == []
        stats = await store.stats(ONE)
        assert (stats.vectors, stats.waiting, stats.embedder) == (3, 0, "test/senses")


async def test_a_write_is_found_by_text_while_the_embedder_is_down(store: MemoryStore) -> None:
    embedder = Senses()
    embedder.down = True
    async with Embedded(store, embedder) as world:
        await store.add(ONE, [fact("a kitten")])
        assert await world.found("kitten") == ["a kitten"]
        assert await world.found("feline") == []
        assert (await store.stats(ONE)).waiting == 1
        embedder.down = False
        await world.settled()
        assert await world.found("feline") == ["a kitten"]


async def test_while_the_embedder_is_down_a_person_is_told_why_vectors_are_missing(
    store: MemoryStore,
) -> None:
    embedder = Senses()
    embedder.down = True
    async with Embedded(store, embedder) as world:
        await store.add(ONE, [fact("a kitten"), fact("poison")])

        async def told(trouble: str | None) -> bool:
            return (await store.stats(ONE)).trouble == trouble

        await until(lambda: told("down"))
        with pytest.raises(Unavailable, match="no vector to search by: down"):
            await world.found("feline", mode="vector")
        embedder.down = False
        await until(lambda: told("1 refused: refused"))
        assert await world.found("feline", mode="vector", limit=1) == ["a kitten"]
        with pytest.raises(Unavailable, match="no vector to search by: refused"):
            await world.found("poison", mode="vector")


async def test_an_embedder_that_hangs_holds_up_one_query_and_not_each(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "QUERY_TIMEOUT_S", 0.05)
    embedder = Senses()
    async with Embedded(store, embedder) as world:
        await store.add(ONE, [fact("a kitten")])
        await world.settled()
        embedder.hung, embedder.asked = anyio.Event(), []
        for query in ("a feline", "the feline", "that feline", "kitten"):
            assert await world.found(query) == (["a kitten"] if query == "kitten" else [])
        assert embedder.asked == ["a feline"]
        with pytest.raises(Unavailable, match="none within 0.05 s"):
            await world.found("one more feline", mode="vector")
        embedder.hung = None
        await store.add(ONE, [fact("an auto")])
        await world.settled()
        assert await world.found("my feline", limit=1) == ["a kitten"]


@pytest.mark.parametrize("odd", ["poison", "void"])
async def test_a_text_that_the_embedder_refuses_or_fails_at_holds_up_no_other(
    store: MemoryStore, odd: str
) -> None:
    async with Embedded(store, Senses()) as world:
        await store.add(ONE, [fact(odd), fact("a kitten"), fact("an auto")])

        async def two_done() -> bool:
            return (await store.stats(ONE)).vectors == 2

        await until(two_done)
        assert (await store.stats(ONE)).waiting == 1
        assert (await world.found("feline"))[0] == "a kitten"
        assert await world.found(odd) == [odd]


async def test_after_a_failure_that_nobody_foresaw_it_goes_on_and_a_person_is_told(
    store: MemoryStore,
) -> None:
    embedder = Senses()
    embed, broken = embedder.embed, True

    async def fail(texts: Sequence[str]) -> list[bytes]:
        if broken:
            raise RuntimeError("no such operator")
        return await embed(texts)

    embedder.embed = fail  # type: ignore[method-assign]  # as a library may
    async with Embedded(store, embedder) as world:
        await store.add(ONE, [fact("a kitten")])

        async def told(trouble: str | None) -> bool:
            return (await store.stats(ONE)).trouble == trouble

        await until(lambda: told("RuntimeError: no such operator"))
        broken = False
        await world.settled()
        await until(lambda: told(None))


async def test_two_turns_at_one_place_of_a_conversation_hold_up_no_vector(
    store: MemoryStore,
) -> None:
    """As after the import of two conversations of one name."""
    turns = [("a kitten", 0), ("an auto", 0), ("some brew", 1)]
    async with Embedded(store, Senses()) as world:
        await store.add(ONE, [fact(text, session_id="s", position=place) for text, place in turns])
        await world.settled()
        assert (await store.stats(ONE)).vectors == len(turns)


async def test_an_embedder_that_refuses_everything_is_not_asked_for_each_memory(
    store: MemoryStore,
) -> None:
    world = Embedded(store, embedder := Senses())
    await world.embedding.catch_up()
    await store.add(ONE, [fact(f"fact {n}") for n in range(50)])
    calls: list[int] = []

    async def refuse(texts: Sequence[str]) -> list[bytes]:
        calls.append(len(texts))
        raise ConfigurationError("The key was revoked.")

    embedder.embed = refuse  # type: ignore[method-assign]  # what the service does from now on
    with pytest.raises(ConfigurationError, match="revoked"):
        await world.embedding.catch_up()
    assert calls == [embedder.batch, 1]


async def test_a_memory_in_the_place_of_a_deleted_one_does_not_get_its_vector(
    store: MemoryStore,
) -> None:
    world = Embedded(store, embedder := Senses())
    await world.embedding.catch_up()
    [old] = await store.add(ONE, [fact("a kitten")])
    embed = embedder.embed

    async def meanwhile(texts: Sequence[str]) -> list[bytes]:
        if embedder.asked.count("a kitten") == 0 and texts == ["a kitten"]:
            await store.delete(ONE, [old.memory.id])
            await store.add(ONE, [fact("some brew")])
        return await embed(texts)

    embedder.embed = meanwhile  # type: ignore[method-assign]  # slow enough for a deletion
    await world.embedding.catch_up()
    await world.embedding.catch_up()
    [best] = await store.search(ONE, MemoryQuery(query="tea", mode="vector", limit=1))
    assert (best.memory.content, best.score > 0.9) == ("some brew", True)


async def test_a_new_embedder_takes_over_while_the_old_one_still_answers(
    store: MemoryStore,
) -> None:
    old, new = Senses(8, "old"), Senses(12, "new")
    async with Embedded(store, old) as world:
        await store.add(ONE, [fact("a kitten"), fact("an auto")])
        await world.settled()
    moving = Embedded(store, new, old)
    await moving.embedding._register()
    assert (await moving.found("feline"))[0] == "a kitten"  # By the old one's vectors.
    async with moving:
        await moving.settled()

        async def taken_over() -> bool:
            known = "SELECT count(*) FROM memory_embedders"
            there = await store.database.read(lambda c: c.exec_driver_sql(known).scalar())
            return bool(there == 1)

        await until(taken_over)
        assert (await moving.found("feline"))[0] == "a kitten"
    await moving.embedding.close()
    assert old.closed and new.closed
    numbers = await store.database.read(
        lambda c: c.exec_driver_sql("SELECT count(*) FROM memory_vectors").scalar()
    )
    assert numbers == 2


async def test_while_a_new_embedder_does_not_answer_the_old_one_does(store: MemoryStore) -> None:
    old, new = Senses(), Senses(dimension=12, model="finer")
    async with Embedded(store, old) as world:
        await store.add(ONE, [fact("a kitten"), fact("an auto")])
        await world.settled()
    new.down = True
    async with Embedded(store, new, old) as world:

        async def answers() -> bool:
            return await world.found("feline", limit=1) == ["a kitten"]

        await until(answers)
        assert (await store.stats(ONE)).waiting == 2
        new.down = False
        await world.settled()
        old.down = True
        assert await world.found("the feline", limit=1) == ["a kitten"]


async def test_an_edit_and_a_deletion_reach_the_vector(store: MemoryStore) -> None:
    async with Embedded(store, Senses()) as world:
        [kitten, auto] = await store.add(ONE, [fact("a kitten"), fact("an auto")])
        await world.settled()
        await store.edit(
            ONE, kitten.memory.id, MemoryChange(content="some tea"), source=MemorySource()
        )
        await world.settled()
        assert (await world.found("brew", mode="vector"))[0] == "some tea"
        await store.delete(ONE, [auto.memory.id])
        assert "an auto" not in await world.found("car", mode="vector")
        assert (await store.stats(ONE)).vectors == 1


async def test_a_process_without_sqlite_vec_leaves_no_vector_behind(
    tmp_path: Path, sqlite_store: MemoryStore
) -> None:
    """What it cannot read it could not erase either, when its memory is deleted."""
    async with Embedded(sqlite_store, Senses()) as world:
        await sqlite_store.add(ONE, [fact("a kitten"), fact("an auto")])
        await world.settled()
    kitten = Senses()._one("a kitten")

    async def there() -> bool:
        await sqlite_store.database.scrub()
        return any(kitten in path.read_bytes() for path in (tmp_path / "data").iterdir())

    assert isinstance(sqlite_store.vectors, SqliteVec) and await there()
    await sqlite_store.database.write(SqliteVec.erase_without_it)
    assert not await there()
    async with Embedded(sqlite_store, Senses()) as world:
        await world.settled()
        assert await world.found("feline", mode="vector", limit=1) == ["a kitten"]


async def test_rows_that_hold_no_more_take_no_place_of_those_that_do(store: MemoryStore) -> None:
    [held] = await store.add(ONE, [fact("zeppelin zero", key="k")])
    for i in range(TEXT_CANDIDATES):
        await store.edit(
            ONE, held.memory.id, MemoryChange(content=f"zeppelin {i}"), source=MemorySource()
        )
    await store.add(ONE, [fact("the zeppelin flew over the town hall and the old harbour twice")])
    found = await store.search(ONE, MemoryQuery(query="zeppelin"))
    assert len(found) == 2


async def test_an_answer_is_embedded_with_the_turn_before_it(store: MemoryStore) -> None:
    embedder = Senses()
    async with Embedded(store, embedder) as world:
        said = [("Ana", "Which one?"), ("Ben", "The green one.")]
        await store.add(ONE, [fact(t, kind="message", author=a, session_id="s") for a, t in said])
        await world.settled()
        assert "Which one?\nBen: The green one." in embedder.asked


async def test_vectors_alone_need_an_embedder(store: MemoryStore) -> None:
    with pytest.raises(InvalidRequest, match="needs an embedder"):
        await store.search(ONE, MemoryQuery(query="x", mode="vector"))


@pytest.mark.parametrize("way", ["own", "numpy"])
async def test_filtered_neighbours_are_the_exact_ones_and_as_many_as_asked(
    database: Database, way: str
) -> None:
    store = MemoryStore(database)
    await store.open()
    assert isinstance(store.vectors, SqliteVec | Halfvec), store.no_vectors_because
    if way == "numpy":
        pytest.importorskip("numpy")
        store.vectors = Numpy(store.database.dialect)
    embedder = Spread()
    async with Embedded(store, embedder) as world:
        texts = [f"text {i}" for i in range(300)]
        await store.add(
            ONE,
            [
                fact(t, namespace=f"n{i % 3}", metadata={"even": i % 2 == 0})
                for i, t in enumerate(texts)
            ],
        )
        await world.settled()
        asked = {"namespace": "n1", "mode": "vector", "limit": 20, "filter": {"even": True}}
        found = await world.found("query", **asked)
        all_there_are = await world.found("query", **{**asked, "limit": 50})
    [sought] = await embedder.embed(["query"])
    mine = [t for i, t in enumerate(texts) if i % 3 == 1 and i % 2 == 0]
    exact = sorted(mine, key=lambda t: -cosine(embedder.one(t), sought))[:20]
    assert len(found) == 20
    assert len(set(found) & set(exact)) >= 19
    assert set(all_there_are) == set(mine) and len(mine) == 50


class Spread(Senses):
    """Every text somewhere else, by its hash."""

    def _one(self, text: str) -> bytes:
        digest = sha256(text.encode()).digest()
        return unit([byte - 127.5 for byte in digest])

    one = _one


def cosine(a: bytes, b: bytes) -> float:
    return math.fsum(x * y for x, y in zip(array("f", a), array("f", b), strict=True))


async def test_expired_memories_take_no_place_of_others(store: MemoryStore) -> None:
    gone = utcnow() - timedelta(seconds=1)
    async with Embedded(store, Senses()) as world:
        await store.add(ONE, [fact(f"a cat {i}", expires_at=gone) for i in range(100)])
        await store.add(ONE, [fact("a kitten")])
        await world.settled()
        assert await world.found("feline", mode="vector") == ["a kitten"]


@pytest.mark.slow
class TestWithVectors(MemoryStoreContract):
    """The contract holds beside vectors, too."""

    @pytest.fixture
    async def store(self, database: Database) -> Any:
        opened = MemoryStore(database)
        await opened.open()
        async with Embedded(opened, Senses()) as world:
            yield world.store


def test_a_vector_without_a_direction_is_refused() -> None:
    for values in ([], [0.0, 0.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError):
            unit(values)


async def test_an_embedder_over_http_is_asked_as_openai_is_and_its_faults_are_told_apart() -> None:
    answers: list[httpx2.Response] = [
        httpx2.Response(
            200,
            json={"data": [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [3, 4]}]},
        ),
        httpx2.Response(200, json={"data": [{"index": 0, "embedding": [0, 0]}]}),
        httpx2.Response(503, text="later"),
        httpx2.Response(401, text="who are you"),
    ]
    asked: list[Any] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.url.path, json.loads(request.content)))
        return answers.pop(0)

    client = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
    embedder = OpenAIEmbedder(
        base_url="http://embedder/v1/", api_key=None, model="m", dimension=2, client=client
    )
    first, second = await embedder.embed(["a", "b"])
    assert list(array("f", first)) == pytest.approx([0.6, 0.8])
    assert list(array("f", second)) == [0, 1]
    body = {"model": "m", "input": ["a", "b"], "encoding_format": "float", "dimensions": 2}
    assert asked == [("/v1/embeddings", body)]
    for fault in (Unavailable, Unavailable, ConfigurationError):
        with pytest.raises(fault):
            await embedder.embed(["a"])
    await embedder.close()
