"""The handlers of workflows: a run of one, and the tasks that its nodes become.

Leans on the interpreter, on the handlers of agents and actions, and on the durable tool call that
it is lent. Refuses to know where agents and tools come from and how a task is stored.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
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
    WorkflowLimit,
)
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.execution.ports import Handler, TaskContext
from agent_server.workflow.calls import MAX_CHAIN, reference_to, split_name
from agent_server.workflow.expressions import render
from agent_server.workflow.failures import error_of, timed_out
from agent_server.workflow.interpreter import run_workflow
from agent_server.workflow.leaves import ACTION_KIND, FAULT_KIND, PAUSE_KIND
from agent_server.workflow.ports import NoStoredWorkflows, StoredWorkflows
from agent_server.workflow.standing import approval, pause, wait
from agent_server.workflow.steps import MAX_NODES, Trees
from agent_server.workflow.undo import undo, undo_all, undoing_for
from agent_server.workflow.validation import check_inputs, validate


class WorkflowRun:
    """Carries a workflow out: the root of a run of one, or the task of a ``workflow`` node.

    The definition and the inputs are checked again, without the names of agents and tools: those
    were checked when the run was submitted, and a run under way must not end because one is gone
    that it no longer needs. The stored definitions that a run names were written down in its own
    when it was submitted, so that a change to one never touches a run under way; what else it
    comes to name is looked up once and kept in the ledger.
    """

    def __init__(
        self, *, max_parallel: int, stored: StoredWorkflows, max_nodes: int = MAX_NODES
    ) -> None:
        self._max_parallel = max_parallel
        self._stored = stored
        self._trees = Trees(max_nodes)

    async def root(self, ctx: TaskContext) -> Any:
        """The root handler: its output is the run's."""
        request = ctx.run.request
        return await self._run(ctx, request.workflow, None, request.variables, ())

    async def inner(self, ctx: TaskContext) -> Any:
        """The handler of ``workflow`` nodes. The payload: ``workflow``, ``version``, ``input`` and
        ``chain``, the workflows that it stands in."""
        told = ctx.payload
        chain = tuple(told.get("chain") or ())
        return await self._run(ctx, told["workflow"], told.get("version"), told.get("input"), chain)

    async def undo(self, ctx: TaskContext) -> list[FieldError]:
        """Undo what the task's nodes have done: see ``ports.Handler``."""
        return await undo(ctx, max_parallel=self._max_parallel)

    async def _run(
        self,
        ctx: TaskContext,
        workflow: str | JsonObject | None,
        version: str | int | None,
        variables: JsonObject | None,
        chain: tuple[str, ...],
    ) -> Any:
        is_stored = isinstance(workflow, str)
        if isinstance(workflow, str):
            name, wanted = split_name(workflow, version)
            workflow = _held(ctx, name, wanted) or await ctx.value(
                "definition", partial(self._stored.definition, ctx.run.tenant, name, wanted)
            )
        definition = validate(inline(workflow), under_way=True)
        whole = f"{name}@{definition.version}" if is_stored else definition.name
        chain = _chained(chain, whole, is_stored=is_stored)
        inputs = check_inputs(definition, variables)
        firing = ActionFiring(ctx, render, inputs)
        firing.arm(definition.actions)
        async with firing:
            try:
                before = undoing_for(ctx)
                if before is not None:
                    raise before
                with self._trees.steps(ctx.run.id, ctx.path) as steps:
                    output = await run_workflow(
                        ctx,
                        definition,
                        inputs,
                        max_parallel=self._max_parallel,
                        path_prefix=ctx.path,
                        observer=firing,
                        steps=steps,
                        chain=chain,
                        undo=partial(undo, ctx, max_parallel=self._max_parallel),
                    )
            except RunError as error:
                await undo_all(ctx, error, max_parallel=self._max_parallel)
                if isinstance(error, (BudgetExceeded, RunCancelled)):
                    raise
                firing.fire("run.failed", error=error.info().model_dump(mode="json"))
                raise
            firing.fire("run.succeeded", output=output)
            return output


def _held(ctx: TaskContext, name: str, version: str | None) -> JsonObject | None:
    """The definition as the run's own holds it, if it does."""
    workflow = ctx.run.request.workflow
    held = workflow.get("workflows") if isinstance(workflow, dict) else None
    found: JsonObject | None = (held or {}).get(reference_to(name, version))
    return found


def _chained(chain: tuple[str, ...], name: str, *, is_stored: bool) -> tuple[str, ...]:
    """``chain`` with ``name`` behind it. Raises ``WorkflowLimit`` where it would have no end."""
    longer = (*chain, name)
    if is_stored and name in chain:
        raise WorkflowLimit(
            f"The workflow calls itself: {' → '.join(longer)}.",
            hint="Use a loop, whose bound says how often it may go round.",
        )
    if len(longer) > MAX_CHAIN:
        raise WorkflowLimit(
            f"More than {MAX_CHAIN} workflows stand inside each other: {' → '.join(longer)}.",
            hint="Put the inner ones' nodes into the outer ones.",
        )
    return longer


def inline(
    workflow: str | JsonObject | WorkflowDefinition | None,
) -> JsonObject | WorkflowDefinition:
    """The definition in a request. Raises ``InvalidWorkflow`` for a name."""
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


async def fault(ctx: TaskContext) -> None:
    """The handler that records a failure. The payload: ``error``."""
    raise error_of(ctx.payload["error"])


def timed(handler: Handler) -> Handler:
    """``handler`` that keeps the ``timeout_s`` of its payload, if there is one. After a crash the
    time begins again."""

    def within(ctx: TaskContext) -> Awaitable[Any]:
        timeout_s = ctx.payload.get("timeout_s")
        return handler(ctx) if timeout_s is None else bounded(ctx, timeout_s)

    async def bounded(ctx: TaskContext, timeout_s: float) -> Any:
        with anyio.move_on_after(timeout_s):
            return await handler(ctx)
        raise timed_out(ctx.node, timeout_s)

    return within


class Undoable:
    """A handler, and how what it has done is undone."""

    def __init__(
        self, handler: Handler, undo: Callable[[TaskContext], Awaitable[list[FieldError]]]
    ) -> None:
        self._handler = handler
        self.undo = undo

    async def __call__(self, ctx: TaskContext) -> Any:
        return await self._handler(ctx)


def handlers(
    *,
    agent: Handler,
    call_tool: ToolCaller,
    actions: Actions,
    max_parallel: int,
    max_nodes: int = MAX_NODES,
    stored: StoredWorkflows | None = None,
) -> Mapping[str, Handler]:
    """Every kind of task that workflows need, by name. ``agent`` is the handler of agent tasks."""
    workflows = WorkflowRun(
        max_parallel=max_parallel, stored=stored or NoStoredWorkflows(), max_nodes=max_nodes
    )
    return {
        "run.workflow": Undoable(workflows.root, workflows.undo),
        "workflow": Undoable(timed(workflows.inner), workflows.undo),
        "agent": timed(agent),
        "tool": timed(ToolTask(call_tool)),
        ACTION_KIND: timed(ActionNodeTask(actions)),
        PAUSE_KIND: pause,
        FAULT_KIND: fault,
        "wait": wait,
        "approval": approval,
    }
