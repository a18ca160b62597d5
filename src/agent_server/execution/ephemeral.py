"""A journal and a task context that live in memory: for runs that store nothing, and for tests.

Leans on the ports alone and keeps their promises within one process. Refuses to survive it:
what is recorded here ends with the object.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import InternalError, error_info
from agent_server.domain.events import (
    ApprovalRequested,
    BudgetWarning,
    EventBase,
    MessageDelta,
    RunSteered,
    StepCompleted,
    StepFailed,
    StepInDoubt,
    StepStarted,
    TaskSkipped,
)
from agent_server.domain.ids import RunId, TaskId, task_id
from agent_server.domain.runs import Budget, StepKind, Usage, WaitingFor
from agent_server.execution import consent, store
from agent_server.execution.budget import WARN_SHARE, Grant, Reserved, decide, limited, warnings
from agent_server.execution.ports import (
    NO_USAGE,
    ApprovalAsk,
    ApprovalDecision,
    Estimate,
    Fence,
    Handler,
    RunSnapshot,
    SignalReceived,
    StepRecord,
    Suspend,
    TaskOutcome,
    TaskSpec,
)

OnEvent = Callable[[EventBase], None]
"""Is handed each event as it happens, deltas included. Must not block and must not raise."""


class Account:
    """The budget of one run in memory: see ``budget.Meter``, which keeps one in the database."""

    def __init__(self, budget: Budget | None) -> None:
        self.budget = budget
        self.used = SimpleNamespace(**store.NO_USAGE)
        self._held: dict[str, Reserved] = {}
        self._cut_short = False
        self._changed = asyncio.Event()

    async def reserve(
        self, key: str, kind: StepKind, estimate: Estimate | None, spent: Usage = NO_USAGE
    ) -> int | None:
        """Make room for one more call of the step ``key``; see ``Journal.begin`` and ``again``.
        Raises ``BudgetExceeded``."""
        if self.budget is None or not limited(self.budget):
            return None
        before = self._held.get(key)
        calls = 1 if before is None else before.model_calls + before.tool_calls + 1
        if before is not None and estimate is not None and spent.output_tokens:
            self._cut_short = True
            estimate = estimate.after(spent)
            used = spent.input_tokens + spent.output_tokens
            cost = store.pico(spent.cost_usd or Decimal(0))
            self._held[key] = Reserved("value", before.model_calls, 0, used, cost)
            self._changed.set()
        again = before is not None and not spent.output_tokens
        while True:
            others = [held for other, held in self._held.items() if other != key]
            whole = self._cut_short and not again
            found = decide(self.budget, self.used, others, kind, estimate, calls, whole=whole)
            if isinstance(found, Grant):
                break
            if not found.wait or again:
                raise found.error
            self._changed.clear()
            await self._changed.wait()
        self._held[key] = Reserved(
            kind,
            calls if kind == "model" else 0,
            calls if kind == "tool" else 0,
            0 if estimate is None else estimate.tokens,
            0 if estimate is None else store.pico(estimate.cost_usd),
            open_ended=found.open_ended,
        )
        return found.most_output

    def settle(self, key: str, usage: Usage) -> list[BudgetWarning]:
        """The call ended and used ``usage``; what is to be said of the budget."""
        self._held.pop(key, None)
        before = self.used
        more = store.usage_columns(usage)
        self.used = SimpleNamespace(**{n: getattr(before, n) + v for n, v in more.items()})
        self._changed.set()
        if self.budget is None:
            return []
        return warnings(self.budget, before, self.used, WARN_SHARE)

    def cut_off(self, key: str) -> None:
        held = self._held.get(key)
        if held is not None:
            self._held[key] = replace(held, open=False)
            self._changed.set()


class EphemeralJournal:
    """See ``ports.Journal``: kept in memory, every commit a no-op.

    ``recorded`` are steps of an earlier attempt, oldest first. ``usage`` sums what finished here;
    the ``account`` is the whole run's.
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
        account: Account | None = None,
        deltas: bool = True,
    ) -> None:
        self.run_id = run_id
        self.task_id = task
        self.scope = scope
        self.notes: object = None
        self.usage = Usage()
        self._on_event = on_event
        self._deltas = deltas
        self._steps = {step.key: step for step in recorded}
        self.account = account or Account(budget)
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
        if self._on_event is not None and self._deltas:
            self._hand_over(MessageDelta(step=step, agent=agent, text=text), None)

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> int | None:
        most = None
        if step.kind != "value":
            most = await self.account.reserve(step.key, step.kind, estimate)
        self._steps[step.key] = step
        if step.kind != "value":
            self.emit(
                StepStarted(
                    step=step.key,
                    kind=step.kind,
                    name=step.name,
                    agent=step.agent,
                    input=step.input if step.kind == "tool" else None,
                )
            )
        return most

    async def again(
        self, step: StepRecord, estimate: Estimate | None = None, spent: Usage = NO_USAGE
    ) -> int | None:
        return await self.account.reserve(step.key, step.kind, estimate, spent)

    def cut_off(self, step: StepRecord) -> None:
        self.account.cut_off(step.key)

    async def finish(self, step: StepRecord, *, commit: bool = True) -> None:
        self._steps[step.key] = step
        self.usage = add_usage(self.usage, step.usage)
        for event in self._along.pop(step.key, ()) if step.status == "done" else ():
            self.emit(event)
        for warning in self.account.settle(step.key, step.usage):
            self.emit(warning)
        if step.kind == "value":
            return
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
                cached_tokens=step.cached_tokens,
                reasoning_tokens=step.reasoning_tokens,
            )
        )

    def along(self, key: str, write: Callable[[Any], object] | None, *events: EventBase) -> None:
        self._along[key] = events

    async def fence(self) -> Fence:
        return lambda transaction: None  # No erasure finds what is nowhere stored.

    async def in_doubt(self, step: StepRecord, detail: str) -> None:
        self.emit(StepInDoubt(step=step.key, kind=step.kind, name=step.name, detail=detail))

    async def flush(self) -> None:
        return None

    def _hand_over(self, event: EventBase, seq: int | None) -> None:
        if self._on_event is not None:
            changes = {"run_id": self.run_id, "task_id": self.task_id, "seq": seq}
            self._on_event(event.model_copy(update=changes))


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
        steers: list[SignalReceived] | None = None,
    ) -> None:
        """``steers`` is where others put what they say into the run; what it takes is removed."""
        self.run = run
        self._steers = steers if steers is not None else []
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
            path=spec.path,
            node=spec.node,
            payload=spec.payload,
            journal=EphemeralJournal(
                self.run.id,
                scope=spec.path,
                task=task_id(self.run.id, spec.path),
                on_event=self._on_event,
                account=self.journal.account,
            ),
        )
        try:
            output = await self._handlers[spec.kind](context)
        except Suspend as suspend:
            error = InternalError(f"Task {spec.path!r} would wait: {suspend}")
            return TaskOutcome("failed", error=error_info(error))
        except Exception as error:
            return TaskOutcome("failed", error=error_info(error))
        return TaskOutcome("succeeded", output=output)

    async def give_up(self, scopes: tuple[str, ...]) -> None:
        """There was no earlier attempt."""

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        if spec.path not in self._children:
            self._children[spec.path] = TaskOutcome("skipped")
            self.journal.emit(TaskSkipped(path=spec.path, node=spec.node, reason=reason))

    async def wait_signal(
        self,
        name: str,
        *,
        key: str,
        until: datetime | None = None,
        waiting_for: WaitingFor | None = None,
    ) -> SignalReceived | None:
        detail = f"Waits for the signal {name!r}."
        raise Suspend(waiting_for or WaitingFor(kind="signal", detail=detail, until=until))

    async def take_steers(self, *, key: str) -> list[SignalReceived]:
        whole = self.journal.key(key)
        found = self.journal.recorded(whole).get(whole)
        if found is not None:
            return [SignalReceived.read(one) for one in found.output]
        said, self._steers[:] = list(self._steers), []
        for one in said:
            self.journal.emit(
                RunSteered(input=one.payload, steer_id=one.steer_id, by=one.by, sent_at=one.at)
            )
        return said

    async def sleep_until(self, moment: datetime, *, key: str) -> None:
        await asyncio.sleep(max(0.0, (moment - utcnow()).total_seconds()))

    async def ask_approval(self, ask: ApprovalAsk, *, key: str) -> ApprovalDecision:
        whole = self.journal.key(key)
        found = self.journal.recorded(whole).get(whole)
        if found is not None and found.status == "done":
            return ApprovalDecision(**found.output)
        if found is None:
            await self.journal.begin(StepRecord(whole, "value", "approval"), commit=True)
            asked = ApprovalRequested(
                approval_id=consent.approval_id(self.run.id, whole),
                step=whole.removesuffix("/approval"),
                tool=ask.subject,
                arguments=ask.arguments,
            )
            self.journal.emit(asked)
        raise Suspend(consent.waiting(ask, whole, ask.expires_at))

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
