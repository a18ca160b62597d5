"""The cases: what is asked of which server, and what it may cost.

Leans on ``measure`` and ``processes``; the targets are those of the project's brief. Refuses to
know how figures are shown.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.loader import Job
from benchmarks.measure import Contestant, Row, Sample, cpu_row, measured, median, rounds
from benchmarks.mock_model import TOKENS
from benchmarks.processes import Field, Server, cpu_s, forget_peak, memory_mb

RUNS = "/api/v1/runs"
WAITING = RUNS + "?wait=60"
QUESTION = "Which paragraph of the handbook is the best one to read first, and why is that so?"
TURN = "Turn {n}: tell me more about paragraph {n} of the handbook, and compare it with the others."


@dataclass(frozen=True)
class Effort:
    """How much is done: ``--quick`` for a look, else enough to trust."""

    rounds: int
    quick: bool

    def of(self, full: int, quick: int) -> int:
        return quick if self.quick else full


Case = Callable[[Field, Effort], list[Row]]


def agent_body(agent: str, **more: Any) -> dict[str, Any]:
    return {"agent": agent, "input": QUESTION, **more}


def job(path: str, body: dict[str, Any], count: int, concurrency: int = 8, **more: Any) -> Job:
    return Job(
        port=0, path=path, bodies=[body], count=count, concurrency=min(concurrency, count), **more
    )


class Stage:
    """The servers of one case, started together and stopped together."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._stack = ExitStack()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def bare(self) -> Server:
        return self._stack.enter_context(self._field.bare())

    def ours(self, kind: str, **settings: int) -> Server:
        return self._stack.enter_context(self._field.ours(kind, database_url=None, **settings))


def answers(field: Field, effort: Effort) -> list[Row]:
    """A plain answer: one model call without tools."""
    count = effort.of(300, 60)
    with Stage(field) as stage:
        bare, sqlite, postgres = stage.bare(), stage.ours("sqlite"), stage.ours("postgres")
        durable, unstored = agent_body("plain"), agent_body("plain", store=False)
        found = rounds(
            field,
            [
                Contestant("bare", bare, lambda n: job("/run", durable, count)),
                Contestant("sqlite", sqlite, lambda n: job(WAITING, durable, count)),
                Contestant("postgres", postgres, lambda n: job(WAITING, durable, count)),
                Contestant("ephemeral", sqlite, lambda n: job(WAITING, unstored, count)),
            ],
            effort.rounds,
        )
    return [
        cpu_row("plain answer, SQLite", found, "sqlite", 2.0),
        cpu_row("plain answer, PostgreSQL", found, "postgres", 2.5),
        cpu_row("plain answer, ephemeral", found, "ephemeral", 1.1),
    ]


def five_tools(field: Field, effort: Effort) -> list[Row]:
    """Five tool calls, one after another; and the same submitted, left alone, and waited for."""
    count = effort.of(100, 24)
    body = agent_body("tools")
    with Stage(field) as stage:
        bare, sqlite, postgres = stage.bare(), stage.ours("sqlite"), stage.ours("postgres")
        found = rounds(
            field,
            [
                Contestant("bare", bare, lambda n: job("/run", body, count)),
                Contestant("sqlite", sqlite, lambda n: job(WAITING, body, count)),
                Contestant("postgres", postgres, lambda n: job(WAITING, body, count)),
                Contestant("background", postgres, lambda n: job(RUNS, body, count, follow=True)),
            ],
            effort.rounds,
        )
    return [
        cpu_row("five tools, SQLite", found, "sqlite", 0.8),
        cpu_row("five tools, PostgreSQL", found, "postgres", 1.0),
        cpu_row("five tools in the background, PostgreSQL", found, "background", None),
    ]


def streaming(field: Field, effort: Effort) -> list[Row]:
    """1,000 tokens, in bursts and at the pace of a real model; and the first one, alone."""
    marker = "event: message.delta"
    burst, paced = effort.of(30, 8), effort.of(16, 4)
    alone = effort.of(30, 10)
    rows = []
    with Stage(field) as stage:
        servers = [stage.bare(), stage.ours("sqlite"), stage.ours("postgres")]

        def contestants(agent: str, count: int, concurrency: int) -> list[Contestant]:
            made = []
            for server in servers:
                bare = server.name == "bare"
                path = "/stream" if bare else RUNS
                body = agent_body(agent) if bare else agent_body(agent, stream=True)
                one = job(path, body, count, concurrency, marker=marker)
                made.append(Contestant(server.name, server, lambda n, one=one: one))  # type: ignore[misc]
            return made

        unit = "CPU ms/1,000 tokens"
        bursts = rounds(field, contestants("stream", burst, 4), effort.rounds)
        real = rounds(field, contestants("paced", paced, 4), effort.of(effort.rounds, 1))
        check_tokens(bursts, burst)
        check_tokens(real, paced)
        for name, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL")):
            rows += [
                cpu_row(f"1,000 tokens in a burst, {label}", bursts, name, 1.1, unit=unit),
                cpu_row(f"1,000 tokens at 500/s, {label}", real, name, 1.1, unit=unit),
            ]
        first = rounds(field, contestants("plain", 1, 1), alone)
        for name, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL")):
            rows.append(first_row(f"first token when alone, {label}", first, name, 15.0))
    return rows


def first_row(case: str, samples: dict[str, list[Sample]], name: str, target: float) -> Row:
    """When the first token of ``name`` came, beside the bare app's."""
    return Row(
        case=case,
        unit="ms",
        ours=median([one.first_ms for one in samples[name]]),
        bare=median([one.first_ms for one in samples["bare"]]),
        target=target,
        of="difference",
        errors=sum(len(one.errors) for one in samples[name]),
        details={"rounds": len(samples[name])},
    )


def check_tokens(samples: dict[str, list[Sample]], count: int) -> None:
    """A server that sent fewer events than there were tokens has not done the same work."""
    for one in (sample for found in samples.values() for sample in found):
        if one.markers != count * TOKENS:
            one.errors.append(f"{one.markers} deltas of {count * TOKENS}")


def openai_api(field: Field, effort: Effort) -> list[Row]:
    """The same answers and streams by OpenAI's API: responses, stored or not, and chats."""
    count, burst, alone = effort.of(300, 60), effort.of(30, 8), effort.of(12, 4)
    unit = "CPU ms/1,000 tokens"
    rows = []
    with Stage(field) as stage:
        servers = {"bare": stage.bare(), **{kind: stage.ours(kind) for kind in DATABASES}}

        def contestants(agent: str, stream: bool, count: int, concurrency: int) -> list[Contestant]:
            made = []
            for name, (kind, path, body, marker) in _openai_ways(agent, stream).items():
                expect = _ENDS.get(path, "succeeded")
                one = job(path, body, count, concurrency, expect=expect, marker=marker)
                made.append(Contestant(name, servers[kind], lambda n, one=one: one))  # type: ignore[misc]
            return made

        plain = rounds(field, contestants("plain", False, count, 8), effort.rounds)
        bursts = rounds(field, contestants("stream", True, burst, 4), effort.rounds)
        check_tokens(bursts, burst)
        first = rounds(field, contestants("paced", True, 1, 1), alone)
        check_tokens(first, 1)
    names = [name for name in plain if name != "bare"]
    rows += [cpu_row(name, plain, name, 1.6) for name in names]
    rows += [cpu_row(f"{name}: 1,000 tokens", bursts, name, 1.1, unit=unit) for name in names]
    rows += [first_row(f"{name}: first token when alone", first, name, 10.0) for name in names]
    return rows


_ENDS = {"/v1/responses": '"status":"completed"', "/v1/chat/completions": '"finish_reason":"stop"'}
DATABASES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}


def _openai_ways(agent: str, stream: bool) -> dict[str, tuple[str, str, dict[str, Any], str]]:
    """Each way to ask ``agent``: of which server, where, what, and by which mark of a delta."""
    asked: dict[str, Any] = {"model": f"agent/{agent}", "stream": stream}
    response = {**asked, "input": QUESTION}
    chat = {**asked, "messages": [{"role": "user", "content": QUESTION}]}
    delta, chunk = "event: response.output_text.delta", '"delta":{"content":'
    responses, completions = "/v1/responses", "/v1/chat/completions"
    unstored = {**response, "store": False}
    ways: dict[str, tuple[str, str, dict[str, Any], str]] = {
        "bare": (
            "bare",
            "/stream" if stream else "/run",
            agent_body(agent),
            "event: message.delta",
        ),
        "response, stored, SQLite": ("sqlite", responses, response, delta),
        "response, stored, PostgreSQL": ("postgres", responses, response, delta),
        "response, not stored": ("sqlite", responses, unstored, delta),
        "chat completion, not stored": ("sqlite", completions, chat, chunk),
    }
    if not stream:
        return {name: (*way[:3], "") for name, way in ways.items()}
    return ways


def session(field: Field, effort: Effort) -> list[Row]:
    """Turns 91 to 100 of a conversation; the 90 before them are had, not made up."""
    conversations = effort.of(2, 1)
    samples: dict[str, list[Any]] = {"bare": [], "sqlite": [], "postgres": []}
    with Stage(field) as stage:
        servers = [stage.bare(), stage.ours("sqlite"), stage.ours("postgres")]
        for number in range(effort.of(min(effort.rounds, 3), 1)):
            for server in servers:
                for first, last in ((1, 90), (91, 100)):
                    path = "/run" if server.name == "bare" else WAITING
                    turns = [
                        {
                            "agent": "plain",
                            "input": TURN.format(n=turn),
                            "session_id": f"talk-{number}-{talk}",
                        }
                        for turn in range(first, last + 1)
                        for talk in range(conversations)
                    ]
                    work = Job(port=0, path=path, bodies=turns, count=len(turns), concurrency=1)
                    sample = measured(field, server, work)
                    if first > 1 or sample.errors:
                        samples[server.name].append(sample)
    return [
        cpu_row("turns 91-100 of a session, SQLite", samples, "sqlite", 0.3, unit="CPU ms/turn"),
        cpu_row(
            "turns 91-100 of a session, PostgreSQL", samples, "postgres", 0.3, unit="CPU ms/turn"
        ),
    ]


def wave(field: Field, effort: Effort) -> list[Row]:
    """1,000 streamed runs at once against a model that takes 2 s."""
    count = effort.of(1_000, 200)
    rows = []
    results: dict[str, tuple[float, float, list[str]]] = {}
    for name in ("bare", "sqlite", "postgres"):
        with Stage(field) as stage:
            settings = {"worker_concurrency": count, "max_parallel_tasks": count}
            server = stage.bare() if name == "bare" else stage.ours(name, **settings)
            bare = name == "bare"
            path = "/stream" if bare else RUNS
            body = agent_body("slow") if bare else agent_body("slow", stream=True)
            field.send(server, job(path, agent_body("plain", **_streamed(bare)), 20, 4))
            before = memory_mb(server.pid)
            forget_peak(server.pid)
            report = field.send(server, job(path, body, count, count, marker="message.delta"))
            used = memory_mb(server.pid, "VmHWM") - before
            results[name] = (report.wall_s, 1024 * used / count, report.errors)
    wall, memory, bare_errors = results["bare"]
    for name, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL")):
        our_wall, our_memory, errors = results[name]
        rows += [
            Row(
                case=f"wave of {count} streamed runs, {label}: time",
                unit="s",
                ours=our_wall,
                bare=wall,
                ratio=our_wall / wall,
                target=1.3,
                errors=len(errors),
                details={"first_errors": errors[:3], "bare_errors": bare_errors[:3]},
            ),
            Row(
                case=f"wave of {count} streamed runs, {label}: memory",
                unit="KB/run",
                ours=our_memory,
                bare=memory,
                ratio=our_memory / memory if memory else None,
                target=1.2,
                errors=len(errors),
                note=f"bare: {len(bare_errors)} errors" if bare_errors else "",
            ),
        ]
    return rows


def _streamed(bare: bool) -> dict[str, Any]:
    return {} if bare else {"stream": True}


def parallel_tasks(field: Field, effort: Effort) -> list[Row]:
    """100 tasks of one second side by side at ``WORKER_CONCURRENCY=100``."""
    rows = []
    definition = {
        "name": "naps",
        "nodes": [
            {
                "id": "all",
                "type": "map",
                "over": list(range(100)),
                "as": "n",
                "nodes": [
                    {"id": "rest", "type": "tool", "tool": "nap", "arguments": {"seconds": 1}}
                ],
            }
        ],
        "output": "{{ nodes.all.output }}",
    }
    for kind, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL")):
        with Stage(field) as stage:
            server = stage.ours(kind, worker_concurrency=100)
            once = job(WAITING, {"workflow": definition}, 1)
            found = [measured(field, server, once) for _ in range(effort.of(4, 3))][1:]
        rows.append(
            Row(
                case=f"100 parallel tasks of 1 s, {label}",
                unit="s",
                ours=median([one.wall_s for one in found]),
                target=1.5,
                of="ours",
                errors=sum(len(one.errors) for one in found),
                note=f"CPU {median([one.cpu_ms for one in found]):.0f} ms",
                details={"errors": [one.errors for one in found]},
            )
        )
    return rows


def start(field: Field, effort: Effort) -> list[Row]:
    """From nothing to ready, and then at rest."""
    rows = []
    idle_s = effort.of(20, 10)
    with Stage(field) as stage:
        bare = stage.bare()
        for kind, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL")):
            made = []
            for _ in range(effort.of(3, 1)):
                with Stage(field) as inner:
                    server = inner.ours(kind)
                    made.append((server.ready_cpu_s, server.ready_wall_s))
            server = stage.ours(kind)
            made.append((server.ready_cpu_s, server.ready_wall_s))
            time.sleep(3)
            before = cpu_s(server.pid)
            time.sleep(idle_s)
            idle = 100 * (cpu_s(server.pid) - before) / idle_s
            rows += [
                Row(
                    case=f"ready from a cold start, {label}",
                    unit="CPU s",
                    ours=median([cpu for cpu, _ in made]),
                    bare=bare.ready_cpu_s,
                    target=4.0,
                    of="ours",
                    note=f"{median([wall for _, wall in made]):.1f} s of time",
                ),
                Row(
                    case=f"memory at rest, {label}",
                    unit="MB",
                    ours=memory_mb(server.pid),
                    bare=memory_mb(bare.pid),
                    target=200.0,
                    of="ours",
                ),
                Row(
                    case=f"CPU at rest, {label}",
                    unit="% of a core",
                    ours=idle,
                    target=1.0,
                    of="ours",
                ),
            ]
    return rows


CASES: dict[str, Case] = {
    "answers": answers,
    "tools": five_tools,
    "streaming": streaming,
    "openai": openai_api,
    "session": session,
    "wave": wave,
    "tasks": parallel_tasks,
    "start": start,
}
