"""Giving tasks up: whoever began them needs them no more, and they undo what they have done.

Leans on the roster and the store. Refuses to undo anything itself: a task that has something to
undo is marked on its row before it is told, and ends in order by whoever carries it out, or takes it
up after a crash.
"""

import asyncio
from collections.abc import Callable

from agent_server.domain.base import utcnow
from agent_server.execution import store
from agent_server.execution.attempts import Attempt
from agent_server.execution.ports import TaskOutcome
from agent_server.execution.roster import Roster, settle


class GivenUp:
    """The tasks that tasks carried out here give up."""

    def __init__(self, roster: Roster, undoes: Callable[[str], bool]) -> None:
        """``undoes``: whether a task of that kind may have something to undo."""
        self._roster = roster
        self._undoes = undoes

    async def one(self, parent: Attempt, path: str) -> None:
        """Cancel a task that the parent no longer awaits, and return when it has undone what it
        had done; of another that is slow to stop, sooner."""
        run_id, database = parent.local.snapshot.id, self._roster.database
        child = parent.local.attempts.get(path)
        if child is not None and child.task is not None:
            undoes = self._undoes(child.kind)
            if undoes:
                await database.write(lambda c: store.doom(c, run_id, path))
            child.cancelled = True
            child.interrupt()
            if undoes:  # However long that takes; what it awaits itself is bounded.
                await asyncio.wait([child.task])
            else:
                await settle([child])
            if child.outcome is not None:
                return
        # Carried out by nobody here: queued, elsewhere, or just now put aside to wait.
        left = await database.write(lambda c: store.give_up(c, run_id, path, utcnow()))
        await self._ended(run_id, left)

    async def below(self, parent: Attempt, scopes: tuple[str, ...]) -> None:
        """Cancel what lives below ``scopes``, but for what undoes."""
        run_id = parent.local.snapshot.id
        found = await self._roster.database.read(lambda c: store.live_paths(c, run_id))
        self._roster.yield_slot(parent)
        try:
            for path in sorted(path for path in found if path.startswith(scopes)):
                if path not in parent.local.attempts or not parent.local.stops:
                    await self.one(parent, path)
        finally:
            self._roster.take_slot_back(parent)

    async def _ended(self, run_id: str, paths: list[str]) -> None:
        """Return when these tasks have ended, whoever carries them out."""
        loop = asyncio.get_running_loop()
        waiting: list[asyncio.Future[TaskOutcome]] = []
        for path in paths:
            future: asyncio.Future[TaskOutcome] = loop.create_future()
            self._roster.waiters.setdefault((run_id, path), []).append(future)
            waiting.append(future)
        if waiting:
            self._roster.offer()
            self._roster.order(run_id)
            await asyncio.wait(waiting)
