"""What a process keeps of the runs and tasks it carries out, and how they are read from rows.

Leans on the journal and the ports. Refuses to act: the engine does.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, InternalError, error_info
from agent_server.domain.ids import RunId, TaskId, Tenant, task_id
from agent_server.domain.runs import RunRequest
from agent_server.execution.commits import Commits
from agent_server.execution.journal import DurableJournal
from agent_server.execution.ports import UNDO_MARK, RunSnapshot, TaskOutcome
from agent_server.execution.store.columns import error_of
from agent_server.storage.tables import Unreadable


@dataclass
class LocalRun:
    """What this process keeps of a run while any of its tasks is carried out here."""

    snapshot: RunSnapshot
    commits: Commits
    attempts: dict[str, "Attempt"] = field(default_factory=dict)
    cancel_reason: str | None = None
    """Somebody wants the run to stop."""
    ending: bool = False
    """Its root is about to end it: what else is carried out stops."""
    reserved: int = 0
    """Slots here for children whose rows are being written."""
    elsewhere: set[str] = field(default_factory=set)
    """Children awaited here that this process does not carry out."""
    begun: set[str] | None = None
    """The places of the tasks that the run has begun; None until they were looked for."""

    @property
    def stops(self) -> bool:
        return self.ending or self.cancel_reason is not None


@dataclass
class Attempt:
    """One task being carried out here."""

    local: LocalRun
    path: str
    node: str
    kind: str
    description: str
    agent: str | None
    payload: JsonObject
    hidden: bool
    epoch: int
    number: int
    losses: int = 0
    """Workers that died at it and were not excused; none any more when it was excused itself."""
    stood_for: str | None = None
    """The kind of what it waited for until now; None for a task that did not."""
    lost: bool = False
    """Another worker has it; nothing of this attempt is stored any more."""
    cancelled: bool = False
    """The parent gave it up."""
    held: bool = False
    """It is let go of, to stand still until somebody resumes it."""
    dismissed: ErrorInfo | None = None
    """Somebody cancelled this task by itself: it fails with this."""
    awaited: int = 0
    """Children it awaits just now; while there are any, it takes no slot."""
    excused: bool = False
    """Should the process die now, that was not its fault; see ``store.blame``."""
    look_at: float = 0.0
    """When, by the loop's clock, to look again whether it is to be excused."""
    looks: int = 0
    outcome: TaskOutcome | None = None
    children: set[str] = field(default_factory=set)
    """The paths of those it has asked for."""
    unheard: set[str] = field(default_factory=set)
    """What was said into its run when it would have ended before, and it went on to hear it."""
    undoes: bool = False
    """It has stopped, and what it has done is being undone."""
    begun: bool = False
    unborn: bool = False
    """Its row is still to be inserted."""
    task: "asyncio.Task[None] | None" = None
    journal: DurableJournal | None = None
    identity: TaskId | None = field(init=False)
    """The task's id; a run's root has none."""

    def __post_init__(self) -> None:
        self.identity = task_id(self.local.snapshot.id, self.path) if self.path else None

    @property
    def ordered(self) -> bool:
        """Whether it was told to stop for good."""
        stops = self.local.stops and not self.undoing
        return self.cancelled or self.dismissed is not None or stops

    @property
    def undoing(self) -> bool:
        """Whether it undoes something, which a run that is being stopped still does."""
        return UNDO_MARK in self.path

    def interrupt(self) -> None:
        """Make it see an order; one that has not begun sees it by itself when it does."""
        if (self.undoing and not self.ordered) or (self.undoes and not self.local.stops):
            return
        if self.task is not None and (self.begun or not self.ordered):
            self.task.cancel()


def root_kind(request: RunRequest) -> str:
    """The kind of a run's root task, by which its handler is found."""
    return f"run.{request.kind}"


def as_stored(value: Any) -> Any:
    """``value`` as it will be read back, so that a replay sees what the first attempt saw.

    Raises ``TypeError``, ``ValueError`` or ``RecursionError`` for what is not JSON.
    """
    if value is None or type(value) in (str, bool, int):
        return value
    return json.loads(json.dumps(value, allow_nan=False))


def outcome_of(row: Row[Any], *, found: bool = False) -> TaskOutcome:
    """How a stored task ended; ``found`` where it had before it was asked for."""
    if isinstance(row.output, Unreadable):
        bad = InternalError(
            f"The stored output of the task {row.path!r} cannot be read: {row.output}."
        )
        return TaskOutcome("failed", error=error_info(bad), begun=True)
    when = row.ended_at if found else None
    error = error_of(row.error)
    return TaskOutcome(row.status, row.output, error, begun=row.attempts > 0, found=when)


def snapshot_of(row: Row[Any]) -> RunSnapshot:
    """A stored run as its tasks see it."""
    request = RunRequest.model_validate(row.request)
    return RunSnapshot(
        id=RunId(row.id),
        tenant=Tenant(row.tenant),
        request=request,
        created_at=row.created_at,
        parent_id=RunId(row.parent_id) if row.parent_id else None,
        forked_from=RunId(row.forked_from) if row.forked_from else None,
        budget=request.budget,
        principal=row.principal,
    )
