"""Recorded runs replay against the present code: no network, no model, and the first difference."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from agent_server.client import AgentServerClient, in_process
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.history import RunExport
from agent_server.inference.providers import Providers
from agent_server.server import create_app
from agent_server.settings import Settings
from agent_server.testing.replay import Checks, Report, as_test, read_export, replayer
from tests.support.durable import RuleModel, call, outputs_of, say

AGENTS = '''
from agents import Agent, Runner, function_tool
from agents.run_context import RunContextWrapper

calls = []


@function_tool
def add(a: int, b: int) -> int:
    """Add."""
    calls.append("add")
    return a + b


@function_tool
async def shout(text: str) -> str:
    """Shout."""
    calls.append("shout")
    return text.upper()


@function_tool
def broken(why: str) -> str:
    """Fails."""
    calls.append("broken")
    raise ValueError(why)


helper = Agent(name="helper", instructions="You help.", tools=[shout])
heavy = Agent(
    name="heavy",
    instructions="You use tools.",
    tools=[add, shout, broken, helper.as_tool("ask_helper", "Ask the helper")],
)
closer = Agent(name="closer", instructions="You close.")
opener = Agent(name="opener", instructions="You open.", tools=[add], handoffs=[closer])
'''


def rule(instructions: str, items: list[Any]) -> Any:
    """Uses many tools, side by side, of which one fails and one is an agent; then says all."""
    asked = max(n for n, item in enumerate(items) if item.get("role") == "user")
    got = outputs_of(items[asked:])
    if instructions == "You help.":
        return [say("helped")] if got else [call("shout", {"text": "help"}, "h1")]
    if instructions == "You open.":
        if not got:
            return [call("add", {"a": 2, "b": 2}, "o1")]
        return [call("transfer_to_closer", {}, "o2")]
    if instructions == "You close.":
        return [say("closed")]
    number = len(items[asked]["content"])
    if not got:
        return [
            call("add", {"a": number, "b": 1}, "c1"),
            call("shout", {"text": "x"}, "c2"),
            call("broken", {"why": "no"}, "c3"),
        ]
    if "c4" not in got:
        return [
            call("ask_helper", {"input": f"case {number}"}, "c4"),
            call("add", {"a": 0, "b": 9}, "c5"),
        ]
    return [say(json.dumps(sorted(str(value) for value in got.values())))]


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(
        _env_file=None,  # type: ignore[call-arg]  # an initialiser's option
        data_dir=folder / "data",
        agents=str(folder / "agents.py"),
        model="demo",
        api_key=SecretStr("a-key-of-the-test"),
        log_level="ERROR",
        **changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "agents.py").write_text(AGENTS)
    return folder


@pytest.fixture(scope="module")
def exports(folder: Path) -> list[RunExport]:
    """Runs of the demo, of agents with many tools, and of workflows of both: 50."""
    return asyncio.run(recorded(folder))


WORKFLOW: dict[str, Any] = {
    "name": "chain",
    "nodes": [
        {"id": "one", "type": "tool", "tool": "add", "arguments": {"a": 1, "b": 2}},
        {"id": "ask", "type": "agent", "agent": "heavy", "input": "{{ nodes.one.output }}"},
        {
            "id": "each",
            "type": "map",
            "over": "[1, 2, 3]",
            "as": "n",
            "nodes": [
                {"id": "plus", "type": "tool", "tool": "add", "arguments": {"a": "{{ n }}", "b": 1}}
            ],
        },
        {
            "id": "no",
            "type": "tool",
            "tool": "broken",
            "arguments": {"why": "x"},
            "on_error": "continue",
        },
    ],
    "actions": [{"trigger": "task.completed:one", "action": "emit", "parameters": {"name": "x"}}],
    "output": "{{ nodes.each.output }}",
}
FAILING = {
    "name": "failing",
    "nodes": [{"id": "no", "type": "tool", "tool": "broken", "arguments": {"why": "x"}}],
}


async def recorded(folder: Path) -> list[RunExport]:
    chosen = settings(folder)
    providers = Providers(chosen)
    providers.register("rule", RuleModel(rule))
    found = []
    async with in_process(create_app(chosen, providers=providers)) as transport:
        async with AgentServerClient(
            "http://localhost", api_key="a-key-of-the-test", transport=transport
        ) as client:
            asked: list[dict[str, Any]] = []
            for number in range(25):
                asked.append({"goal": f"Compare {number} ways to keep notes and recommend one"})
                agent = "opener" if number % 5 == 0 else "heavy"
                session = {"session_id": f"s{number % 3}"} if number % 2 else {}
                asked.append(
                    {"agent": agent, "input": "x" * (number + 1), "model": "rule", **session}
                )
            asked[-2:] = [
                {"workflow": WORKFLOW, "model": "rule"},
                {"workflow": FAILING, "model": "rule"},
            ]
            runs = [await client.runs.create(**one) for one in asked]
            for one, run in zip(asked, runs, strict=True):
                ended = await client.runs.wait(run.id, timeout_s=60)
                assert ended.status.value == ("failed" if one == asked[-1] else "succeeded")
                found.append(await client.runs.export(run.id))
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a replay has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


async def replayed(folder: Path, export: RunExport, code: str = AGENTS) -> Report:
    """Against ``code``, which goes through the file, as an edit does."""
    there = folder / "replayed"
    there.mkdir(exist_ok=True)
    (there / "agents.py").write_text(code)
    async with replayer(settings(there)) as present:
        return await present.replay(export)


async def test_fifty_recorded_runs_replay_without_a_difference_a_network_or_a_model(
    folder: Path, exports: list[RunExport]
) -> None:
    assert len(exports) == 50
    async with replayer(settings(folder)) as present:
        for export in exports:
            stored = RunExport.model_validate_json(export.model_dump_json())
            report = await present.replay(stored)
            assert report.ok, (export.run.kind, report.difference)
            assert report.model_calls == export.run.usage.model_calls
            assert report.tool_calls == export.run.usage.tool_calls
    heavy = [export for export in exports if export.run.agent == "heavy"]
    assert all(export.run.usage.tool_calls >= 6 for export in heavy)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            "tools=[add, shout, broken,",
            "tools=[shout, broken,",
            "calls 'add', which 'heavy' no longer has",
        ),
        ('"You use tools."', '"You use few tools."', "instructions of 'heavy' differ"),
        ('"You help."', '"You help well."', "instructions of 'helper' differ"),
        ('name="heavy",', 'name="heavy", output_guardrails=[],', None),
        ("    return a + b", "    return a - b", None),
        ("helper.as_tool(", "helper.as_tool(custom_output_extractor=extract, tool_name=", None),
    ],
)
async def test_the_first_difference_of_changed_code_is_told(
    folder: Path, exports: list[RunExport], before: str, after: str, says: str | None
) -> None:
    export = next(one for one in exports if one.run.agent == "heavy")
    if "extract" in after:
        code = AGENTS.replace('helper.as_tool("ask_helper", "Ask the helper")', EXTRACTING)
        code = code.replace("heavy = Agent(", EXTRACTOR + "heavy = Agent(")
        says = "the agent 'ask_helper' gives"
    else:
        assert before in AGENTS
        code = AGENTS.replace(before, after)
    report = await replayed(folder, export, code)
    if says is None:
        assert report.ok, report.difference
    else:
        assert report.difference is not None and says in report.difference, report


EXTRACTOR = """
async def extract(result):
    return "extracted otherwise"


"""
EXTRACTING = 'helper.as_tool("ask_helper", "Ask the helper", custom_output_extractor=extract)'


async def test_another_question_more_calls_and_fewer_calls_are_differences(
    folder: Path, exports: list[RunExport]
) -> None:
    export = next(one for one in exports if one.run.agent == "opener")
    other = export.model_copy(update={"request": {**export.request, "input": "something else"}})
    report = await replayed(folder, other)
    assert report.difference is not None
    assert "asked something else in item 1" in report.difference
    assert "something else" in report.difference
    fewer = [step for step in export.steps if step["key"] != "model/3"]
    report = await replayed(folder, export.model_copy(update={"steps": tuple(fewer)}))
    assert report.difference is not None and "once more than recorded" in report.difference
    more = (*export.steps, {**export.steps[-1], "key": "model/9", "input_hash": "0"})
    report = await replayed(folder, export.model_copy(update={"steps": more}))
    assert report.difference is not None and "model/9" in report.difference
    output = export.run.model_copy(update={"output": "another end"})
    report = await replayed(folder, export.model_copy(update={"run": output}))
    assert report.difference is not None and "the output is" in report.difference


async def test_a_goal_whose_plan_is_asked_for_otherwise_differs(
    folder: Path, exports: list[RunExport]
) -> None:
    export = next(one for one in exports if one.run.kind == "goal")
    code = AGENTS.replace('name="closer"', 'name="another-closer"')
    report = await replayed(folder, export, code)
    assert report.difference is not None and "another-closer" in report.difference


async def test_a_workflow_whose_definition_or_tool_changed_differs(
    folder: Path, exports: list[RunExport]
) -> None:
    export = exports[-2]
    assert export.run.kind == "workflow" and export.run.output == [2, 3, 4]
    nodes = [dict(node) for node in WORKFLOW["nodes"]]
    nodes[0] = {**nodes[0], "arguments": {"a": 1, "b": 3}}
    changed = {**export.request, "workflow": {**WORKFLOW, "nodes": nodes}}
    report = await replayed(folder, export.model_copy(update={"request": changed}))
    assert report.difference is not None and "task 1 (one)" in report.difference
    gone = (
        AGENTS.replace("def add(", "def plus(").replace("add,", "plus,").replace("[add]", "[plus]")
    )
    report = await replayed(folder, export, gone)
    assert report.difference is not None and "'add'" in report.difference


async def test_checks_ask_for_less_than_everything_and_say_what_fails(
    folder: Path, exports: list[RunExport]
) -> None:
    export = next(one for one in exports if one.run.agent == "heavy")
    code = AGENTS.replace('"You use tools."', '"You use few tools."')
    passing = Checks(
        output_contains="helped",
        output_schema={"type": "string"},
        max_model_calls=9,
        tools=("add", "ask_helper"),
    )
    report = await replayed(folder, as_test(export, passing), code)
    assert report.ok, report
    failing = Checks(
        output_contains="nothing of the kind",
        output_schema={"type": "object"},
        max_model_calls=1,
        max_cost_usd="0.01",
        tools=("ask_helper", "broken"),
    )
    report = await replayed(folder, as_test(export, failing), code)
    assert len(report.failures) == 5 and not report.ok, report.failures
    gone = AGENTS.replace("tools=[add, shout, broken,", "tools=[shout, broken,")
    report = await replayed(folder, as_test(export, passing), gone)
    assert report.difference is not None and "no longer has" in report.difference


async def test_what_cannot_be_replayed_is_refused_with_the_reason(
    folder: Path, exports: list[RunExport], tmp_path: Path
) -> None:
    hidden = exports[0].model_copy(update={"redacted": "content"})
    with pytest.raises(InvalidRequest, match="was taken out"):
        await replayed(folder, hidden)
    file = tmp_path / "run.json"
    for text, says in [
        ("{", "cannot be read as JSON"),
        ("[]", "is not an exported run"),
        ('{"format": "agent-server.run", "version": 99}', "has the version 99"),
        ('{"format": "agent-server.run", "version": 1}', "is damaged at"),
    ]:
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=says):
            read_export(file)
    file.write_text(exports[0].model_dump_json())
    assert read_export(file).run == exports[0].run
