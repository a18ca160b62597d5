"""A run of a workflow through its handlers, with everything in memory."""

import asyncio
from typing import Any

import pytest
import yaml

from agent_server.actions.handler import Actions, ActionServices
from agent_server.actions.ssrf import GuardedHttp
from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    BudgetExceeded,
    InvalidRequest,
    TaskTimeout,
    ToolError,
    UnknownTool,
    UnknownWorkflow,
)
from agent_server.domain.ids import DEFAULT_TENANT, new_run_id
from agent_server.domain.runs import RunRequest
from agent_server.execution.ephemeral import EphemeralContext
from agent_server.execution.ports import RunSnapshot, TaskContext, TaskOutcome, TaskSpec
from agent_server.workflow.failures import NodeFailed
from agent_server.workflow.tasks import handlers

from .test_interpreter import TRIAGE, tool


async def call_tool(ctx: TaskContext, name: str, arguments: JsonObject, *, key: str) -> Any:
    assert key == "tool/1"
    if name == "hang":
        await asyncio.Event().wait()
    if name == "costly":
        raise BudgetExceeded("It is spent.")
    if name == "gone":
        raise UnknownTool("There is no tool 'gone'.")
    if name != "add":
        raise ToolError(f"Tool {name!r} failed: boom")
    return arguments["a"] + arguments["b"]


async def agent(ctx: TaskContext) -> Any:
    return {"heard": ctx.payload["input"]}


def context(workflow: Any, variables: JsonObject | None = None) -> tuple[Any, Any]:
    async def no_sleep(seconds: float) -> None:
        return None

    services = ActionServices(http=GuardedHttp(), call_tool=call_tool, sleep=no_sleep)
    kinds = handlers(agent=agent, call_tool=call_tool, actions=Actions(services), max_parallel=10)
    run = RunSnapshot(
        id=new_run_id(),
        tenant=DEFAULT_TENANT,
        request=RunRequest(workflow=workflow, variables=variables),
        created_at=utcnow(),
    )
    return kinds["run.workflow"], EphemeralContext(run, handlers=kinds)


def flow(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "w", "nodes": list(nodes), **fields}


async def test_a_run_of_a_workflow_inline_fills_its_inputs_and_gives_its_output() -> None:
    handler, ctx = context(yaml.safe_load(TRIAGE), {"text": "It burns"})
    assert await handler(ctx) == {"score": 5, "sums": [11, 12, 13], "a": 3}


async def test_inputs_that_do_not_fit_fail_before_anything_runs() -> None:
    handler, ctx = context(yaml.safe_load(TRIAGE), {})
    with pytest.raises(InvalidRequest, match="'text' is a required property"):
        await handler(ctx)


async def test_a_workflow_that_is_only_named_is_not_there() -> None:
    handler, ctx = context("nightly")
    with pytest.raises(UnknownWorkflow, match="no stored workflow 'nightly'"):
        await handler(ctx)


async def test_a_node_that_takes_too_long_fails_and_can_be_retried() -> None:
    handler, ctx = context(
        flow(tool("a", "hang", timeout_s=0.01, retry={"max_attempts": 2, "backoff_s": 0.001}))
    )
    with pytest.raises(NodeFailed) as caught:
        await handler(ctx)
    assert caught.value.error.code == TaskTimeout.code
    assert caught.value.path == "1@2"


async def test_a_tool_that_fails_fails_its_node_with_what_it_said() -> None:
    handler, ctx = context(flow(tool("a", "nothing")))
    with pytest.raises(NodeFailed, match="Node 'a' failed: Tool 'nothing' failed: boom"):
        await handler(ctx)


async def test_what_a_repeat_would_meet_again_is_not_retried() -> None:
    handler, ctx = context(flow(tool("a", "gone", retry={"max_attempts": 3})))
    with pytest.raises(NodeFailed) as caught:
        await handler(ctx)
    assert caught.value.error.code == UnknownTool.code
    assert caught.value.path == "1"


@pytest.mark.parametrize(
    "name, error, fired", [("nothing", NodeFailed, True), ("costly", BudgetExceeded, False)]
)
async def test_a_run_that_spent_its_budget_has_not_failed(
    name: str, error: type[Exception], fired: bool
) -> None:
    actions = [{"trigger": "run.failed", "action": "emit", "parameters": {"event": "e"}}]
    handler, ctx = context(flow(tool("a", name), actions=actions))
    told: list[str] = []
    child = ctx.child

    async def heard(spec: TaskSpec) -> TaskOutcome:
        told.append(spec.kind)
        return await child(spec)

    ctx.child = heard
    with pytest.raises(error):
        await handler(ctx)
    assert ("action" in told) is fired


async def test_an_action_node_does_its_action_and_fails_with_it() -> None:
    call = {"name": "add", "arguments": {"a": "{{ nodes.t.output }}", "b": 1}}
    node = {"id": "n", "type": "action", "action": "tool", "parameters": call}
    handler, ctx = context(flow(tool("t", "add", a=1, b=2), node))
    assert await handler(ctx) == 4
    handler, ctx = context(flow({**node, "parameters": {"arguments": {}}}))
    with pytest.raises(NodeFailed, match="'name' is a required property"):
        await handler(ctx)


async def test_an_approach_node_is_a_task_of_the_generalist() -> None:
    node = {"id": "n", "type": "approach", "approach": "direct", "input": "Why?"}
    handler, ctx = context(flow(node))
    assert await handler(ctx) == {"heard": "Why?"}
