"""What may be done with a run that has been: retried, forked, compared, exported.

Leans on the words of runs. Refuses to know how a run is kept.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field

from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.runs import Budget, Run, RunStatus, Usage

EXPORT_FORMAT = "agent-server.run"
EXPORT_VERSION = 1
Redact = Literal["none", "secrets", "content"]


class RetryRequest(Frozen):
    """The body of ``POST …/retry``. Each field that ``budget`` sets replaces the run's own."""

    budget: Budget | None = None


class ForkRequest(Frozen):
    """The body of ``POST …/fork``. What is not given stays as it was."""

    model_config = ConfigDict(populate_by_name=True)

    start: str | None = Field(
        default=None,
        alias="from",
        max_length=1_000,
        description="A task's id or path, or a step's key: this is done anew, and what depends on "
        "it. Default: everything.",
    )
    input: Any = Field(
        default=None,
        description="What the run, the task or the tool call at `from` is given instead.",
    )
    instructions: str | None = Field(
        default=None, max_length=100_000, description="Of the agent at `from`, from there on."
    )
    model: str | None = Field(default=None, min_length=1, max_length=200)
    approach: str | None = Field(default=None, max_length=100)
    budget: Budget | None = None
    session_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Default: a branch of the run's session as it was before the run.",
    )
    metadata: JsonObject | None = None


class Repeat(Frozen):
    """A side effect of the origin that the new run will have again."""

    step: str
    """The key of the tool's step, or the path of the action's task."""
    name: str
    effect: str
    arguments: Any = None


class ForkedRun(Run):
    """The run that a fork or a retry made, and what it means."""

    shared_tasks: int = 0
    shared_steps: int = 0
    will_repeat: tuple[Repeat, ...] = ()
    """Calls that were made already and are not shared: they may be made again."""


class Brief(Frozen):
    """One side of a comparison."""

    id: str
    status: RunStatus
    output: Any = None
    error: str | None = None
    usage: Usage = Usage()
    duration_s: float | None = None
    steps: int = 0
    plan: tuple[str, ...] = ()
    """The plan's tasks: id, agent and description."""


class StepDifference(Frozen):
    """A step that is not the same in both runs. ``changed`` names what differs."""

    step: str
    name: str
    only_in: Literal["a", "b"] | None = None
    changed: tuple[Literal["name", "input", "output", "status"], ...] = ()


class Comparison(Frozen):
    """Two runs side by side. ``same``: the same steps with the same results, and one outcome."""

    same: bool
    a: Brief
    b: Brief
    first_difference: str | None = None
    output_same: bool
    plan_same: bool
    steps_same: int
    steps: tuple[StepDifference, ...] = ()


class RunExport(Frozen):
    """A whole run as one JSON document. Read it back with ``model_validate``."""

    format: Literal["agent-server.run"] = "agent-server.run"
    version: Literal[1] = 1
    server: str = ""
    exported_at: datetime
    redacted: Redact = "none"
    run: Run
    request: JsonObject
    """What was submitted, with the names in it written out."""
    session: tuple[JsonObject, ...] = ()
    """The items of the session before the run."""
    tasks: tuple[JsonObject, ...] = ()
    steps: tuple[JsonObject, ...] = ()
    events: tuple[JsonObject, ...] = ()
    checks: JsonObject | None = None
    """What a regression test asks of a replay; None asks for the same in everything."""
