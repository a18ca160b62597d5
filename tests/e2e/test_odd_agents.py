"""Agents that do what nobody should: their runs end clearly, and everybody else's are untouched."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from agent_server.client import AgentServerClient
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, Json, check_totals, curl, parse_sse, types

AGENTS = '''
import asyncio
from typing import Any

from agents import Agent, GuardrailFunctionOutput, Runner, function_tool, output_guardrail


@function_tool
def fails() -> str:
    """Raises."""
    raise RuntimeError("kaput")


@function_tool(failure_error_function=None)
def fails_hard() -> str:
    """Raises, and means it."""
    raise RuntimeError("kaput for good")


@function_tool(timeout=0.2)
async def never() -> str:
    """Does not come back."""
    await asyncio.Event().wait()
    return ""


@function_tool
async def asks(question: str) -> str:
    """Runs an agent by hand."""
    return str((await Runner.run(inner, question)).final_output)


@function_tool
def large() -> str:
    """Says much."""
    return "x" * 3_000_000


@function_tool
def halves() -> Any:
    """Says half a character, as a key and as a text."""
    return {"a\\ud800": "b\\udfff", "nul": "\\0"}


@output_guardrail
def clean(context: Any, agent: Any, said: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info="not clean", tripwire_triggered="dirt" in said)


def no_instructions(context: Any, agent: Any) -> str:
    raise ValueError("no instructions today")


inner = Agent(name="Inner")
tools = [fails, fails_hard, never, asks, large, halves, inner.as_tool("ask_inner", "Asks.")]
odd = Agent(name="Odd", tools=tools, output_guardrails=[clean])
hasty = Agent(name="Hasty", tools=tools, tool_use_behavior="stop_on_first_tool")
mute = Agent(name="Mute", instructions=no_instructions)
'''
INNER = rule("question", {"text": "inner answer"})


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd.py").write_text(AGENTS)
    return House(folder, nursery, models, AGENT_SERVER_AGENTS=str(folder / "odd.py"))


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    assert not api.unended()
    api.http.close()


def carry_out(api: Api, models: ModelThread, *steps: Json, agent: str = "odd") -> Json:
    models.script(INNER, rule("do it", *steps))
    run = api.carry_out(agent=agent, input="do it")
    check_totals(api, run)
    return run


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("fails", {}, "error"),
        ("never", {}, "timed out"),
        ("asks", {"question": "a question"}, "inner answer"),
        ("ask_inner", {"input": "a question"}, "inner answer"),
        ("large", {}, "xxx"),
        ("halves", {}, "\\\\ud800"),
    ],
)
def test_what_a_tool_gives_or_fails_with_is_told_to_the_model(
    api: Api, models: ModelThread, tool: str, arguments: Json, told: str
) -> None:
    run = carry_out(api, models, calling((tool, arguments)), {"text": "so it is"})
    assert (run["status"], run["output"]) == ("succeeded", "so it is"), run["error"]
    assert told in json.dumps(models.calls[-1])
    step = next(s for s in api.steps(run["id"]) if s["kind"] == "tool")
    assert (step["status"], step["name"]) == (
        "failed" if tool in ("fails", "never") else "done",
        tool,
    )


@pytest.mark.parametrize(
    ("agent", "step", "code", "words"),
    [
        ("odd", calling(("fails_hard", {})), "tool_error", "kaput for good"),
        ("odd", {"text": "some dirt"}, "guardrail_tripped", "not clean"),
        ("mute", {"text": "never asked"}, "run_error", "no instructions today"),
        ("odd", {"refusal": "I would rather not"}, "model_error", "I would rather not"),
    ],
)
def test_an_agent_that_fails_says_why_and_what_to_do(
    api: Api, models: ModelThread, agent: str, step: Json, code: str, words: str
) -> None:
    run = carry_out(api, models, step, agent=agent)
    assert (run["status"], run["error"]["code"]) == ("failed", code)
    assert words in run["error"]["message"] and run["error"]["hint"]


def test_sixty_tool_calls_in_one_answer_are_sixty_steps(api: Api, models: ModelThread) -> None:
    calls = calling(*[("fails", {})] * 60)
    run = carry_out(api, models, calls, {"text": "all failed"})
    assert run["status"] == "succeeded" and run["usage"]["tool_calls"] == 60


@pytest.mark.parametrize("agent", ["odd", "hasty"])
async def test_half_a_character_breaks_neither_the_run_nor_any_list_it_is_in(
    api: Api, house: House, models: ModelThread, agent: str
) -> None:
    half = {"text": "half \ud83d, nul \0, whole \U0001f600"}
    steps = [calling(("halves", {}))] if agent == "hasty" else [calling(("halves", {})), half]
    run = carry_out(api, models, *steps, agent=agent)
    assert run["status"] == "succeeded", run["error"]
    if agent == "odd":
        assert run["output"] == half["text"]
    assert run["id"] in {one["id"] for one in api.listed(RUNS)}
    place = f"{api.url}{RUNS}/{run['id']}/events"
    assert types(parse_sse(curl(place))) == types(api.events(run["id"]))
    async with AgentServerClient(api.url) as client:
        last: Any = [event async for event in client.runs.events(run["id"])][-1]
        assert last.output == run["output"] == (await client.runs.get(run["id"])).output
        assert await client.runs.steps(run["id"])
    for argv in (("runs", "show", run["id"]), ("runs", "follow", run["id"]), ("runs", "list")):
        for form in ((), ("--json",)):
            shown = house.run(*argv, *form, "--server", api.url)
            assert shown.exit_code() == 0, shown.output
            assert "Traceback" not in shown.output
    unstored = api.post({"agent": agent, "input": "do it", "store": False}, wait=20).json()
    assert unstored["output"] == run["output"]


def test_half_a_character_in_a_request_is_refused(api: Api) -> None:
    body = b'{"agent": "odd", "input": "half \\ud83d"}'
    answer = api.http.post(RUNS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"
