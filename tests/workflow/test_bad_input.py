"""What would never end, or cannot be right, over HTTP: its node fails clearly, the failure is a task and an
event of the run, and the node's policy is applied."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from agent_server.client import AgentServerClient
from tests.api import gates
from tests.workflow.kit import carried_out, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
HUGE = 999_999_999
STEP = {"id": "i", "type": "set", "variables": {"y": 1}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentServerClient]:
    async with serving(tmp_path_factory.mktemp("bad")) as (client, _):
        yield client


def setting(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "set", "variables": {"x": value}, **more}


def calling(tool: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool", "tool": tool, **more}


def mapping(**more: Any) -> dict[str, Any]:
    return {"type": "map", "over": "inputs.n", "nodes": [STEP], **more}


def looping(**more: Any) -> dict[str, Any]:
    return {"type": "loop", "while": "inputs.n > 0", "max_iterations": 3, "nodes": [STEP], **more}


TALL = "{{ inputs.n ** inputs.n ** inputs.n }}"
LONG = {"value": "{{ 'x' * inputs.n }}"}
LARGE = "{{ inputs.big + inputs.big }}"
UNLIKE = calling("broken", when="inputs.n > 'x'")


@pytest.mark.parametrize(
    ("node", "code", "words", "path"),
    [
        (setting(TALL), "expression_error", "a power is too large", "1"),
        (setting(LARGE), "expression_error", "over 1000000 characters", "1"),
        (calling("echo", arguments=LONG), "expression_error", "text is not a number", "1"),
        (UNLIKE, "expression_error", "not supported", "1"),
        (mapping(), "expression_error", "which gives int, not a list", "1"),
        (looping(), "loop_bound", "would go on after 3 iterations", "1"),
        (
            {"type": "branch", "cases": [{"when": "inputs.n.m", "nodes": [STEP]}]},
            "expression_error",
            "has no 'm'",
            "1",
        ),
        (
            mapping(over=[1, 2], nodes=[{**calling("broken"), "id": "i"}])
            | {"on_item_error": "drop", "max_failures": 1},
            "task_failed",
            "2 of the 2 items",
            "1",
        ),
        (
            {"type": "parallel", "branches": [[calling("hold", id="h")]], "timeout_s": 0.1},
            "task_timeout",
            "was not done after 0.1 s",
            "1",
        ),
        (
            calling("echo", arguments={"value": "{{ inputs.big }}"}, output="kept"),
            "expression_error",
            "The variable 'kept'",
            "1.0",
        ),
    ],
)
async def test_it_fails_its_node_is_recorded_and_its_policy_is_applied(
    client: AgentServerClient, node: dict[str, Any], code: str, words: str, path: str
) -> None:
    gates.current.append(gates.Gate())
    after = {**calling("echo"), "id": "z", "arguments": {"value": "{{ nodes.n.error.code }}"}}
    given = {"n": HUGE, "big": "x" * 1_010_000}
    try:
        for policy in ("continue", "fail"):
            made = {"name": "w", "nodes": [{**node, "id": "n", "on_error": policy}, after]}
            run = await carried_out(client, made, **given)
            tasks = {task.path: task for task in await client.runs.tasks(run.id)}
            assert tasks[path].status == "failed" and tasks[path].node == "n", tasks
            error = tasks[path].error
            assert error is not None and (error.code, words in error.message) == (code, True), error
            events = await client.runs.stored_events(run.id)
            failed = [e for e in events if e.type == "task.failed" and e.node == "n"]
            assert [e.error.code for e in failed] == [code]
            if policy == "continue":
                assert (run.status.value, run.output) == ("succeeded", code)
            else:
                assert run.status.value == "failed" and "z" not in {t.node for t in tasks.values()}
                assert run.error is not None and words in run.error.message
    finally:
        gates.current.pop()


async def test_each_attempt_that_fails_is_recorded(client: AgentServerClient) -> None:
    node = looping(id="n", retry={"max_attempts": 2, "on": ["loop_bound"]})
    run = await carried_out(client, {"name": "w", "nodes": [node]}, n=1)
    found = {t.path: t.status for t in await client.runs.tasks(run.id)}
    assert found == {"1": "failed", "1@2": "failed"}
    graph = {n.id: n.status for n in (await client.runs.graph(run.id)).nodes}
    assert graph["n"] == "failed"


async def test_a_time_that_is_up_while_undoing_is_told_and_the_rest_is_undone(
    client: AgentServerClient,
) -> None:
    gates.current.append(gates.Gate())
    undo = [{**calling("echo"), "id": "undone", "arguments": {"value": "x"}}]
    slow = [{**calling("hold"), "id": "slow", "timeout_s": 0.1}]
    nodes = [
        {**calling("echo"), "id": "a", "arguments": {"value": "x"}, "compensate": undo},
        {**calling("echo"), "id": "b", "arguments": {"value": "x"}, "compensate": slow},
        {**calling("broken"), "id": "c"},
    ]
    try:
        run = await carried_out(client, {"name": "w", "nodes": nodes})
    finally:
        gates.current.pop()
    tasks = {t.path: t for t in await client.runs.tasks(run.id)}
    assert (tasks["2!.1"].status, tasks["1!.1"].status) == ("failed", "succeeded")
    assert tasks["2!.1"].error is not None and tasks["2!.1"].error.code == "task_timeout"
    assert run.error is not None and "'b' could not be undone" in str(run.error.hint)
