"""``python -m benchmarks.machines``: several processes on one PostgreSQL, and what they bear.

Leans on ``processes`` and the mock model. Refuses to judge: it prints each figure beside its
target. ``--quick`` does a tenth, for a look.
"""

import argparse
import asyncio
import json
import re
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types

from benchmarks.cases import QUESTION, RUNS, agent_body, job
from benchmarks.mock_model import TOKENS, TOOL_CALLS
from benchmarks.processes import Field, Server, memory_mb

STEPS = 2 * TOOL_CALLS + 1
"""Of one run of the agent ``tools``."""
STAMP = re.compile(rb"@(\d{18})")
WAITS = {
    "name": "waits",
    "nodes": [{"id": "w", "type": "wait", "signal": "go", "timeout_s": 86_400}],
}


class Cluster:
    """Servers on one database, all of them there until the ``with`` block ends."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.url = field.database()
        self.servers: list[Server] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, role: str, **settings: object) -> Server:
        server = self._stack.enter_context(
            self.field.ours("postgres", database_url=self.url, role=role, **settings)
        )
        self.servers.append(server)
        return server

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of CPU so far: of all servers, and of PostgreSQL."""
        return sum(s.cpu_s() for s in self.servers), self.servers[0].database_cpu_s()

    def count(self, status: str) -> int:
        """Runs with this status."""
        return asyncio.run(_count(self.url, status))


async def _count(url: str, status: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM runs WHERE status = $1", status))
    finally:
        await connection.close()


@contextmanager
def spent(cluster: Cluster) -> Iterator[dict[str, float]]:
    """What the block takes: ``wall``, ``servers`` and ``database``, in seconds."""
    found: dict[str, float] = {}
    cpu, database = cluster.cpu_s()
    started = time.perf_counter()
    yield found
    found["wall"] = time.perf_counter() - started
    after, database_after = cluster.cpu_s()
    found["servers"], found["database"] = after - cpu, database_after - database


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=70) as answer:
        return json.load(answer)


def post(server: Server, body: dict[str, Any], path: str = RUNS) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=70) as answer:
        return json.load(answer)


def said(what: str, figure: str, target: str = "") -> None:
    print(f"{what:<58}{figure:<44}{target}", flush=True)


def throughput(field: Field, scale: float) -> None:
    """Steps a second with 1, 2 and 4 workers, and the CPU of each step."""
    count = max(20, int(300 * scale))
    for workers in (1, 2, 4):
        with Cluster(field) as cluster:
            api = cluster.add("api")
            for _ in range(workers):
                cluster.add("worker", worker_concurrency=16)
            field.send(api, job(RUNS, agent_body("tools"), 10, 10, follow=True))
            with spent(cluster) as cost:
                report = field.send(api, job(RUNS, agent_body("tools"), count, 48, follow=True))
            steps = count * STEPS
            said(
                f"{workers} worker(s): steps a second",
                f"{steps / report.wall_s:,.0f}; CPU a step {1000 * cost['servers'] / steps:.2f} ms "
                f"+ {1000 * cost['database'] / steps:.2f} in PostgreSQL",
                f"{len(report.errors)} errors",
            )


def start(field: Field, scale: float) -> None:
    """From the submission to the start, at low load, the worker being another process."""
    with Cluster(field) as cluster:
        api = cluster.add("api")
        cluster.add("worker")
        waits = []
        for number in range(max(20, int(200 * scale)) + 5):
            run = post(api, agent_body("plain"), RUNS + "?wait=30")
            begun, made = (datetime.fromisoformat(run[k]) for k in ("started_at", "created_at"))
            if number >= 5:
                waits.append(1000 * (begun - made).total_seconds())
            time.sleep(0.02)
    said(
        "from submission to start, p50 / p95",
        f"{statistics.median(waits):.1f} / {sorted(waits)[int(0.95 * len(waits))]:.1f} ms",
        "≤ 50 ms p50",
    )


def queue(field: Field, scale: float) -> None:
    """10,000 queued runs worked off: what a run costs at the beginning and at the end."""
    count = max(500, int(10_000 * scale))
    part = count // 5
    with Cluster(field) as cluster:
        api = cluster.add("api")
        field.send(api, job(RUNS, agent_body("plain"), count, 16, expect="queued"))
        cluster.add("worker", worker_concurrency=16)
        costs = []
        done = cluster.count("succeeded")
        for step in range(1, 6):
            with spent(cluster) as cost:
                before = done
                while done < step * part:
                    time.sleep(0.2)
                    done = cluster.count("succeeded")
            costs.append(1000 * (cost["servers"] + cost["database"]) / max(1, done - before))
    said(
        f"{count:,} queued runs: CPU a run, each fifth of them",
        " / ".join(f"{c:.1f}" for c in costs) + " ms",
        "not growing",
    )


def waiting(field: Field, scale: float) -> None:
    """What 1,000 waiting runs cost."""
    count = max(100, int(1_000 * scale))
    with Cluster(field) as cluster:
        server = cluster.add("all")
        field.send(server, job(RUNS, {"workflow": WAITS}, count, 16, expect="run_"))
        until(lambda: cluster.count("waiting") == count, 120)
        time.sleep(3)
        with spent(cluster) as cost:
            time.sleep(20)
    said(
        f"{count:,} waiting runs: CPU at rest",
        f"{100 * cost['servers'] / cost['wall']:.1f} % of a core "
        f"+ {100 * cost['database'] / cost['wall']:.1f} in PostgreSQL",
        "≤ 5 %",
    )


def streams(field: Field, scale: float) -> None:
    """5,000 tokens a second from a worker through an API node: how late a token is."""
    with Cluster(field) as cluster:
        api = cluster.add("api")
        cluster.add("worker", worker_concurrency=16)
        asyncio.run(_lateness(api, 2))
        with spent(cluster) as cost:
            late = sorted(asyncio.run(_lateness(api, 10)))
    said(
        "5,000 tokens a second across processes: late, p50 / p95",
        f"{late[len(late) // 2]:.0f} / {late[int(0.95 * len(late))]:.0f} ms; {len(late):,} of "
        f"{10 * TOKENS:,}; CPU {100 * cost['servers'] / cost['wall']:.0f} % of a core",
        "p95 ≤ 50 ms",
    )


async def _lateness(api: Server, streams_: int) -> list[float]:
    """Of each token, the milliseconds between the model's write and its arrival here."""
    late: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 24)
        body = json.dumps({"agent": "stamped", "input": QUESTION, "stream": True}).encode()
        writer.write(
            b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (RUNS.encode(), len(body), body)
        )
        delta = False
        while line := await reader.readline():
            if line.startswith(b"event:"):
                delta = b"message.delta" in line
                if b"run.succeeded" in line:
                    break
            elif delta and line.startswith(b"data:"):
                now = time.monotonic_ns()
                late.extend((now - int(stamp)) / 1e6 for stamp in STAMP.findall(line))
        writer.close()

    await asyncio.gather(*(one() for _ in range(streams_)))
    return late


def idle_streams(field: Field, scale: float) -> None:
    """10,000 idle streams on one node: memory, and what they do to other calls."""
    count = max(500, int(9_900 * scale))
    with Cluster(field) as cluster:
        server = cluster.add("all")
        ids = [post(server, {"workflow": WAITS})["id"] for _ in range(10)]
        until(lambda: cluster.count("waiting") == len(ids), 60)
        before, alone = memory_mb(server.pid), _p95(server, ids[0])
        found: dict[str, float] = {}
        asyncio.run(_hold(server, ids, count, found))
    said(
        f"{count:,} idle streams: memory",
        f"{found['memory'] - before:.0f} MB, {1024 * (found['memory'] - before) / count:.1f} KB each",
        "≤ 200 MB for 10,000",
    )
    said(
        "another call's p95 beside them",
        f"{found['p95']:.1f} ms, {found['p95'] / alone:.2f} × that without ({alone:.1f} ms)",
        "< 2 ×",
    )


def _p95(server: Server, run_id: str) -> float:
    taken = []
    for _ in range(200):
        started = time.perf_counter()
        get(server, f"{RUNS}/{run_id}")
        taken.append(1000 * (time.perf_counter() - started))
    return sorted(taken)[int(0.95 * len(taken))]


async def _hold(server: Server, ids: list[str], count: int, found: dict[str, float]) -> None:
    writers = []
    for number in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
        path = f"{RUNS}/{ids[number % len(ids)]}/events"
        writer.write(
            f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n\r\n".encode()
        )
        assert b" 200 " in await reader.readline()
        writers.append(writer)
    await asyncio.sleep(5)
    found["memory"] = memory_mb(server.pid)
    found["p95"] = await asyncio.to_thread(_p95, server, ids[0])
    for writer in writers:
        writer.close()


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait for a state. Raises ``TimeoutError``."""
    end = time.perf_counter() + seconds
    while not holds():
        if time.perf_counter() > end:
            raise TimeoutError("The state was not reached.")
        time.sleep(0.1)


CASES = {
    "throughput": throughput,
    "start": start,
    "queue": queue,
    "waiting": waiting,
    "streams": streams,
    "idle": idle_streams,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machines", description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this case")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    options = parser.parse_args()
    with Field() as field:
        for name in options.case or CASES:
            CASES[name](field, 0.1 if options.quick else 1.0)


if __name__ == "__main__":
    main()
