"""Runs: what a caller submits, what a run is, what its tasks and steps are.

Leans on the domain's base, ids and errors. Refuses to know how a run is stored or carried out.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

from pydantic import Field, model_validator

from agent_server.domain.base import Frozen, JsonObject, UtcDatetime
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.options import RunOptions
from agent_server.domain.plans import TaskStatus

RunKind = Literal["goal", "agent", "workflow"]
MAX_COUNT = 2**53
MAX_DEADLINE_S = 10 * 365 * 86_400


class RunStatus(str, Enum):
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    BUDGET_EXCEEDED = "budget_exceeded"

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset(
    {RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.BUDGET_EXCEEDED}
)


class Budget(Frozen):
    """Ceilings over the whole tree of a run. None is no ceiling."""

    max_cost_usd: Decimal | None = Field(default=None, gt=0, le=1_000_000_000)
    max_tokens: int | None = Field(default=None, gt=0, le=MAX_COUNT, strict=True)
    max_model_calls: int | None = Field(default=None, gt=0, le=MAX_COUNT, strict=True)
    max_tool_calls: int | None = Field(default=None, gt=0, le=MAX_COUNT, strict=True)
    deadline_s: float | None = Field(default=None, gt=0, le=MAX_DEADLINE_S, strict=True)
    """Wall time from creation to end, in seconds."""


class Limits(Frozen):
    """What somebody's runs get by default, field by field, and the most they may ask for."""

    default: Budget | None = None
    maximum: Budget | None = None


class ModelPrice(Frozen):
    """What a model costs, in US dollars per million tokens."""

    input_per_mtok: Decimal = Field(ge=0, le=1_000_000)
    output_per_mtok: Decimal = Field(ge=0, le=1_000_000)
    cached_input_per_mtok: Decimal | None = Field(default=None, ge=0, le=1_000_000)


class ModelRate(Frozen):
    """What a provider, or a model, may be asked in any minute; what is not set has no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


class Usage(Frozen):
    """What a step, a task or a run consumed. ``cost_usd`` is None where a price is unknown."""

    model_calls: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: Decimal | None = None


class RunRequest(Frozen):
    """The body of ``POST /api/v1/runs``: exactly one of goal, agent, workflow."""

    goal: str | None = Field(
        default=None,
        min_length=1,
        max_length=100_000,
        description="What is to be reached; the planner makes the plan.",
    )
    role: str | None = Field(
        default=None, max_length=10_000, description="With `goal`: whom the agents act as."
    )
    task: str | None = Field(
        default=None, max_length=100_000, description="With `goal`: the work in more detail."
    )
    expected_output: str | JsonObject | None = Field(
        default=None,
        description="With `goal`: what is to come out, in words or as a JSON Schema that is enforced.",
    )
    tools: tuple[str, ...] | None = Field(
        default=None,
        max_length=200,
        description="With `goal`: the only tools that the plan may use, by name.",
    )
    agents: tuple[str, ...] | None = Field(
        default=None,
        max_length=200,
        description="With `goal`: the only agents that the plan may use, by name.",
    )

    agent: str | None = Field(
        default=None, min_length=1, max_length=200, description="One agent, by name; needs `input`."
    )
    input: str | list[JsonObject] | None = Field(
        default=None, description="With `agent`: a text, or a list of input items."
    )

    options: RunOptions | None = Field(
        default=None, description="With `agent`: what this run changes of it."
    )

    workflow: str | JsonObject | None = Field(
        default=None, description="A workflow, by name or as a definition."
    )
    variables: JsonObject | None = Field(default=None, description="With `workflow`: its inputs.")

    session_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The conversation that the run continues.",
    )
    on_busy: Literal["queue", "reject", "interrupt", "steer"] = Field(
        default="queue",
        description="With `session_id`, while another run is under way on the session: `queue` "
        "waits for it, `reject` refuses this one with 409, `interrupt` cancels the other, `steer` "
        "says `input` into the other at its next turn: that run is the answer.",
    )
    approach: str | None = Field(
        default=None,
        max_length=100,
        description="How a task is reasoned about, by name, or `auto`.",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The model of every agent that names none.",
    )
    context: JsonObject = Field(
        default_factory=dict, description="What agents and workflows may know besides."
    )
    review: Literal["none", "plan"] = Field(
        default="none", description="`plan` waits until a person has seen the plan."
    )
    budget: Budget | None = Field(default=None, description="Ceilings over the whole run.")
    subject: str | None = Field(
        default=None, min_length=1, max_length=200, description="The person whom the data is about."
    )
    metadata: JsonObject = Field(
        default_factory=dict, description="Yours; kept and answered as it is."
    )
    start_after: UtcDatetime | None = Field(
        default=None, description="Not before this moment (RFC 3339)."
    )
    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Place in the queue: what of a tenant has a higher one begins first.",
    )
    stream: bool = Field(default=False, description="The answer is the event stream.")
    store: bool = Field(
        default=True,
        description="False: nothing is kept and nothing survives a crash; only for an agent, with `stream` or `?wait=`.",
    )
    """False: nothing is stored and nothing survives a crash; only for an agent, and only with
    ``stream`` or ``?wait=``, since there is nothing to come back to."""

    @property
    def kind(self) -> RunKind:
        if self.goal is not None:
            return "goal"
        return "agent" if self.agent is not None else "workflow"

    @property
    def workflow_version(self) -> str | None:
        """The version that the definition names."""
        found = self.workflow.get("version") if isinstance(self.workflow, dict) else None
        return None if found is None else str(found)

    @model_validator(mode="after")
    def _one_kind(self) -> RunRequest:
        given = [name for name in ("goal", "agent", "workflow") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(repr(name) for name in given) or "none of them"
            raise ValueError(f"give exactly one of 'goal', 'agent' and 'workflow'; found {found}")
        only: dict[str, tuple[str, ...]] = {
            "goal": ("role", "task", "expected_output", "tools", "agents"),
            "agent": ("input",),
            "workflow": ("variables",),
        }
        for kind, names in only.items():
            wrong = [n for n in names if kind != given[0] and getattr(self, n) is not None]
            if wrong:
                raise ValueError(f"{wrong[0]!r} goes with {kind!r}, not with {given[0]!r}")
        if self.on_busy != "queue" and self.session_id is None:
            raise ValueError(f"'on_busy': {self.on_busy!r} goes with 'session_id'")
        if self.on_busy == "steer" and (self.agent is None or self.start_after is not None):
            raise ValueError("'on_busy': 'steer' goes with 'agent', and without 'start_after'")
        if self.review == "plan" and self.goal is None:
            raise ValueError("'review': 'plan' goes with 'goal': nothing else has a plan")
        if self.agent is not None and self.input is None:
            raise ValueError("'agent' needs 'input': a text or a list of input items")
        return self


class WaitingFor(Frozen):
    """Why a run stands still, where a person can see it."""

    kind: Literal["approval", "signal", "timer", "review", "reconciliation"]
    detail: str = ""
    task_id: str | None = None
    step: str | None = None
    until: datetime | None = None
    signal: str | None = None
    """With ``signal``: the name that is waited for; null where the run is paused."""
    paused_by: str | None = None
    """Who paused the run: it waits for ``resume``, whatever else it may wait for."""


class Reconciled(Frozen):
    """How a call that was in doubt went."""

    outcome: Literal["happened", "did_not_happen", "fail"]
    result: Any = None
    reason: str = ""
    by: str = ""


class Reconcile(Frozen):
    """The body of ``POST /api/v1/runs/{run_id}/reconcile``."""

    step: str = Field(min_length=1, max_length=2000, description="The step in doubt, by its key.")
    outcome: Literal["happened", "did_not_happen", "fail"] = Field(
        description="`happened` takes `result` for what the call gave; `did_not_happen` calls it "
        "now; `fail` fails what needed it."
    )
    result: Any = Field(default=None, description="With `happened`: what the call gave.")
    reason: str = Field(default="", max_length=10_000)


class SignalSent(Frozen):
    """A signal that was taken in for a run."""

    id: str
    run_id: str
    name: str
    by: str
    at: datetime


class Run(Frozen):
    """A run as the API answers it."""

    id: str
    kind: RunKind
    status: RunStatus
    goal: str | None = None
    agent: str | None = None
    workflow: str | None = None
    workflow_version: str | None = None
    """The version of the stored workflow that the run is of, whatever became of it since."""
    input: Any = None
    output: Any = None
    error: ErrorInfo | None = None
    usage: Usage = Usage()
    budget: Budget | None = None
    session_id: str | None = None
    approach: str | None = None
    model: str | None = None
    priority: int = 0
    parent_id: str | None = None
    forked_from: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    waiting_for: WaitingFor | None = None
    metadata: JsonObject = Field(default_factory=dict)


class HaltedRuns(Frozen):
    """What was done to many runs at once."""

    data: tuple[Run, ...]
    refused: tuple[str, ...] = ()
    """Ids of runs that fitted the filters and ended, or changed, in the meantime."""
    more: bool = False
    """There are more than one call takes: call again."""


class Task(Frozen):
    """A task of a run as the API answers it."""

    id: str
    run_id: str
    path: str
    """Where the task stands in its run's tree; a retry adds ``@2``, ``@3``, …"""
    node: str
    """The id that the plan or the workflow gave it."""
    kind: str
    description: str = ""
    agent: str | None = None
    status: TaskStatus
    output: Any = None
    error: ErrorInfo | None = None
    attempts: int = 0
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    shared: bool = False
    """It ended in the run that this one was forked from."""


StepKind = Literal["model", "tool", "value"]
StepStatus = Literal["started", "done", "failed", "in_doubt"]


class Step(Frozen):
    """One ledgered effect: a model call, a tool call, or a value that must replay the same."""

    key: str
    run_id: str
    task_id: str | None = None
    kind: StepKind
    name: str
    status: StepStatus
    input: Any = None
    output: Any = None
    error: ErrorInfo | None = None
    attempts: int = 1
    usage: Usage = Usage()
    started_at: datetime
    ended_at: datetime | None = None
    shared: bool = False
    """It was made, and paid for, in the run that this one was forked from."""
