"""The handlers of workflows: a run of one, and the tasks that its nodes become.

Leans on the interpreter, on the handlers of agents and actions, and on the durable tool call that
it is lent. Refuses to know where agents and tools come from and how a task is stored.
"""

from collections.abc import Mapping
from typing import Any

import anyio

from agent_server.actions.firing import ActionFiring
from agent_server.actions.handler import Actions, ToolCaller
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import (
    BudgetExceeded,
    FieldError,
    InvalidWorkflow,
    RunCancelled,
    RunError,
    TaskTimeout,
)
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.execution.ports import Handler, TaskContext
from agent_server.workflow.expressions import render
from agent_server.workflow.interpreter import ACTION_KIND, PAUSE_KIND, run_workflow
from agent_server.workflow.validation import check_inputs, validate


class WorkflowRun:
    """The root handler of a run of a workflow: its output is the run's.

    The definition and the inputs are checked again, without the names of agents and tools: those
    were checked when the run was submitted, and a run under way must not end because one is gone
    that it no longer needs.
    """

    def __init__(self, *, max_parallel: int) -> None:
        self._max_parallel = max_parallel

    async def __call__(self, ctx: TaskContext) -> Any:
        request = ctx.run.request
        definition = validate(inline(request.workflow))
        inputs = check_inputs(definition, request.variables)
        firing = ActionFiring(ctx, render, inputs)
        firing.arm(definition.actions)
        async with firing:
            try:
                output = await run_workflow(
                    ctx,
                    definition,
                    inputs,
                    max_parallel=self._max_parallel,
                    observer=firing,
                )
            except (BudgetExceeded, RunCancelled):
                raise
            except RunError as error:
                firing.fire("run.failed", error=error.info().model_dump(mode="json"))
                raise
            firing.fire("run.succeeded", output=output)
            return output


def inline(
    workflow: str | JsonObject | WorkflowDefinition | None,
) -> JsonObject | WorkflowDefinition:
    """The definition in a request. Raises ``InvalidWorkflow`` for a name: none are stored."""
    if isinstance(workflow, (dict, WorkflowDefinition)):
        return workflow
    raise InvalidWorkflow(
        f"There is no stored workflow {workflow!r}.",
        hint="Send the definition itself as 'workflow'.",
        errors=[FieldError(path="/workflow", message="it is not a definition")],
    )


class ToolTask:
    """The handler of ``tool`` tasks. The payload: ``tool`` (a name) and ``arguments``."""

    def __init__(self, call_tool: ToolCaller) -> None:
        self._call = call_tool

    async def __call__(self, ctx: TaskContext) -> Any:
        name: str = ctx.payload["tool"]
        arguments: JsonObject = ctx.payload.get("arguments") or {}
        return await self._call(ctx, name, arguments, key="tool/1")


class ActionNodeTask:
    """The handler of a workflow's ``action`` nodes: unlike an action that a trigger fires, its
    failure is the node's. The payload: ``action`` (a name) and ``parameters``."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    async def __call__(self, ctx: TaskContext) -> Any:
        name: str = ctx.payload["action"]
        parameters: JsonObject = ctx.payload.get("parameters") or {}
        faults = self._actions.faults(name, parameters, rendered=True)
        if faults:
            raise RunError(
                f"The parameters of the action {name!r} are not valid: "
                + "; ".join(f"{fault.path}: {fault.message}" for fault in faults),
                errors=faults,
            )
        event = {"type": "node", "node": ctx.node, "path": ctx.path}
        return await self._actions.get(name).handle(ctx, parameters, event)


async def pause(ctx: TaskContext) -> None:
    """The handler of the wait before another attempt. The payload: ``delay_s``."""
    await anyio.sleep(float(ctx.payload["delay_s"]))


def timed(handler: Handler) -> Handler:
    """``handler`` that keeps the ``timeout_s`` of its payload, if there is one. After a crash the
    time begins again."""

    async def within(ctx: TaskContext) -> Any:
        timeout_s = ctx.payload.get("timeout_s")
        if timeout_s is None:
            return await handler(ctx)
        with anyio.move_on_after(timeout_s):
            return await handler(ctx)
        raise TaskTimeout(
            f"Node {ctx.node!r} was not done after {timeout_s:g} s.",
            hint="Raise its timeout_s, or give it a retry.",
        )

    return within


def handlers(
    *, agent: Handler, call_tool: ToolCaller, actions: Actions, max_parallel: int
) -> Mapping[str, Handler]:
    """Every kind of task that workflows need, by name. ``agent`` is the handler of agent tasks."""
    return {
        "workflow": WorkflowRun(max_parallel=max_parallel),
        "agent": timed(agent),
        "tool": timed(ToolTask(call_tool)),
        ACTION_KIND: timed(ActionNodeTask(actions)),
        PAUSE_KIND: pause,
    }
