"""When actions fire: the facts of a run, held against the triggers of its plan.

Leans on the contract of durable code: each firing is a hidden child task whose path is made of
the action's place in the plan and of what it fired on, so a replay finds it and fires nothing
twice. Refuses to know plans, expressions (it is given ``render``) and what the actions do.
"""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import anyio
import anyio.abc

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError, ErrorInfo
from agent_server.domain.plans import PlanAction
from agent_server.domain.workflows import LEAF_TYPES, Node
from agent_server.execution.ports import LostLease, Suspend, TaskContext, TaskSpec

KIND = "action"
"""The kind of the child tasks that carry actions out."""

TASK_EVENTS = ("task.completed", "task.failed", "task.skipped")
RUN_EVENTS = ("plan.created", "plan.revised", "run.succeeded", "run.failed")
_STATUS = dict(zip(TASK_EVENTS, ("succeeded", "failed", "skipped"), strict=True))

Render = Callable[[Any, Mapping[str, Any]], Any]
"""Fills the ``{{ … }}`` of a JSON value from the given names. Raises ``RunError``."""


def trigger_fault(trigger: str, nodes: Sequence[str]) -> str | None:
    """What is wrong with ``trigger`` in a run that has ``nodes``, or None."""
    kind, colon, node = trigger.partition(":")
    if kind not in TASK_EVENTS + RUN_EVENTS:
        return f"unknown trigger {trigger!r}; there are {', '.join(TASK_EVENTS + RUN_EVENTS)}"
    if colon and kind not in TASK_EVENTS:
        return f"{kind!r} takes no task, found {trigger!r}"
    if colon and node not in nodes:
        return f"the trigger {trigger!r} names a task that is not in the plan"
    return None


class ActionFiring:
    """Fires a run's actions beside its work, and waits for them before the run ends.

    ``async with firing:`` around the work; it is the interpreter's ``observer``, and ``fire`` says
    what else happened. A task that is tried again fires when it has ended for good. Actions run
    side by side and hold nothing up; leaving the block waits for them. An action's failure is its
    own.
    """

    def __init__(self, ctx: TaskContext, render: Render, inputs: JsonObject | None = None) -> None:
        self._ctx = ctx
        self._render = render
        self._inputs = inputs or {}
        self._nodes: dict[str, JsonObject] = {}
        self._actions: tuple[PlanAction, ...] = ()
        self._generation = 1
        self._group: anyio.abc.TaskGroup | None = None
        self._trouble: list[Exception] = []

    def arm(self, actions: Sequence[PlanAction], generation: int = 1) -> None:
        """From now on these actions count. A revised plan's are another ``generation``, so that
        its first action is not mistaken for the first of the plan before."""
        self._actions = tuple(actions)
        self._generation = generation

    async def __aenter__(self) -> "ActionFiring":
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        group, self._group = self._group, None
        assert group is not None
        if error is not None and (
            not isinstance(error, Exception) or isinstance(error, (Suspend, LostLease))
        ):
            group.cancel_scope.cancel()  # cancelled, standing still or taken over: no end yet
        await group.__aexit__(None, None, None)
        if error is None and self._trouble:
            raise self._trouble[0]

    def fire(self, kind: str, **facts: Any) -> None:
        """``kind`` happened in the run, with what there is to say of it. Returns at once."""
        self._fire(kind, None, kind, True, facts)

    # The interpreter's observer: called again on replay, and then the path is the same.

    async def node_completed(self, node: Node, path: str, output: Any) -> None:
        self._ended("task.completed", node, path, output, None)

    async def node_failed(self, node: Node, path: str, error: ErrorInfo) -> None:
        self._ended("task.failed", node, path, None, error)

    async def node_skipped(self, node: Node, path: str, reason: str) -> None:
        self._ended("task.skipped", node, path, None, None)

    def _ended(
        self, kind: str, node: Node, path: str, output: Any, error: ErrorInfo | None
    ) -> None:
        facts: JsonObject = {
            "status": _STATUS[kind],
            "output": output,
            "error": None if error is None else error.model_dump(mode="json"),
        }
        self._nodes[node.id] = facts
        is_task = isinstance(node, LEAF_TYPES)
        self._fire(kind, node.id, path, is_task, {"path": path, **facts})

    def _fire(
        self, kind: str, node: str | None, where: str, is_task: bool, facts: JsonObject
    ) -> None:
        for number, action in enumerate(self._actions, start=1):
            if action.trigger != f"{kind}:{node}" and not (is_task and action.trigger == kind):
                continue
            assert self._group is not None, "fire inside the block"
            generation = "" if self._generation == 1 else f"r{self._generation}/"
            inside = f"{self._ctx.path}/" if self._ctx.path else ""
            path = f"{inside}action/{generation}{number}/{where}"
            event: JsonObject = {"type": kind, "node": node, **facts}
            self._group.start_soon(self._run, self._spec(path, action, event))

    def _spec(self, path: str, action: PlanAction, event: JsonObject) -> TaskSpec:
        payload: JsonObject = {"action": action.action, "trigger": action.trigger, "event": event}
        names = {"event": event, "inputs": self._inputs, "nodes": dict(self._nodes)}
        try:
            payload["parameters"] = self._render(action.parameters, names)
        except AgentServerError as error:
            payload["error"] = error.info().model_dump(mode="json")
        return TaskSpec(path=path, node=path, kind=KIND, payload=payload, hidden=True)

    async def _run(self, spec: TaskSpec) -> None:
        try:
            await self._ctx.child(spec)
        except Exception as error:  # a lost lease and the like: it is the run's, not the group's
            self._trouble.append(error)
