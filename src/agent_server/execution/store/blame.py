"""The SQL of blame: for which tasks the death of a process counts, so that one that kills its
workers is set aside, and none that was merely beside it.

Leans on the tables. Refuses to end a task: whoever takes up one that lost too many workers does.

A process that dies takes along whatever it carries out, and nobody can say what killed it: each of
these tasks has lost a worker. One that has lost a third of those it may (a *suspect*) is from then
on taken up on trial: one at a time, by a process that has lived for a lease without. So two suspects
never lose a worker by the same death: what kills its workers goes on losing them, what was beside it
does not, and a process that dies by itself, again and again, tries nobody.

A trial is outlived after an eighth of a lease, doubled with each time that the task was taken up
before, up to ``DOUBLED`` times: from then on the death is not its fault, and those before are
forgotten. A task that only stands above one that waits has outlived as much, suspect or not. What
kills its worker after any time up to the longest trial is set aside all the same, since its trials
grow beyond that.
"""

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import (
    Connection,
    case,
    exists,
    false,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from agent_server.storage.tables import tasks

DOUBLED = 12
"""Times that a trial doubles, up to some 500 leases."""
PUT_OFF_S = (0.5, 2.0)
"""After which a suspect that could not be tried comes into the queue again, by chance: else the node
that cannot try it might be the one that looks first each time."""

Key = tuple[str, str]
"""Run id and path."""


class Rule(NamedTuple):
    """How many workers a task may lose, and how long one that is dead is waited for."""

    most: int
    lease_s: float

    @property
    def suspect(self) -> int:
        """So many make a task a suspect."""
        return max(1, self.most // 3)

    def tried(self, losses: int) -> bool:
        """Whether a task that has lost so many is taken up on trial."""
        return self.suspect <= losses < self.most

    def trial_s(self, epoch: int) -> float:
        """How long a task taken up for the ``epoch``-th time has to live."""
        return self.lease_s / 8 * 2.0 ** min(epoch - 1, DOUBLED)


_CHILD = tasks.alias("child")
AWAITS_ONE_THAT_WAITS = case(
    (tasks.c.epoch == 0, false()),  # Never begun: whatever the run holds is not looked through.
    else_=exists(
        select(literal(1))
        .where(
            _CHILD.c.run_id == tasks.c.run_id,
            _CHILD.c.status == "waiting",
            or_(tasks.c.path == "", _CHILD.c.path.startswith(tasks.c.path + ".")),
        )
        .correlate(tasks)
    ),
)
"""Something below the task stands still."""


def put_off(connection: Connection, keys: Sequence[Key], now: datetime) -> None:
    """Bring the queued tasks ``keys`` into the queue again a little later."""
    if keys:
        connection.execute(
            update(tasks)
            .where(tuple_(tasks.c.run_id, tasks.c.path).in_(list(keys)))
            .values(wake_at=now + timedelta(seconds=random.uniform(*PUT_OFF_S)))
        )


def excuse(
    connection: Connection, owner: str, keys: Sequence[Key], suspect: int
) -> set[tuple[str, str]]:
    """Should ``owner`` die from now on, that was no fault of those of the tasks ``keys`` that are
    suspects, or below which something stands still. Which those are."""
    rows = connection.execute(
        update(tasks)
        .where(
            tuple_(tasks.c.run_id, tasks.c.path).in_(list(keys)),
            tasks.c.owner == owner,
            or_(tasks.c.losses >= suspect, AWAITS_ONE_THAT_WAITS),
        )
        .values(excused=True, losses=0)
        .returning(tasks.c.run_id, tasks.c.path)
    )
    return {(row.run_id, row.path) for row in rows}


def accuse(connection: Connection, owner: str, run_id: str, path: str) -> None:
    """The task that only stood above one that waits is at work again."""
    mine = (tasks.c.run_id == run_id, tasks.c.path == path, tasks.c.owner == owner)
    connection.execute(update(tasks).where(*mine).values(excused=False))
