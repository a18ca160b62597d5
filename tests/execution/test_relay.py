"""Several engines on one PostgreSQL hear of each other at once, and by looking when they cannot."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run
from agent_server.execution import engine, relay, watch
from agent_server.execution.ports import TaskContext, TaskSpec
from agent_server.execution.relay import packed
from agent_server.execution.runs import Runs
from agent_server.storage.wire import MAX_TEXT
from tests.execution.kit import event_types, finished, running, submit, wired
from tests.support.until import until

TOKENS = [f"t{number} " for number in range(50)]


class Gate:
    """A handler that says tokens each time it is let go on, and ends when told."""

    def __init__(self) -> None:
        self.go: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, context: TaskContext) -> Any:
        while (order := await self.go.get()) != "end":
            for token in TOKENS:
                context.journal.delta(order, "clerk", token)
        return "done"


async def ask(runs: Runs, run: Run, *statuses: str) -> Run:
    """The run when it is in one of ``statuses``."""

    async def reached() -> Run | None:
        now = await runs.get(DEFAULT_TENANT, run.id)
        return now if now.status.value in statuses else None

    found: Run = await until(reached)
    return found


async def read_all(runs: Runs, run: Run, seen: list[Any], changed: asyncio.Condition) -> None:
    async with runs.follow(DEFAULT_TENANT, run.id, 0) as follow:
        async for batch in follow.batches():
            async with changed:
                seen += [json.loads(event.data) for event in batch]
                changed.notify_all()


def texts(seen: list[Any], step: str) -> list[str]:
    return [e["text"] for e in seen if e["type"] == "message.delta" and e["step"] == step]


@pytest.mark.timeout(60)
async def test_a_reader_on_another_node_gets_every_event_in_order_and_every_delta(
    postgres_url: str,
) -> None:
    gate, changed, seen = Gate(), asyncio.Condition(), list[Any]()
    async with running(postgres_url, {"agent": gate}) as worker:
        async with running(postgres_url, {}, role="api") as api:
            run = await submit(worker, agent="clerk", input="hello")
            reading = asyncio.create_task(read_all(api, run, seen, changed))
            # The first may come before the worker has heard that somebody reads.
            for number in range(200):
                gate.go.put_nowait(f"try{number}")
                if any(texts(seen, f"try{n}") == TOKENS for n in range(number)):
                    break
                await api.wait(DEFAULT_TENANT, run.id, 0.05)
            gate.go.put_nowait("surely")
            async with changed:
                await changed.wait_for(lambda: texts(seen, "surely") == TOKENS)
            gate.go.put_nowait("end")
            await reading
            assert (await finished(api, run)).output == "done"
            stored = [e["seq"] for e in seen if "seq" in e]
            assert stored == list(range(1, len(stored) + 1))
            assert [e["type"] for e in seen if "seq" in e] == await event_types(api, run)


@pytest.mark.timeout(60)
async def test_readers_go_on_when_the_wire_between_the_nodes_is_cut_and_hear_again_when_it_is_laid(
    postgres_url: str,
) -> None:
    gate, changed, seen = Gate(), asyncio.Condition(), list[Any]()
    async with running(postgres_url, {"agent": gate}) as worker:
        async with running(postgres_url, {}, role="api") as api:
            run = await submit(worker, agent="clerk", input="hello")
            reading = asyncio.create_task(read_all(api, run, seen, changed))
            await wired(worker, api)
            connection = await asyncpg.connect(postgres_url)
            cut = await connection.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await connection.close()
            assert cut
            for number in range(400):
                gate.go.put_nowait(f"try{number}")
                if any(texts(seen, f"try{n}") == TOKENS for n in range(number)):
                    break
                await api.wait(DEFAULT_TENANT, run.id, 0.05)
            assert any(texts(seen, f"try{n}") == TOKENS for n in range(number))
            gate.go.put_nowait("end")
            await reading
            assert [e["type"] for e in seen if "seq" in e] == await event_types(worker, run)


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody looks by themselves: what is heard, is heard by the wire."""
    monkeypatch.setattr(engine, "POLL_S", 3600.0)
    monkeypatch.setattr(watch, "POLL_S", 3600.0)
    monkeypatch.setattr(relay, "LOOK_S", 3600.0)
    yield


@pytest.mark.timeout(60)
async def test_work_ends_and_orders_reach_other_nodes_without_anybody_looking(
    postgres_url: str, deaf: None
) -> None:
    stopped = asyncio.Event()

    met, both = list[str](), asyncio.Event()

    async def parent(context: TaskContext) -> Any:
        specs = [TaskSpec(name, name, "leaf", {}) for name in ("a", "b")]
        ends = await asyncio.gather(*(context.child(spec) for spec in specs))
        return [end.output for end in ends]

    async def leaf(context: TaskContext) -> Any:
        met.append(context.path)
        if len(met) == 2:
            both.set()
        await both.wait()  # One node carries out one task at once: the other is elsewhere.
        return context.path

    async def stuck(context: TaskContext) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    handlers = {"agent": parent, "leaf": leaf, "goal": stuck}
    async with AsyncExitStack() as stack:
        # The API node carries out nothing: it can only have been told.
        api = await stack.enter_async_context(running(postgres_url, {}, role="api"))
        one = await stack.enter_async_context(running(postgres_url, handlers, worker_concurrency=1))
        two = await stack.enter_async_context(running(postgres_url, handlers, worker_concurrency=1))
        await wired(api, one, two)
        run = await submit(api, agent="clerk", input="hello")
        assert (await finished(api, run)).output == ["a", "b"]
        endless = await submit(api, goal="never ends")
        await ask(api, endless, "running")
        ended = await api.cancel(DEFAULT_TENANT, endless.id)
        assert ended.status.value == "cancelled"
        assert stopped.is_set()


pieces = st.lists(
    st.one_of(
        st.tuples(
            st.just("delta"),
            st.sampled_from(["run_a", "run_b"]),
            st.sampled_from(['{"a":1', '{"a":2']),
            st.text(max_size=3000).map(json.dumps),
        ),
        st.tuples(
            st.just("event"),
            st.sampled_from(["run_a", "run_b"]),
            st.integers(1, 9),
            st.just("run.started"),
            st.text(max_size=9000),
        ),
        st.just(("work",)),
    ),
    max_size=40,
)


@given(pieces)
def test_packed_messages_fit_the_wire_and_keep_each_run_s_order(messages: list[Any]) -> None:
    room = MAX_TEXT - len('{"node":"node-1","say":[]}')
    heard: list[Any] = []
    for text in packed("node-1", [list(message) for message in messages]):
        assert len(text.encode()) <= MAX_TEXT
        heard += json.loads(text)["say"]
    flat: list[Any] = []
    for message in heard:
        if message[0] == "delta":
            flat += [[*message[:3], piece] for piece in message[3:]]
        else:
            flat.append(message)
    for run in ("run_a", "run_b"):
        sent = [list(m) for m in messages if len(m) > 1 and m[1] == run]
        sizes = [len(json.dumps(m, separators=(",", ":"))) for m in sent]
        kept = [
            m if size <= room else ["look", run]
            for m, size in zip(sent, sizes, strict=True)
            if size <= room or m[0] == "event"
        ]
        got = [m for m in flat if len(m) > 1 and m[1] == run]
        assert got == kept
