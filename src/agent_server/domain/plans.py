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


class PlanEdit(Frozen):
    """A plan as a person wants it, in place of the one that waits for review."""

    tasks: tuple[PlanTask, ...] = Field(min_length=1)
    actions: tuple[PlanAction, ...] = ()


class PlanDifference(Frozen):
    """What an edit of a plan changed, by the ids of its tasks."""

    revision: int
    """Of the plan as it now is."""
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """The names of the fields that differ, of each task that was there before."""
    actions_changed: bool = False


def difference(before: Plan, after: Plan) -> PlanDifference:
    """What ``after`` has that ``before`` had not, and the other way round."""
    old = {task.id: task for task in before.tasks}
    new = {task.id: task for task in after.tasks}
    changed = {
        name: tuple(f for f in PlanTask.model_fields if getattr(old[name], f) != getattr(task, f))
        for name, task in new.items()
        if name in old and old[name] != task
    }
    return PlanDifference(
        revision=after.revision,
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=changed,
        actions_changed=before.actions != after.actions,
    )


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
