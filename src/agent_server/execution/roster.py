"""What one process carries out at this moment: runs, slots and who waits here for which child.

Leans on asyncio and on what an attempt is. Refuses to decide and to write: the engine, its
children and its watch do, and share this.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from sqlalchemy import Connection

from agent_server.domain.errors import ErrorInfo
from agent_server.domain.events import EventBase
from agent_server.execution import store
from agent_server.execution.attempts import Attempt, LocalRun
from agent_server.execution.events import EventHub, Told
from agent_server.execution.ports import LostLease, TaskOutcome
from agent_server.execution.relay import Relay
from agent_server.storage.database import Database

CANCEL_WAIT_S = 5.0
SHARE_S = 0.03
"""How long the other nodes have to take what they are offered before this one does."""
AGAIN_S = 1.0
"""How often what is to stand still is told so again."""


class Roster:
    """The state of one node, changed only on its loop."""

    def __init__(
        self,
        *,
        node: str,
        database: Database,
        hub: EventHub,
        slots: int,
        tenant_slots: Mapping[str, int],
        observe: Callable[[list[EventBase]], None],
        tool_grace_s: float,
    ) -> None:
        """``slots``: how many tasks may be carried out side by side; 0 where none are.
        ``tenant_slots``: how many of one tenant on all nodes; ``*`` is any that is not named."""
        self.tenant_slots = tenant_slots
        self.tool_grace_s = tool_grace_s
        self.node = node
        self.database = database
        self.hub = hub
        self.observe = observe
        self.slots = slots
        self.busy = 0
        self.turns = store.Turns()
        self.contended = False
        """More was due when last looked than could be taken: what is new stands in the queue."""
        self.unseen = True
        """There may be more to take than was seen when last looked."""
        self.offered = False
        """Something was offered that only this node knows of so far."""
        self.runs: dict[str, LocalRun] = {}
        self.waiters: dict[tuple[str, str], list[asyncio.Future[TaskOutcome]]] = {}
        self.wake = asyncio.Event()
        """Set when there may be something to take."""
        self.look = asyncio.Event()
        """Set when something may have been decided or ended elsewhere."""
        self.draining = False
        self.workers = 1
        """Nodes that carry out tasks, this one included."""
        self._soon: asyncio.TimerHandle | None = None
        self.relay: Relay | None = None
        """Speaks to the other nodes, where there are any."""

    def free_slot(self, tenant: str | None = None) -> bool:
        """Whether a new task, of that tenant, may start here at once."""
        if tenant is not None and (tenant in self.tenant_slots or "*" in self.tenant_slots):
            return False  # Counted when it is taken.
        return not self.draining and not self.contended and self.busy < self.slots

    def carries_out(self, run_id: str, path: str) -> bool:
        return run_id in self.runs and path in self.runs[run_id].attempts

    def hears_all(self, run_id: str) -> bool:
        """Whether every task of the run that lives is carried out here."""
        local = self.runs.get(run_id)
        return local is not None and "" in local.attempts and not local.elsewhere

    def offer(self) -> None:
        """There may be something to take, here or on another node."""
        self.wake.set()
        if self.free_slot():
            self.offered = True  # The others are told if this node then cannot take it.
        else:
            self.tell_work()

    def tell_work(self) -> None:
        """Other nodes may find something to take."""
        if self.relay is not None:
            self.relay.tell_work()

    def freed(self) -> None:
        """A slot is free: look for a task, unless there was none left when last looked. One that has
        come since was offered."""
        if self.unseen or self.tenant_slots:
            self.wake.set()

    def share(self) -> None:
        """There is something to take, best by another node: this one looks a little later."""
        self.tell_work()
        self.wake_soon()

    def wake_soon(self) -> None:
        """Look for tasks when the other nodes have had time to."""
        if self._soon is None or self._soon.when() <= asyncio.get_running_loop().time():
            self._soon = asyncio.get_running_loop().call_later(SHARE_S, self.wake.set)

    def count_workers(self, number: int) -> None:
        """How many nodes carry out tasks; on any thread."""
        self.workers = number

    def crowded(self, parent: Attempt) -> bool:
        """Whether others could share the work of the parent's run: something besides the parent is
        at work in it here."""
        return self.workers > 1 and (
            parent.local.reserved > 0
            or any(
                path and path != parent.path and not attempt.awaited
                for path, attempt in parent.local.attempts.items()
            )
        )

    def order(self, run_id: str) -> None:
        """What is to happen with the run was changed: whoever carries it out looks at once."""
        self.look.set()
        if self.relay is not None:
            self.relay.tell_order(run_id)

    def heard_end(self, run_id: str, path: str) -> None:
        """Another node says that the task has ended."""
        if (run_id, path) in self.waiters:
            self.look.set()

    def heard_order(self, run_id: str) -> None:
        """Another node says that something was decided about the run."""
        if run_id in self.runs:
            self.look.set()

    def answer(self, run_id: str, path: str, outcome: TaskOutcome | None) -> None:
        """Tell whoever awaits the task here; without an outcome they go on waiting."""
        if outcome is None:
            return
        if run_id in self.runs:
            self.runs[run_id].elsewhere.discard(path)
        waiting = self.waiters.pop((run_id, path), ())
        if path and not waiting and self.relay is not None:
            self.relay.tell_ended(run_id, path)
        for future in waiting:
            if not future.done():
                future.set_result(outcome)

    def tell(self, run_id: str, told: Told) -> None:
        """Readers and observers hear of what was stored of the run, outside a journal."""
        if told:
            self.hub.publish(run_id, [stored for stored, _ in told])
            self.observe([event for _, event in told])

    def yield_slot(self, attempt: Attempt) -> None:
        """While it awaits children, the parent takes no slot."""
        attempt.awaited += 1
        if attempt.awaited == 1:
            self.busy -= 1
            self.freed()

    def take_slot_back(self, attempt: Attempt) -> None:
        attempt.awaited -= 1
        if attempt.awaited == 0:
            self.busy += 1

    async def cancel(self, run_id: str, reason: str) -> None:
        """Stop what this process carries out of the run; returns when it has stopped."""
        local = self.runs.get(run_id)
        if local is None:
            return
        local.cancel_reason = reason
        order_stop(local)
        await self._interrupt([a for path, a in local.attempts.items() if path])
        await self._interrupt(list(local.attempts.values()))

    async def hold(self, attempts: list[Attempt]) -> None:
        """Let go of the attempts, so that their tasks stand still; returns when it is done."""
        for attempt in attempts:
            attempt.held = True
            if attempt.journal is not None:
                attempt.journal.hold()
        await self._interrupt(attempts)
        while live := [a.task for a in attempts if a.task is not None and not a.task.done()]:
            # The SDK swallows a cancellation inside a tool; what it then wants waits.
            for task in live:
                task.cancel()
            await asyncio.wait(live, timeout=AGAIN_S)

    async def dismiss(self, attempt: Attempt, error: ErrorInfo) -> None:
        """Stop one task, which fails with ``error``."""
        attempt.dismissed = error
        if attempt.journal is not None:
            attempt.journal.halt()
        await self._interrupt([attempt])

    async def _interrupt(self, attempts: list[Attempt]) -> None:
        """A model call is broken off at once; a tool that must not be repeated has its grace."""
        journals = [attempt.journal for attempt in attempts if attempt.journal is not None]
        if journals:
            await asyncio.gather(*(journal.wait_safe(self.tool_grace_s) for journal in journals))
        for attempt in attempts:
            attempt.interrupt()
        await settle(attempts)

    def fence(self, connection: Connection, attempt: Attempt) -> None:
        """Raise ``LostLease`` unless this node still has the task."""
        run_id = attempt.local.snapshot.id
        if not store.holds(connection, run_id, attempt.path, self.node, attempt.epoch):
            raise LostLease(f"task {attempt.path!r} of {run_id} was taken over")


def order_stop(local: LocalRun) -> None:
    """Let nothing more begin in the run here."""
    for attempt in local.attempts.values():
        if attempt.journal is not None and not attempt.undoing:
            attempt.journal.halt()


async def settle(attempts: Iterable[Attempt]) -> None:
    """Wait, under a bound, until the interrupted ``attempts`` are over."""
    running = [attempt.task for attempt in attempts if attempt.task is not None]
    if running:
        await asyncio.wait(running, timeout=CANCEL_WAIT_S)
