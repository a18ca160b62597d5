"""The watch: what no local event tells of the tasks that this process carries out or awaits.

Leans on the roster and the store, and looks at the database when told to and every ``POLL_S``. Refuses to carry
anything out.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup

from agent_server.domain.errors import ErrorInfo, RunCancelled
from agent_server.domain.runs import RunStatus
from agent_server.execution import store
from agent_server.execution.attempts import Attempt, outcome_of
from agent_server.execution.commits import PASSING
from agent_server.execution.pause import wait_nudged
from agent_server.execution.roster import Roster

log = structlog.get_logger(__name__)

POLL_S = 1.0
"""How often due tasks, cancellations and children on other nodes are looked for."""
LOOK_MOST_S = 32.0
"""Whether a task that awaits others stands above one that waits is looked for ever more rarely,
down to so often."""
STRAY_S = 3.0
"""How often also tasks are looked for that are stored as carried out here and are not."""


class Watch:
    """Looks for ends on other nodes, orders from elsewhere, and tasks that slipped."""

    def __init__(self, roster: Roster, blame: store.BlameRule) -> None:
        self._roster = roster
        self._blame = blame
        self._seen_ended: set[str] = set()
        self.queued = 0
        """Tasks that waited for a worker when last looked, over all tenants."""

    async def run(self) -> None:
        """What no local event tells: ends on other nodes, cancellations, tasks that slipped."""
        async with anyio.create_task_group() as group:
            await self._watch(group)

    async def _watch(self, group: TaskGroup) -> None:
        stray: set[tuple[str, str, int]] = set()
        clock = asyncio.get_running_loop().time
        next_stray = clock() + STRAY_S
        while True:
            await wait_nudged(self._roster.look, POLL_S)
            try:
                await self._look_for_ends()
                await self._look_for_orders(group)
                await self._excuse()
                if clock() >= next_stray:
                    next_stray = clock() + STRAY_S
                    stray = await self._release_stray(stray)
            except PASSING as error:
                log.warning("cannot watch the database", error=error.detail)
            except Exception:
                log.exception("cannot watch the database")

    async def _look_for_ends(self) -> None:
        waiters = self._roster.waiters
        for key in [k for k, futures in waiters.items() if all(f.done() for f in futures)]:
            del waiters[key]
        elsewhere = [key for key in waiters if not self._roster.carries_out(*key)]
        if elsewhere:
            rows = await self._roster.database.read(lambda c: store.ended_tasks(c, elsewhere))
            for row in rows:
                self._roster.answer(row.run_id, row.path, outcome_of(row))

    async def _look_for_orders(self, group: TaskGroup) -> None:
        """Cancel what somebody cancelled elsewhere, let go of what is paused, and drop what
        belongs to a run that has ended or was erased."""
        local = list(self._roster.runs)
        if not local:
            return
        node = self._roster.node
        rows, halted, erased = await self._roster.database.read(
            lambda c: (
                store.orders(c, local),
                store.halted_here(c, node),
                store.erased_among(c, local),
            )
        )
        self._halt(halted, group)
        ended = erased | {row.id for row in rows if RunStatus(row.status).ended}
        for run_id in ended & self._seen_ended:
            self._drop(run_id)
        self._seen_ended = ended
        for row in rows:
            here = self._roster.runs.get(row.id)
            if here is not None and row.id not in ended and here.cancel_reason is None:
                # Here at once, so that the next look does not order it again.
                here.cancel_reason = row.cancel_reason
                group.start_soon(self._roster.cancel, row.id, row.cancel_reason)

    def _drop(self, run_id: str) -> None:
        """Stop what nobody waits for any more, without a word."""
        here = self._roster.runs.get(run_id)
        for attempt in list(here.attempts.values()) if here is not None else ():
            attempt.lost = True
            if attempt.journal is not None:
                attempt.journal.close()
            if attempt.task is not None:
                attempt.task.cancel()

    def _halt(self, rows: Sequence[Any], group: TaskGroup) -> None:
        held: list[Attempt] = []
        for row in rows:
            here = self._roster.runs.get(row.run_id)
            attempt = here.attempts.get(row.path) if here is not None else None
            if attempt is None or attempt.epoch != row.epoch or attempt.held:
                continue
            if row.halt == store.PAUSE:
                attempt.held = True
                held.append(attempt)
            elif row.error["code"] == RunCancelled.code:
                if not attempt.cancelled:
                    attempt.cancelled = True
                    attempt.interrupt()
            elif attempt.dismissed is None:
                attempt.dismissed = ErrorInfo.model_validate(row.error)
                group.start_soon(self._roster.dismiss, attempt, attempt.dismissed)
        if held:
            group.start_soon(self._roster.hold, held)

    async def _excuse(self) -> None:
        """Excuse what has outlived its trial: suspects, and tasks that only stand above what
        waits; see ``store.blame``."""
        now = asyncio.get_running_loop().time()
        due: dict[tuple[str, str], Attempt] = {}
        for run_id, local in self._roster.runs.items():
            for path, attempt in local.attempts.items():
                tried = self._blame.tried(attempt.losses)
                if attempt.excused or not (attempt.awaited or tried):
                    attempt.look_at, attempt.looks = 0.0, 0
                    continue
                if not attempt.look_at:
                    trial_s = self._blame.trial_s(attempt.epoch)
                    attempt.look_at = now + trial_s
                    if tried:  # Others wait for their trial.
                        asyncio.get_running_loop().call_later(trial_s, self._roster.look.set)
                elif now >= attempt.look_at:
                    due[run_id, path] = attempt
                    attempt.looks += 1
                    attempt.look_at = now + min(LOOK_MOST_S, 2.0**attempt.looks)
        if due:
            node, keys, suspect = self._roster.node, list(due), self._blame.suspect
            for key in await self._roster.database.write(
                lambda c: store.excuse(c, node, keys, suspect)
            ):
                due[key].excused, due[key].losses = True, 0

    async def _release_stray(
        self, suspects: set[tuple[str, str, int]]
    ) -> set[tuple[str, str, int]]:
        """Queue again what is stored as carried out here and is not, seen twice in a row."""
        node = self._roster.node
        held, self.queued = await self._roster.database.read(
            lambda c: (store.held_tasks(c, node), store.queue_depth(c))
        )
        stray = {key for key in held if not self._roster.carries_out(key[0], key[1])}
        for run_id, path, epoch in stray & suspects:
            log.warning("task was not being carried out; queued again", run_id=run_id, path=path)
            await self._roster.database.write(
                lambda c, r=run_id, p=path, e=epoch: store.release_task(  # type: ignore[misc]
                    c, r, p, node, e, lost=False
                )
            )
            self._roster.offer()
        if await self._roster.database.write(store.free_lanes):
            self._roster.offer()
        return stray - suspects
