"""A journal and a task context that live in memory: for runs that store nothing, and for tests.

Leans on the ports alone and keeps their promises within one process. Refuses to survive it:
what is recorded here ends with the object.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import BudgetExceeded, InternalError, error_info
from agent_server.domain.events import (
    EventBase,
    MessageDelta,
    StepCompleted,
    StepFailed,
    StepInDoubt,
    StepStarted,
    TaskSkipped,
)
from agent_server.domain.ids import RunId, TaskId, task_id
from agent_server.domain.runs import Budget, Usage
from agent_server.execution.ports import (
    Handler,
    RunSnapshot,
    StepRecord,
    Suspend,
    TaskOutcome,
    TaskSpec,
)

OnEvent = Callable[[EventBase], None]
"""Is handed each event as it happens, deltas included. Must not block and must not raise."""


class EphemeralJournal:
    """See ``ports.Journal``: kept in memory, every commit a no-op.

    ``recorded`` are steps of an earlier attempt, oldest first. ``usage`` sums what finished here.
    """

    stores = False

    def __init__(
        self,
        run_id: RunId,
        *,
        scope: str = "",
        task: TaskId | None = None,
        on_event: OnEvent | None = None,
        recorded: Iterable[StepRecord] = (),
        budget: Budget | None = None,
    ) -> None:
        self.run_id = run_id
        self.task_id = task
        self.scope = scope
        self.usage = Usage()
        self._on_event = on_event
        self._steps = {step.key: step for step in recorded}
        self._budget = budget
        self._under_way = {"model": 0, "tool": 0}
        self._along: dict[str, tuple[EventBase, ...]] = {}
        self._seq = 0

    def key(self, *parts: str) -> str:
        return "/".join((self.scope, *parts) if self.scope else parts)

    def recorded(self, prefix: str = "") -> Mapping[str, StepRecord]:
        if not prefix:
            return dict(self._steps)
        return {key: step for key, step in self._steps.items() if key.startswith(prefix)}

    def emit(self, event: EventBase) -> None:
        self._seq += 1
        self._hand_over(event, self._seq)

    def delta(self, step: str, agent: str | None, text: str) -> None:
        if self._on_event is not None:
            self._hand_over(MessageDelta(step=step, agent=agent, text=text), None)

    async def begin(self, step: StepRecord, *, commit: bool) -> None:
        self._reserve(step.kind)
        self._steps[step.key] = step
        if step.kind != "value":
            self._under_way[step.kind] += 1
            self.emit(
                StepStarted(
                    step=step.key,
                    kind=step.kind,
                    name=step.name,
                    agent=step.agent,
                    input=step.input if step.kind == "tool" else None,
                )
            )

    async def finish(self, step: StepRecord, *, commit: bool = True) -> None:
        self._steps[step.key] = step
        self.usage = add_usage(self.usage, step.usage)
        for event in self._along.pop(step.key, ()) if step.status == "done" else ():
            self.emit(event)
        if step.kind == "value":
            return
        self._under_way[step.kind] = max(0, self._under_way[step.kind] - 1)
        ended = step.ended_at or step.started_at
        took = int((ended - step.started_at).total_seconds() * 1000)
        if step.error is not None:
            self.emit(
                StepFailed(
                    step=step.key,
                    kind=step.kind,
                    name=step.name,
                    agent=step.agent,
                    error=step.error,
                    duration_ms=took,
                )
            )
            return
        self.emit(
            StepCompleted(
                step=step.key,
                kind=step.kind,
                name=step.name,
                agent=step.agent,
                usage=step.usage,
                duration_ms=took,
                output=step.output if step.kind == "tool" else None,
            )
        )

    def along(self, key: str, write: Callable[[Any], object], *events: EventBase) -> None:
        self._along[key] = events

    async def in_doubt(self, step: StepRecord, detail: str) -> None:
        self.emit(StepInDoubt(step=step.key, kind=step.kind, name=step.name, detail=detail))

    async def flush(self) -> None:
        return None

    def _hand_over(self, event: EventBase, seq: int | None) -> None:
        if self._on_event is not None:
            changes = {"run_id": self.run_id, "task_id": self.task_id, "seq": seq}
            self._on_event(event.model_copy(update=changes))

    def _reserve(self, kind: str) -> None:
        """Raise ``BudgetExceeded`` when one more call, beside those under way, is one too many."""
        budget, used = self._budget, self.usage
        if budget is None or kind == "value":
            return
        limits: list[tuple[str, Any, Any]] = [
            ("max_tokens", used.input_tokens + used.output_tokens, budget.max_tokens),
            ("max_cost_usd", used.cost_usd or Decimal(0), budget.max_cost_usd),
        ]
        if kind == "model":
            calls = used.model_calls + self._under_way[kind]
            limits.append(("max_model_calls", calls, budget.max_model_calls))
        else:
            calls = used.tool_calls + self._under_way[kind]
            limits.append(("max_tool_calls", calls, budget.max_tool_calls))
        for name, amount, maximum in limits:
            if maximum is not None and amount >= maximum:
                raise BudgetExceeded(
                    f"The run's budget {name}={maximum} is used up ({amount}).",
                    hint=f"Submit the run again with a larger {name}.",
                )


class EphemeralContext:
    """See ``ports.TaskContext``: children run at once, in this process, by ``handlers``.

    A child that suspends cannot be woken here, so its outcome is a failure that says so.
    """

    def __init__(
        self,
        run: RunSnapshot,
        *,
        handlers: Mapping[str, Handler] | None = None,
        on_event: OnEvent | None = None,
        journal: EphemeralJournal | None = None,
        path: str = "",
        node: str = "",
        payload: JsonObject | None = None,
        attempt: int = 1,
    ) -> None:
        self.run = run
        self.path = path
        self.node = node
        self.payload = payload or {}
        self.attempt = attempt
        self.journal = journal or EphemeralJournal(
            run.id,
            scope=path,
            task=task_id(run.id, path) if path else None,
            on_event=on_event,
            budget=run.budget,
        )
        self._handlers = handlers or {}
        self._on_event = on_event
        self._children: dict[str, TaskOutcome] = {}

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        if spec.path not in self._children:
            self._children[spec.path] = await self._carry_out(spec)
        return self._children[spec.path]

    async def _carry_out(self, spec: TaskSpec) -> TaskOutcome:
        context = EphemeralContext(
            self.run,
            handlers=self._handlers,
            on_event=self._on_event,
            path=spec.path,
            node=spec.node,
            payload=spec.payload,
        )
        try:
            output = await self._handlers[spec.kind](context)
        except Suspend as suspend:
            error = InternalError(f"Task {spec.path!r} would wait: {suspend}")
            return TaskOutcome("failed", error=error_info(error))
        except Exception as error:
            return TaskOutcome("failed", error=error_info(error))
        return TaskOutcome("succeeded", output=output)

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        if spec.path not in self._children:
            self._children[spec.path] = TaskOutcome("skipped")
            self.journal.emit(TaskSkipped(path=spec.path, node=spec.node, reason=reason))

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        whole = self.journal.key(key)
        found = self.journal.recorded(whole).get(whole)
        if found is not None and found.status == "done":
            return found.output
        step = StepRecord(key=whole, kind="value", name=key)
        await self.journal.begin(step, commit=False)
        output = await make()
        await self.journal.finish(step.done(output))
        return output


def add_usage(one: Usage, other: Usage) -> Usage:
    """The sum; a cost that is unknown adds nothing."""
    costs = [usage.cost_usd for usage in (one, other) if usage.cost_usd is not None]
    return Usage(
        model_calls=one.model_calls + other.model_calls,
        tool_calls=one.tool_calls + other.tool_calls,
        input_tokens=one.input_tokens + other.input_tokens,
        output_tokens=one.output_tokens + other.output_tokens,
        cost_usd=sum(costs, Decimal(0)) if costs else None,
    )
