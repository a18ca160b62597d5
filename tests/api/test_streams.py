"""Event streams over a real socket: exact resume, pings, slow readers, draining."""

import asyncio
import json

import pytest

from agent_server.api.sse import ENDING, Streams
from tests.api.fake_runs import FakeRuns
from tests.api.harness import Server, listening, settings, stream
from tests.support.until import until

RUNS = "/api/v1/runs"
AGENT = {"agent": "clerk", "input": "hello"}


def lines(block: bytes) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in block.decode().strip().split("\n"))


@pytest.fixture
def server() -> Server:
    return Server(settings())


async def new_run(server: Server) -> str:
    return str((await server.call("POST", RUNS, AGENT)).json()["id"])


async def test_each_event_is_one_write_with_its_number(server: Server) -> None:
    run_id = await new_run(server)
    async with listening(server.app) as port, stream(port, f"{RUNS}/{run_id}/events") as live:
        assert " 200 " in live.head
        assert "text/event-stream" in live.head
        first = await live.write()
        assert first.startswith(b"id: 1\nevent: run.created\ndata: {")
        assert first.endswith(b"\n\n")
        server.runs.say(run_id, "message.delta", text="Hel")
        server.runs.say(run_id, "message.completed", text="Hello")
        server.runs.say(run_id, "run.succeeded", output="Hello")
        delta, message, end = await live.writes()
        assert "id" not in lines(delta)
        assert lines(delta)["event"] == "message.delta"
        assert lines(message)["id"] == "2"
        assert json.loads(lines(end)["data"])["output"] == "Hello"


@pytest.mark.parametrize("how", ["header", "query"])
async def test_a_stream_resumes_exactly_after_the_last_event(server: Server, how: str) -> None:
    run_id = await new_run(server)
    for n in range(5):
        server.runs.say(run_id, "run.resumed", reason=str(n))
    server.runs.say(run_id, "run.succeeded")
    path = f"{RUNS}/{run_id}/events" + ("?after=3" if how == "query" else "?after=1")
    headers = {"Last-Event-ID": "3"} if how == "header" else {}
    async with listening(server.app) as port, stream(port, path, headers) as live:
        assert [lines(block)["id"] for block in await live.writes()] == ["4", "5", "6", "7"]


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 30])
async def test_a_last_event_id_that_is_no_number_is_refused(server: Server, value: str) -> None:
    run_id = await new_run(server)
    path, headers = f"{RUNS}/{run_id}/events", {"Last-Event-ID": value}
    answer = await server.call("GET", path, headers=headers)
    assert answer.status == 422


async def test_a_browser_that_reconnects_after_the_end_is_told_to_stop(server: Server) -> None:
    run_id = await new_run(server)
    server.runs.say(run_id, "run.succeeded")
    answer = await server.call("GET", f"{RUNS}/{run_id}/events", headers={"Last-Event-ID": "2"})
    assert (answer.status, answer.body) == (204, b"")


async def test_submitting_with_stream_answers_the_events(server: Server) -> None:
    body = json.dumps(AGENT | {"stream": True, "metadata": {"end_at_once": True}}).encode()
    async with listening(server.app) as port, stream(port, RUNS, body=body) as live:
        blocks = [lines(block)["event"] for block in await live.writes()]
        assert blocks == ["run.created", "run.succeeded"]
        (run_id,) = server.runs.runs
        assert f"location: {RUNS}/{run_id}" in live.head


async def test_a_quiet_stream_is_pinged() -> None:
    server = Server(settings(stream_ping_s=0.15))
    run_id = await new_run(server)
    async with listening(server.app) as port, stream(port, f"{RUNS}/{run_id}/events") as live:
        assert (await live.write()).startswith(b"id: 1")
        assert await live.write() == b": ping\n\n"
        assert await live.write() == b": ping\n\n"
        server.runs.say(run_id, "run.succeeded")
        assert b"run.succeeded" in (await live.writes())[-1]
    await until(lambda: server.streams._timer is None)


async def test_a_reader_that_leaves_is_let_go_at_once_and_the_run_goes_on(server: Server) -> None:
    run_id = await new_run(server)
    async with listening(server.app) as port:
        async with stream(port, f"{RUNS}/{run_id}/events") as live:
            await live.write()
            assert server.streams.open == 1
        await until(lambda: server.streams.open == 0)
        assert not server.runs.hub.listened(run_id)
    assert server.runs.runs[run_id].status == "running"


async def test_a_reader_that_is_too_slow_is_told_and_cut_off(server: Server) -> None:
    server.runs.hub = type(server.runs.hub)(queue_size=10)
    run_id = await new_run(server)
    async with listening(server.app) as port, stream(port, f"{RUNS}/{run_id}/events") as live:
        await live.write()
        for n in range(11):
            server.runs.say(run_id, "message.delta", text=str(n))
        last = (await live.writes())[-1]
        assert lines(last)["event"] == "stream.lagged"
        assert "id" not in lines(last)


async def test_a_reader_that_reads_nothing_is_given_up_and_memory_stays_bounded() -> None:
    server = Server(settings(stream_ping_s=0.3))
    run_id = await new_run(server)
    async with listening(server.app) as port:
        async with stream(port, f"{RUNS}/{run_id}/events"):
            await until(lambda: server.streams.open == 1)
            for _ in range(300):
                server.runs.say(run_id, "message.delta", text="x" * 100_000)
                await asyncio.sleep(0)  # the stream has its turn
            await until(lambda: server.streams.open == 0)
    assert server.runs.runs[run_id].status == "running"


async def test_draining_ends_every_stream_with_word_of_it(server: Server) -> None:
    run_id = await new_run(server)
    path = f"{RUNS}/{run_id}/events"
    async with listening(server.app) as port:
        async with stream(port, path) as one, stream(port, path) as two:
            await one.write()
            await two.write()
            server.streams.drain()
            for live in (one, two):
                (last,) = await live.writes()
                assert lines(last)["event"] == "server.draining"
                assert lines(last)["retry"] == "1000"
        async with stream(port, path) as late:
            assert lines((await late.writes())[-1])["event"] == "server.draining"


async def test_streams_over_the_limit_are_refused() -> None:
    server = Server(settings(max_streams=1))
    run_id = await new_run(server)
    path = f"{RUNS}/{run_id}/events"
    async with listening(server.app) as port, stream(port, path) as live:
        await live.write()
        answer = await server.call("GET", path)
        assert (answer.status, answer.json()["code"]) == (429, "rate_limited")
        assert answer.headers["retry-after"]
        before = len(server.runs.runs)
        refused = await server.call("POST", RUNS, AGENT | {"stream": True})
        assert refused.status == 429
        assert len(server.runs.runs) == before


# Runs that are not stored


async def test_a_run_that_is_not_stored_can_be_streamed(server: Server) -> None:
    body = json.dumps(AGENT | {"stream": True, "store": False}).encode()
    async with listening(server.app) as port, stream(port, RUNS, body=body) as live:
        kinds = [lines(block)["event"] for block in await live.writes()]
        assert kinds == ["run.created", "message.delta", "run.succeeded"]


async def test_a_run_that_is_not_stored_ends_with_its_reader(server: Server) -> None:
    body = json.dumps(AGENT | {"stream": True, "store": False, "metadata": {"wait": True}}).encode()
    async with listening(server.app) as port:
        async with stream(port, RUNS, body=body) as live:
            await live.write()
        await asyncio.wait_for(server.runs.ephemeral_cancelled.wait(), 5)


async def test_a_run_that_is_not_stored_and_is_refused_is_a_problem(server: Server) -> None:
    body = {"agent": "nobody", "input": "x", "stream": True, "store": False}
    answer = await server.call("POST", RUNS, body)
    assert (answer.status, answer.json()["code"]) == (422, "unknown_agent")


def test_the_events_that_end_a_run_are_known() -> None:
    assert ENDING == {"run.succeeded", "run.failed", "run.cancelled", "run.budget_exceeded"}


def test_parts_of_the_fakes_are_what_the_doors_ask_for() -> None:
    from agent_server.api.ports import RunsPort

    port: RunsPort = FakeRuns()
    assert port is not None
    assert Streams(limit=1, ping_s=1).open == 0
