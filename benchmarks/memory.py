"""``python -m benchmarks.memory``: how fast memories are written and found, and how exactly.

Leans on the store as it is served; vectors are random, since only their number and length count
here. Refuses to judge: it prints figures beside the targets of the project's brief. The CPU is that
of this process, which includes making the query's vector, and of PostgreSQL's; on a busy machine it
is what compares.
"""

import argparse
import asyncio
import gc
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate

import asyncpg  # type: ignore[import-untyped]  # ships no types

from agent_server.domain.ids import Tenant
from agent_server.domain.memories import MemoryQuery, NewMemory
from agent_server.memory.embedders import unit
from agent_server.memory.embedding import Embedding
from agent_server.memory.recall import Recall
from agent_server.memory.store import MemoryStore
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from benchmarks.processes import cpu_s
from tests.support.postgres import PostgresServer

TENANT = Tenant("bench")
DIMENSION = 384
QUERIES = 1000
CHANCE = random.Random(3)
VOCABULARY = ["".join(CHANCE.choices("abcdefghijklmnoprstuvw", k=6)) for _ in range(20_000)]
COMMON = list(accumulate(1 / (rank + 10) for rank in range(len(VOCABULARY))))
"""How common each word is, added up."""


class Noise:
    """An embedder that takes no time to speak of."""

    provider, model, version, batch = "noise", "noise", "1", 1000

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        return [unit([CHANCE.gauss(0, 1) for _ in range(8)] * (DIMENSION // 8)) for _ in texts]

    async def close(self) -> None:
        pass


def sentence(words: int) -> str:
    return " ".join(CHANCE.choices(VOCABULARY, cum_weights=COMMON, k=words))


class Cpu:
    """Seconds of CPU from now on."""

    def __init__(self, database: int | None) -> None:
        self._database = database
        self._there = self._of_database()
        self._here = time.process_time()

    def _of_database(self) -> float:
        return cpu_s(self._database) if self._database is not None else 0.0

    def told(self, unit: str, scale: float = 1.0) -> str:
        """What was spent since, times ``scale``."""
        here = scale * (time.process_time() - self._here)
        there = scale * (self._of_database() - self._there)
        beside = f" and {there:.3g} in PostgreSQL" if self._database is not None else ""
        return f"{here:.3g}{beside} {unit} of CPU"


async def bench(url: str, rows: int, spaces: int, vectors: bool, server: int | None) -> None:
    database = database_at(url)
    await database.open()
    await database.write(upgrade)
    store = MemoryStore(database)
    await store.open()
    embedding = Embedding(store, Noise(), lambda provider, model: None) if vectors else None
    Recall(store, embedding)
    label = f"{database.dialect}, {rows:,} in {spaces}"
    texts = [sentence(25) for _ in range(min(rows, 20_000))]
    batches = [
        [
            NewMemory(
                kind="message",
                content=texts[(start + i) % len(texts)] + f" {start + i}",
                namespace=f"n{(start + i) // 20 % spaces}",
                session_id=f"s{(start + i) // 20 // spaces // 20}",
                author=("Ana", "Ben")[i % 2],
            )
            for i in range(1000)
        ]
        for start in range(0, rows, 1000)
    ]
    half = len(batches) // 2
    for writers, part in ((1, batches[:half]), (2, batches[half:])):
        left = iter(part)
        started, cpu = time.perf_counter(), Cpu(server)
        await asyncio.gather(*(write(store, left) for _ in range(writers)))
        rate = 1000 * len(part) / (time.perf_counter() - started)
        spent = cpu.told("us/row", 1e3 / len(part))
        who = f"batches, {writers} at a time:"
        print(f"{label}: {who} {rate:,.0f} rows/s (target 8,000), {spent}", flush=True)
    single, cpu = [], Cpu(server)
    for _ in range(200):
        started = time.perf_counter()
        await store.add(TENANT, [NewMemory(kind="message", content=sentence(25), namespace="n0")])
        single.append(time.perf_counter() - started)
    spent = cpu.told("ms", 1000 / len(single))
    print(f"{label}: single write {show(single)} ms p50/p95 (target 3), {spent}")
    if embedding is not None:
        started, cpu = time.perf_counter(), Cpu(server)
        done = await embedding.catch_up()
        rate = done / (time.perf_counter() - started)
        print(f"{label}: vectors stored {rate:,.0f}/s, {cpu.told('us', 1e6 / done)}", flush=True)
    del batches, part, left  # A server does not hold them, and its collector would walk over them.
    gc.collect()
    if server is not None:
        await vacuumed(url)
    kind = "hybrid" if vectors else "text"
    await ask(store, 20, 1)
    for which, count in (("the first query of each namespace", spaces), (f"{kind} query", QUERIES)):
        cpu = Cpu(server)
        took = await ask(store, count, spaces)
        print(f"{label}: {which} {show(took)} ms p50/p95, {cpu.told('ms', 1000 / count)}")
    await database.close()


async def vacuumed(url: str) -> None:
    """What PostgreSQL does on its own, within a minute, is done before queries are timed."""
    connection = await asyncpg.connect(url)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def ask(store: MemoryStore, count: int, spaces: int) -> list[float]:
    """Seconds that each of so many queries took."""
    took = []
    for i in range(count):
        query = MemoryQuery(query="what did Ana say of " + sentence(6), namespace=f"n{i % spaces}")
        started = time.perf_counter()
        found = await store.search(TENANT, query)
        took.append(time.perf_counter() - started)
        assert len(found) == 10
    return took


async def write(store: MemoryStore, batches: Iterator[list[NewMemory]]) -> None:
    for batch in batches:
        await store.add(TENANT, batch)


def show(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2] * 1000:.1f}/{ordered[int(len(ordered) * 0.95)] * 1000:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--namespaces", type=int, default=100)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--without-vectors", action="store_true")
    options = parser.parse_args()
    asked = (options.rows, options.namespaces, not options.without_vectors)
    if options.database == "sqlite":
        with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
            asyncio.run(bench(f"sqlite:///{folder}/data/bench.db", *asked, None))
    else:
        with PostgresServer(shared_buffers="1GB", max_wal_size="4GB") as server:
            asyncio.run(bench(server.fresh_database(), *asked, server.pid))


if __name__ == "__main__":
    main()
