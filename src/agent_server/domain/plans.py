"""The plan: what a planner writes, a person reviews, and the workflow's graph is built from.

Leans on the domain's base. Refuses to know how a plan is made or carried out; its limits are
checked where plans are validated, with every error at once.
"""

from typing import Literal

from pydantic import Field

from agent_server.domain.base import Frozen, JsonObject

OnFailure = Literal["fail", "continue", "retry"]


class PlanTask(Frozen):
    """One unit of the work: who does it, with what, and what is expected."""

    id: str
    description: str
    agent: str | None = None
    """The responsible agent's slug; None lets the server's own generalist do it."""
    tools: tuple[str, ...] = ()
    expected_output: str | JsonObject | None = None
    depends_on: tuple[str, ...] = ()
    when: str | None = None
    """An expression over earlier results; false skips the task."""
    on_failure: OnFailure = "retry"


class PlanAction(Frozen):
    """``action`` runs with ``parameters`` when ``trigger`` happens.

    A trigger is an event type, alone (``run.succeeded``) or with a task (``task.completed:t1``).
    """

    trigger: str
    action: str
    parameters: JsonObject = Field(default_factory=dict)


class Plan(Frozen):
    """A goal, broken into tasks and actions."""

    tasks: tuple[PlanTask, ...]
    actions: tuple[PlanAction, ...] = ()
    revision: int = 1


TaskStatus = Literal[
    "pending", "queued", "running", "waiting", "succeeded", "failed", "skipped", "cancelled"
]


class PlanTaskState(PlanTask):
    """A planned task and how far it is."""

    status: TaskStatus = "pending"
    output: object = None


class PlanState(Frozen):
    """The plan as ``GET /runs/{id}/plan`` answers it."""

    tasks: tuple[PlanTaskState, ...]
    actions: tuple[PlanAction, ...] = ()
    revision: int = 1
