"""When actions fire: the facts of a run, held against the triggers of its plan.

Leans on the contract of durable code: each firing is a hidden child task whose path is made of
the action's place in the plan and of what it fired on, so a replay finds it and fires nothing
twice. Refuses to know plans, expressions (it is given ``render``) and what the actions do.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, cast

import anyio
import anyio.abc

from agent_server.actions.handler import Actions
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError, RunError, error_info
from agent_server.domain.events import ActionCompleted, ActionFailed, ActionTriggered
from agent_server.domain.plans import PlanAction
from agent_server.execution.ports import (
    Journal,
    LostLease,
    RunSnapshot,
    Suspend,
    TaskContext,
    TaskOutcome,
    TaskSpec,
)

KIND = "action"
"""The kind of the child tasks that carry actions out."""

TASK_EVENTS = ("task.completed", "task.failed", "task.skipped")
RUN_EVENTS = ("plan.created", "plan.revised", "run.succeeded", "run.failed")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.@-]+")

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

    ``async with firing:`` around the work; ``firing.watch(ctx)`` is a context that fires on the
    tasks that run through it; ``fire`` says what else happened. Actions run side by side and hold
    nothing up; leaving the block waits for them. An action's failure is its own.
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
        if error is not None and not isinstance(error, RunError):
            group.cancel_scope.cancel()  # cancelled, suspended or taken over: replay goes on
        await group.__aexit__(None, None, None)
        if error is None and self._trouble:
            raise self._trouble[0]

    def watch(self, ctx: TaskContext) -> TaskContext:
        """``ctx``, whose children fire ``task.*`` triggers when they end."""
        return cast(TaskContext, _Watched(ctx, self._ended))

    def fire(self, kind: str, *, node: str | None = None, at: str = "run", **facts: Any) -> None:
        """``kind`` happened; ``at`` is where, as a path. Returns at once."""
        event = {"type": kind, "node": node, **facts}
        for number, action in enumerate(self._actions, start=1):
            if action.trigger not in (kind, f"{kind}:{node}"):
                continue
            group = self._group
            assert group is not None, "fire inside the block"
            generation = "" if self._generation == 1 else f"r{self._generation}/"
            where = _UNSAFE.sub("_", f"{at}" if kind in TASK_EVENTS else kind)
            path = f"action/{generation}{number}/{where}"
            group.start_soon(self._run, self._spec(path, action, event))

    def _ended(self, spec: TaskSpec, outcome: TaskOutcome) -> None:
        if spec.hidden or outcome.status == "cancelled":
            return
        self._nodes[spec.node] = outcome_facts(outcome)
        kind = {"succeeded": "task.completed", "failed": "task.failed", "skipped": "task.skipped"}
        self.fire(
            kind[outcome.status],
            node=spec.node,
            at=spec.path,
            path=spec.path,
            **outcome_facts(outcome),
        )

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


def outcome_facts(outcome: TaskOutcome) -> JsonObject:
    """How a task ended, as expressions see it."""
    return {
        "status": outcome.status,
        "output": outcome.output,
        "error": outcome.error.model_dump(mode="json") if outcome.error else None,
    }


class _Watched:
    """A ``TaskContext`` that tells of its children's ends; everything else is the inner one's."""

    def __init__(self, inner: TaskContext, ended: Callable[[TaskSpec, TaskOutcome], None]) -> None:
        self._inner = inner
        self._ended = ended

    @property
    def run(self) -> RunSnapshot:
        return self._inner.run

    @property
    def journal(self) -> Journal:
        return self._inner.journal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        outcome = await self._inner.child(spec)
        self._ended(spec, outcome)
        return outcome

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        await self._inner.skip(spec, reason)
        self._ended(spec, TaskOutcome(status="skipped"))

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        return await self._inner.value(key, make)


class ActionTask:
    """The handler of ``action`` tasks: says that the action fires, runs it, says how it ended.

    Each of the two events is stored in one transaction with a ledgered value, so that a replay
    neither repeats nor loses it. The task itself succeeds even if the action fails.
    """

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    async def __call__(self, ctx: TaskContext) -> Any:
        action: str = ctx.payload["action"]
        trigger: str = ctx.payload["trigger"]

        async def triggered() -> Any:
            ctx.journal.emit(ActionTriggered(action=action, trigger=trigger, path=ctx.path))
            return True

        async def ended() -> Any:
            status: Literal["succeeded", "failed"]
            try:
                output, status = await self._carry_out(ctx), "succeeded"
            except (Suspend, LostLease):
                raise
            except Exception as error:  # here a failure is recorded, a plugin's own included
                output, status = error_info(error).model_dump(mode="json"), "failed"
                ctx.journal.emit(
                    ActionFailed(
                        action=action, trigger=trigger, path=ctx.path, error=error_info(error)
                    )
                )
            else:
                ctx.journal.emit(
                    ActionCompleted(action=action, trigger=trigger, path=ctx.path, output=output)
                )
            return {"status": status, "result": output}

        await ctx.value("triggered", triggered)
        return await ctx.value("ended", ended)

    async def _carry_out(self, ctx: TaskContext) -> Any:
        stored = ctx.payload.get("error")
        if stored is not None:
            raise RunError(stored["message"], hint=stored.get("hint"))
        name: str = ctx.payload["action"]
        parameters: JsonObject = ctx.payload["parameters"]
        faults = self._actions.faults(name, parameters, rendered=True)
        if faults:
            raise RunError(
                f"The parameters of the action {name!r} are not valid: "
                + "; ".join(f"{fault.path}: {fault.message}" for fault in faults),
                errors=faults,
            )
        return await self._actions.get(name).handle(ctx, parameters, ctx.payload["event"])
