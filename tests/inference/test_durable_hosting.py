"""What hosting leaves alone: runs outside a durable one, and the network."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agents import Agent, RunConfig, Runner, function_tool
from agents.run import get_default_agent_runner
from agents.testing import ScriptedModel, assistant_message, function_call

from agent_server.inference.agent_loop import AgentLoop
from agent_server.inference.hosting import DurableRunner
from agent_server.testing.journal import memory_context
from tests.support.durable import OneModel, call, loop_for, outputs_of, say, settings


@function_tool
def ping() -> str:
    return "pong"


async def test_a_run_outside_a_durable_one_is_untouched() -> None:
    loop, durable_model = loop_for(lambda i, items: [say("durable")])
    agent = Agent(name="a", tools=[ping])
    ctx, journal = memory_context()
    assert (await loop.run(ctx, agent, "hi")).output == "durable"

    plain = ScriptedModel([[function_call("ping", {}, call_id="c")], [assistant_message("plain")]])
    result = await Runner.run(agent, "hi", run_config=RunConfig(model=plain))
    assert result.final_output == "plain"
    assert len(durable_model.asked) == 1
    assert len(journal.writes) == 1
    assert agent.model is None and "get_all_tools" not in vars(agent)
    assert agent.tools == [ping] and agent.tools[0] is ping


async def test_an_agents_own_model_object_is_ledgered_and_stays_its_own() -> None:
    own = ScriptedModel([[assistant_message("mine")]])
    agent = Agent(name="a", model=own)
    loop, other = loop_for(lambda i, items: [say("theirs")])
    ctx, journal = memory_context()
    assert (await loop.run(ctx, agent, "hi")).output == "mine"
    assert agent.model is own
    assert other.asked == []
    ctx, again = memory_context(recorded=journal.writes)
    assert (await loop.run(ctx, agent, "hi")).output == "mine"
    own.assert_complete()


async def test_a_streamed_run_inside_a_tool_is_ledgered() -> None:
    helper = Agent(name="helper", instructions="helper")

    @function_tool
    async def consult() -> str:
        streamed = Runner.run_streamed(helper, "what?")
        kinds = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in kinds
        return str(streamed.final_output)

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if instructions == "helper":
            return [say("streamed help")]
        got = outputs_of(items)
        return [say(got["c"])] if got else [call("consult", {}, "c")]

    loop, _ = loop_for(rule)
    ctx, journal = memory_context()
    assert (await loop.run(ctx, Agent(name="a", tools=[consult]), "hi")).output == "streamed help"
    assert "tool/c/model/1" in {step.key for step in journal.writes}


async def test_a_run_inside_a_tool_keeps_the_model_of_its_own_configuration() -> None:
    helper = Agent(name="helper", instructions="helper")

    @function_tool
    async def consult() -> str:
        named = await Runner.run(helper, "one", run_config=RunConfig(model="named"))
        own = ScriptedModel([[assistant_message("own")]])
        given = await Runner.run(helper, "two", run_config={"model": own})
        return f"{named.final_output} {given.final_output}"

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if instructions == "helper":
            return [say("by name")]
        got = outputs_of(items)
        return [say(got["c"])] if got else [call("consult", {}, "c")]

    loop, _ = loop_for(rule)
    ctx, journal = memory_context()
    assert (await loop.run(ctx, Agent(name="a", tools=[consult]), "hi")).output == "by name own"
    inner = [s.name for s in journal.writes if s.key.startswith("tool/c/model")]
    assert inner == ["named", "ScriptedModel"]


async def test_runs_side_by_side_keep_their_journals_apart() -> None:
    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        return [say(items[0]["content"])] if got else [call("ping", {}, "c")]

    loop, _ = loop_for(rule)
    agent = Agent(name="a", tools=[ping])
    contexts = [memory_context() for _ in range(20)]
    results = await asyncio.gather(
        *(loop.run(ctx, agent, f"number {n}") for n, (ctx, _) in enumerate(contexts))
    )
    assert [result.output for result in results] == [f"number {n}" for n in range(20)]
    for _, journal in contexts:
        assert [s.key for s in journal.writes] == ["model/1", "tool/c", "tool/c", "model/2"]


async def test_agents_that_run_in_turn_in_one_task_do_not_take_each_others_answers() -> None:
    answers = iter(["one", "two", "three"])
    loop, model = loop_for(lambda i, items: [say(next(answers))])
    agent = Agent(name="a")
    ctx, journal = memory_context()
    first = [(await loop.run(ctx, agent, "same question")).output for _ in range(3)]
    assert first == ["one", "two", "three"]
    ctx, _ = memory_context(recorded=journal.writes)
    assert [(await loop.run(ctx, agent, "same question")).output for _ in range(3)] == first
    assert len(model.asked) == 3


@asynccontextmanager
async def recording_server() -> AsyncIterator[tuple[str, list[str]]]:
    """A local HTTP server that keeps the first line of each request."""
    requests: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", requests
    finally:
        server.close()
        await server.wait_closed()


PROGRAM = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from agents import Agent, trace
from agents.tracing import get_trace_provider
from agents.tracing.processors import default_exporter
from agent_server.inference.agent_loop import AgentLoop
from agent_server.inference.hosting import DurableRunner
from agent_server.testing.journal import memory_context
from tests.support.durable import loop_for, say

default_exporter().endpoint = sys.argv[2] + "/v1/traces/ingest"

async def main():
    loop, _ = loop_for(lambda i, items: [say("ok")], tracing=True)
    ctx, _ = memory_context()
    with trace("mine"):
        print((await loop.run(ctx, Agent(name="a"), "hi")).output)

asyncio.run(main())
get_trace_provider().shutdown()
"""


async def test_no_trace_leaves_the_machine_though_a_key_is_set() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    async with recording_server() as (address, requests):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM,
            root,
            address,
            env={**os.environ, "OPENAI_API_KEY": "sk-canary", "OPENAI_BASE_URL": address},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert out.decode().strip() == "ok", errors.decode()
    assert requests == []


def test_the_process_has_one_durable_runner() -> None:
    AgentLoop(OneModel(ScriptedModel([])), settings())
    runner = get_default_agent_runner()
    AgentLoop(OneModel(ScriptedModel([])), settings())
    assert get_default_agent_runner() is runner
    assert isinstance(runner, DurableRunner)
