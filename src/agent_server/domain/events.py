"""The closed, versioned union of what can be said about a run.

Leans on the domain. Facts are stored with a sequence number per run, from 1 and without gaps;
``message.delta`` is transient and has none. Refuses to know how events are stored or sent.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from agent_server.domain.base import Frozen, JsonObject, utcnow
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.plans import Plan
from agent_server.domain.runs import StepKind, Usage, WaitingFor


class EventBase(Frozen):
    """What every event says: of which run, when, and, once stored, at which place."""

    v: Literal[1] = 1
    run_id: str = ""
    """Filled in by the journal that takes the event."""
    seq: int | None = None
    at: datetime = Field(default_factory=utcnow)
    task_id: str | None = None

    ends_run: ClassVar[bool] = False
    transient: ClassVar[bool] = False


class RunCreated(EventBase):
    type: Literal["run.created"] = "run.created"
    kind: Literal["goal", "agent", "workflow"]
    name: str
    """The goal's text, the agent's slug or the workflow's name."""


class RunStarted(EventBase):
    type: Literal["run.started"] = "run.started"
    attempt: int = 1


class PlanCreated(EventBase):
    type: Literal["plan.created"] = "plan.created"
    plan: Plan


class PlanRevised(EventBase):
    type: Literal["plan.revised"] = "plan.revised"
    plan: Plan
    reason: str


class TaskStarted(EventBase):
    type: Literal["task.started"] = "task.started"
    path: str
    node: str
    kind: str
    description: str = ""
    agent: str | None = None
    attempt: int = 1


class TaskCompleted(EventBase):
    type: Literal["task.completed"] = "task.completed"
    path: str
    node: str
    output: Any = None


class TaskFailed(EventBase):
    type: Literal["task.failed"] = "task.failed"
    path: str
    node: str
    error: ErrorInfo


class TaskSkipped(EventBase):
    type: Literal["task.skipped"] = "task.skipped"
    path: str
    node: str
    reason: str


class StepStarted(EventBase):
    type: Literal["step.started"] = "step.started"
    step: str
    kind: StepKind
    name: str
    agent: str | None = None
    input: Any = None
    """The arguments of a tool call; the input of a model call is read at ``/steps``."""


class StepCompleted(EventBase):
    type: Literal["step.completed"] = "step.completed"
    step: str
    kind: StepKind
    name: str
    agent: str | None = None
    usage: Usage = Usage()
    duration_ms: int = 0
    output: Any = None
    """The result of a tool call, shortened; the whole is read at ``/steps``."""
    cached_tokens: int = 0
    """Of a model call's input tokens, those that its provider had in its cache."""
    reasoning_tokens: int = 0
    """Of a model call's output tokens, those that it thought with."""


class StepFailed(EventBase):
    type: Literal["step.failed"] = "step.failed"
    step: str
    kind: StepKind
    name: str
    agent: str | None = None
    error: ErrorInfo
    duration_ms: int = 0


class StepInDoubt(EventBase):
    type: Literal["step.in_doubt"] = "step.in_doubt"
    step: str
    kind: StepKind
    name: str
    detail: str


class MessageDelta(EventBase):
    type: Literal["message.delta"] = "message.delta"
    step: str
    agent: str | None = None
    text: str

    transient = True


class MessageCompleted(EventBase):
    type: Literal["message.completed"] = "message.completed"
    step: str
    agent: str | None = None
    text: str
    incomplete: bool = False
    """The model was cut off by the ceiling of its answer."""
    pieces: tuple[int, ...] | None = None
    """Characters of each delta the message came in, where the run keeps that."""


class ReasoningCompleted(EventBase):
    type: Literal["reasoning.completed"] = "reasoning.completed"
    step: str
    agent: str | None = None
    text: str
    """The model's summary of its reasoning."""


class ToolRequested(EventBase):
    type: Literal["tool.requested"] = "tool.requested"
    call_id: str
    tool: str
    arguments: str
    """JSON, as the model wrote it."""


class MemoryWritten(EventBase):
    type: Literal["memory.written"] = "memory.written"
    memory_ids: tuple[str, ...]


class MemoryRecalled(EventBase):
    type: Literal["memory.recalled"] = "memory.recalled"
    query: str
    memories: tuple[JsonObject, ...]


class ApprovalRequested(EventBase):
    type: Literal["approval.requested"] = "approval.requested"
    approval_id: str
    step: str
    tool: str
    arguments: Any = None


class ApprovalDecided(EventBase):
    type: Literal["approval.decided"] = "approval.decided"
    approval_id: str
    decision: Literal["approve", "reject", "expired"]
    by: str


class ActionTriggered(EventBase):
    type: Literal["action.triggered"] = "action.triggered"
    action: str
    trigger: str
    path: str


class ActionCompleted(EventBase):
    type: Literal["action.completed"] = "action.completed"
    action: str
    trigger: str
    path: str
    output: Any = None


class ActionFailed(EventBase):
    type: Literal["action.failed"] = "action.failed"
    action: str
    trigger: str
    path: str
    error: ErrorInfo


class BudgetWarning(EventBase):
    type: Literal["budget.warning"] = "budget.warning"
    limit: str
    used: str
    maximum: str


class RunWaiting(EventBase):
    type: Literal["run.waiting"] = "run.waiting"
    waiting_for: WaitingFor


class RunResumed(EventBase):
    type: Literal["run.resumed"] = "run.resumed"
    reason: str


class EventUnreadable(EventBase):
    """In place of a stored event that cannot be read any more: its number stays, what it said is
    lost, and so is its moment (``at`` is 1970-01-01)."""

    type: Literal["event.unreadable"] = "event.unreadable"
    was: str
    """The type of the event."""
    reason: str


class RunSteered(EventBase):
    type: Literal["run.steered"] = "run.steered"
    input: Any
    """What was said: a text, or a list of input items."""
    steer_id: str | None = None
    """Of a `response.steer`: what follows is told as a response of its own."""
    by: str
    sent_at: datetime


class RunSucceeded(EventBase):
    type: Literal["run.succeeded"] = "run.succeeded"
    output: Any = None
    usage: Usage = Usage()

    ends_run = True


class RunFailed(EventBase):
    type: Literal["run.failed"] = "run.failed"
    error: ErrorInfo
    usage: Usage = Usage()

    ends_run = True


class RunCancelled(EventBase):
    type: Literal["run.cancelled"] = "run.cancelled"
    reason: str = ""
    usage: Usage = Usage()

    ends_run = True


class RunBudgetExceeded(EventBase):
    type: Literal["run.budget_exceeded"] = "run.budget_exceeded"
    error: ErrorInfo
    output: Any = None
    usage: Usage = Usage()

    ends_run = True


Event = Annotated[
    RunCreated
    | RunStarted
    | PlanCreated
    | PlanRevised
    | TaskStarted
    | TaskCompleted
    | TaskFailed
    | TaskSkipped
    | StepStarted
    | StepCompleted
    | StepFailed
    | StepInDoubt
    | MessageDelta
    | MessageCompleted
    | ReasoningCompleted
    | ToolRequested
    | MemoryWritten
    | MemoryRecalled
    | ApprovalRequested
    | ApprovalDecided
    | ActionTriggered
    | ActionCompleted
    | ActionFailed
    | BudgetWarning
    | RunWaiting
    | RunResumed
    | RunSteered
    | EventUnreadable
    | RunSucceeded
    | RunFailed
    | RunCancelled
    | RunBudgetExceeded,
    Field(discriminator="type"),
]

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
"""Reads an event back from its JSON."""
