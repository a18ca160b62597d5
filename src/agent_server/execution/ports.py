"""What durable code sees: the journal of its effects, its children, and how it may stand still.

Leans on the domain alone. This module is the contract between the engine below and the
floors above (inference, actions, reasoning, workflow, planning); it refuses to know language
models, databases and HTTP.

A handler is durable when everything it learns from the world comes through its ``TaskContext``:
after a crash it is called again from the start, finds each finished step in the journal under
the same key, and goes on from the first one that is missing.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Literal, Protocol

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.events import EventBase
from agent_server.domain.ids import RunId, TaskId, Tenant
from agent_server.domain.runs import (
    Budget,
    RunRequest,
    StepKind,
    StepStatus,
    Usage,
    WaitingFor,
)

NO_USAGE = Usage()


@dataclass(frozen=True)
class StepRecord:
    """One effect in the ledger.

    ``key`` is the whole path in the run (``2.1/model/3``). ``input`` and ``output`` are JSON
    values. ``input_hash`` is compared on replay by whoever wrote it.
    """

    key: str
    kind: StepKind
    name: str
    status: StepStatus = "started"
    agent: str | None = None
    input: Any = None
    input_hash: str | None = None
    output: Any = None
    error: ErrorInfo | None = None
    usage: Usage = NO_USAGE
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    attempts: int = 1
    started_at: datetime = field(default_factory=utcnow)
    ended_at: datetime | None = None

    def done(self, output: Any, usage: Usage = NO_USAGE, **changes: Any) -> "StepRecord":
        return self._with(status="done", output=output, usage=usage, **changes)

    def failed(self, error: ErrorInfo, usage: Usage = NO_USAGE, **changes: Any) -> "StepRecord":
        return self._with(status="failed", error=error, usage=usage, **changes)

    def _with(self, **changes: Any) -> "StepRecord":
        """The same, ended now: ``replace`` costs ten times as much."""
        ended = object.__new__(StepRecord)
        ended.__dict__.update(self.__dict__, ended_at=utcnow(), **changes)
        return ended


@dataclass(frozen=True)
class Estimate:
    """What a model call will use, as far as that can be known before it is made.

    ``output_tokens`` is the most it may answer where that is ``bounded``, else what is assumed.
    The costs are None where ``model`` has no known price.
    """

    model: str
    input_tokens: int
    output_tokens: int
    bounded: bool
    input_cost_usd: Decimal | None = None
    output_cost_usd: Decimal | None = None

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def cost_usd(self) -> Decimal:
        """The most it will cost; 0 where no price is known."""
        return (self.input_cost_usd or Decimal(0)) + (self.output_cost_usd or Decimal(0))

    def after(self, spent: Usage) -> "Estimate":
        """The same, behind tries that have used ``spent``."""
        cost = self.input_cost_usd
        return replace(
            self,
            input_tokens=self.input_tokens + spent.input_tokens + spent.output_tokens,
            input_cost_usd=None if cost is None else cost + (spent.cost_usd or Decimal(0)),
        )


def reconciled_key(doubted: StepRecord) -> str:
    """Where the ledger holds how the call ``doubted`` went, if somebody said."""
    return f"{doubted.key}/reconciled/{doubted.attempts}"


Fence = Callable[[Any], None]
"""See ``Journal.fence``; it is given the database's transaction."""


class Journal(Protocol):
    """The ledger and the event log, as one task of one run may write them.

    Every write is fenced: when another worker has taken the task over, it raises ``LostLease``
    and nothing of this attempt is stored from then on.
    """

    run_id: RunId
    task_id: TaskId | None
    stores: bool
    """False in a run of which nothing is kept."""
    scope: str
    """The prefix of this task's step keys: ``""`` for a run's root, else the task's path."""
    notes: object
    """What whoever carries the task out keeps as long as the journal lives; None at first."""

    def key(self, *parts: str) -> str:
        """``scope/part/part``; the scope of a run's root adds nothing."""

    def recorded(self, prefix: str = "") -> Mapping[str, StepRecord]:
        """The steps of this task from earlier attempts and this one, by key, in ledger order."""

    def emit(self, event: EventBase) -> None:
        """Add a fact to the run's events; ``run_id`` and ``task_id`` are filled in.

        Buffered, and stored with the next commit or within a few milliseconds, in order.
        """

    def delta(self, step: str, agent: str | None, text: str) -> None:
        """Hand a piece of a message to live readers. Transient: never stored, never waits."""

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> int | None:
        """Room for the call is reserved in the run's budget, and the step starts: ``step.started``, and with ``commit`` the ledger holds it as
        ``started`` when this returns, together with everything recorded before it.

        ``commit=True`` for what must not be repeated silently. ``commit=False`` for what may be
        repeated (a model call, a reading tool): nothing but the event is written, in passing.
        Raises ``BudgetExceeded``; may wait until calls in flight have settled. Returns the most
        output tokens that the call may ask for, where the budget sets that and its agent does not.
        """

    async def again(
        self, step: StepRecord, estimate: Estimate | None = None, spent: Usage = NO_USAGE
    ) -> int | None:
        """The model call of ``step``, which began, is tried once more: a call of its own for the
        budget, with what ``begin`` returns. Raises ``BudgetExceeded``.

        ``spent`` is what its answers so far have used, which ``begin`` made too short: with it, this
        waits until the answer may be whole.
        """

    def cut_off(self, step: StepRecord) -> None:
        """The call of ``step`` was aborted, and will not be finished. It counts as made."""

    async def finish(self, step: StepRecord, *, commit: bool = True) -> None:
        """The step ended (``done`` or ``failed``): recorded with its event and its usage.

        With ``commit`` it is stored when this returns. ``commit=False`` lets it join the next
        commit (at most a few milliseconds later): for a model call, whose result is not acted
        upon before the next ``begin(commit=True)`` or the end of the task, both of which wait.
        """

    def along(self, key: str, write: Callable[[Any], object] | None, *events: EventBase) -> None:
        """Store what ``write`` writes, and ``events``, by the commit that stores the step ``key``
        as done: both or neither. A step that fails or never ends stores nothing of it.

        ``write`` is given the database's transaction, may be called again when that is rolled
        back, and must not raise. Where ``stores`` is false it is never called.
        """

    async def fence(self) -> Fence:
        """What a transaction beside the ledger begins with, which notes or writes something for
        this task: it lets no erasure begin before that transaction ends, and raises ``LostLease``
        where the task is no longer this attempt's, or its run was erased."""

    async def in_doubt(self, step: StepRecord, detail: str) -> None:
        """Mark a step found ``started`` after a crash; the caller then raises ``Suspend``."""

    async def flush(self) -> None:
        """Return when everything handed in so far is stored."""


@dataclass(frozen=True)
class TaskSpec:
    """A child task to run. ``path`` is its identity in the run: the same path is the same task."""

    path: str
    node: str
    kind: str
    """The name of the handler that runs it."""
    payload: JsonObject
    """What the handler needs, JSON only."""
    description: str = ""
    agent: str | None = None
    hidden: bool = False
    """True for plumbing (an action's delivery): no ``task.*`` events, not listed."""


@dataclass(frozen=True)
class TaskOutcome:
    """How a child task ended."""

    status: Literal["succeeded", "failed", "skipped", "cancelled"]
    output: Any = None
    error: ErrorInfo | None = None
    begun: bool = True
    """False for one that ended before anybody took it up."""
    found: datetime | None = None
    """When it had ended, of one that had when this attempt of its parent asked for it."""


@dataclass(frozen=True)
class Holder:
    """Who carries a task out: a node, at the epoch of one attempt."""

    run_id: str
    path: str
    owner: str
    epoch: int


@dataclass(frozen=True)
class RunSnapshot:
    """The run a task belongs to, as it was submitted. Does not change under a running task."""

    id: RunId
    tenant: Tenant
    request: RunRequest
    created_at: datetime
    parent_id: RunId | None = None
    forked_from: RunId | None = None
    """The run with which it shares a part of its ledger."""
    budget: Budget | None = None
    principal: str = "anonymous"


@dataclass(frozen=True)
class SignalReceived:
    """What somebody sent to a run by ``POST /runs/{id}/signals/{name}``."""

    payload: Any
    by: str
    """The sender's name."""
    at: datetime
    steer_id: str | None = None
    """See ``RunSteered``; the ledger does not keep it."""

    @classmethod
    def read(cls, recorded: JsonObject) -> "SignalReceived":
        """As the ledger holds it."""
        return cls(recorded["payload"], recorded["by"], datetime.fromisoformat(recorded["at"]))


OnExpiry = Literal["reject", "fail", "approve"]


@dataclass(frozen=True)
class ApprovalAsk:
    """What a person is to consent to: ``subject`` (a tool's name, a node) with ``arguments``."""

    subject: str
    arguments: Any = None
    """JSON. The consent is bound to the hash of exactly these."""
    detail: str = ""
    expires_at: datetime | None = None
    on_expiry: OnExpiry = "reject"
    """What happens when nobody has decided by then."""
    approvers: tuple[str, ...] | None = None
    """The names of those who may decide; None: whoever may see the run."""
    schema: JsonObject | None = None
    """The JSON Schema that edited arguments must fit."""
    agent: str | None = None


@dataclass(frozen=True)
class ApprovalDecision:
    """What was decided. ``arguments`` are those consented to: as asked, or edited."""

    decision: Literal["approve", "reject", "expired"]
    arguments: Any = None
    reason: str = ""
    by: str = ""
    approval_id: str = ""
    asked_hash: str = ""
    """Of the arguments that were asked about: ``arguments_hash``."""


class TaskContext(Protocol):
    """What a handler is given."""

    run: RunSnapshot
    path: str
    node: str
    payload: JsonObject
    attempt: int
    """1 at first; more when a worker died or let go of the task while it did not only wait."""

    @property
    def journal(self) -> Journal: ...

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        """Run ``spec`` as a task of its own, perhaps on another worker, and wait for its end.

        Idempotent by ``spec.path``: after a crash, or called twice, it is the same task, and a
        finished one answers at once. Never raises for a failed child: the outcome says so.
        Any number may be awaited side by side. While only children are awaited, the parent
        takes no worker slot.
        """

    async def give_up(self, scopes: tuple[str, ...]) -> None:
        """Cancel the tasks whose paths begin with one of ``scopes`` and that an earlier attempt of
        this task left behind; returns when each has undone what it had done. Not what undoes.

        For what a replay does not come to again: what this attempt awaits is cancelled with it.
        """

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        """Record, once, that ``spec`` will not run: a task with status ``skipped`` and its event."""

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        """``make()``'s JSON value, ledgered under ``key``: computed once, replayed ever after."""

    async def wait_signal(
        self,
        name: str,
        *,
        key: str,
        until: datetime | None = None,
        waiting_for: WaitingFor | None = None,
    ) -> SignalReceived | None:
        """Stand still, holding no slot, until somebody sends the signal ``name`` to the run.

        One signal is consumed by one wait, the oldest first, and replayed the same under
        ``key``. One that was sent before is found. None when ``until`` (the same at each attempt:
        from ``value`` or the run's own moments) has passed. ``waiting_for`` says it in other words.

        This and the two below raise ``Suspend``: the handler ends and is called again from its
        start, so a handler that uses them beside other work runs them in a task of their own.
        """

    async def take_steers(self, *, key: str) -> "list[SignalReceived]":
        """What was said into the run (``on_busy: steer``) and not yet taken, the oldest first.

        Never waits. What is taken is recorded under ``key`` and replayed the same, with its events;
        where there is nothing, nothing is recorded, and a replay may find something.
        """

    async def sleep_until(self, moment: datetime, *, key: str) -> None:
        """Stand still, holding no slot, until ``moment``; woken at most about a second late."""

    async def ask_approval(self, ask: ApprovalAsk, *, key: str) -> ApprovalDecision:
        """Stand still until a person has decided, or ``ask.expires_at`` has come.

        Asked once under ``key``, however often called. Raises ``ApprovalExpired`` where nobody
        decided in time and ``on_expiry`` is ``"fail"``; with ``"approve"`` it counts as approved.
        """


@dataclass(frozen=True)
class FinalOutput:
    """A root handler's output together with what must be committed with the run's end.

    ``session_items`` (SDK input items) are appended to the session's history in the same
    transaction that ends the run, so that history and outcome agree after any crash.
    """

    value: Any
    session_id: str | None = None
    session_items: tuple[JsonObject, ...] = ()


Handler = Callable[[TaskContext], Awaitable[Any]]
"""Carries a task out and returns its JSON output (a root handler may return ``FinalOutput``). Raises ``RunError`` to fail it,
``Suspend`` to stand still, and lets cancellation pass.

A handler with a method ``undo(ctx)`` is asked to undo what the task has done when it is cancelled
or fails: after its children have stopped, and again after a crash in between. It answers what could
not be undone (``FieldError``). Children whose path holds ``UNDO_MARK`` are carried out although
their run is being stopped.
"""
UNDO_MARK: Final = "!"


class Suspend(Exception):
    """Raised by a handler to stand still until a decision: the task keeps no worker.

    The task is taken up again when somebody nudges it (by the signal that it ``awaits``, by a
    decision about one of its steps), or at ``wake_at``. Being taken up for nothing is harmless:
    the handler looks again and raises this again.
    """

    def __init__(
        self,
        waiting_for: WaitingFor,
        *,
        wake_at: datetime | None = None,
        awaits: str | None = None,
    ) -> None:
        super().__init__(waiting_for.detail)
        self.waiting_for = waiting_for
        self.wake_at = wake_at
        self.awaits = awaits


class LostLease(Exception):
    """Another worker owns the task now; this attempt must stop and has stored nothing more."""


REVIEWED = "@review"
"""The signal that ends the review of a plan; its payload is the plan. No caller can send it: the
name is not one that signals may have."""
STEER = "@steer"
"""The signal that is a message for a run under way. Its payload is ``{"request": …}``, what was
submitted, and for a response ``steer_id``, with the input alone. No caller can send it by its name."""
