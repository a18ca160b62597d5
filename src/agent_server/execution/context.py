"""What a handler is given while the engine carries its task out.

Leans on the journal and on the children. Refuses to know what the handler does with it.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from agent_server.domain.runs import WaitingFor
from agent_server.execution.attempts import Attempt, as_stored
from agent_server.execution.children import Children
from agent_server.execution.journal import DurableJournal
from agent_server.execution.ports import (
    ApprovalAsk,
    ApprovalDecision,
    SignalReceived,
    StepRecord,
    TaskOutcome,
    TaskSpec,
)
from agent_server.execution.roster import Roster
from agent_server.execution.waits import Waits


class EngineContext:
    """See ``ports.TaskContext``."""

    def __init__(
        self,
        roster: Roster,
        children: Children,
        waits: Waits,
        attempt: Attempt,
        journal: DurableJournal,
    ) -> None:
        self._roster = roster
        self.run = attempt.local.snapshot
        self.path = attempt.path
        self.node = attempt.node
        self.payload = attempt.payload
        self.attempt = attempt.number
        self.journal = journal
        self._children = children
        self._waits = waits
        self._attempt = attempt
        self._journal = journal

    @contextmanager
    def idle(self) -> Iterator[None]:
        """See ``permits.idle``."""
        self._roster.yield_slot(self._attempt)
        try:
            yield
        finally:
            self._roster.take_slot_back(self._attempt)

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        return await self._children.run(self._attempt, self._journal, spec)

    async def give_up(self, scopes: tuple[str, ...]) -> None:
        await self._children.left_behind(self._attempt, scopes)

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        await self._children.skip(self._attempt, self._journal, spec, reason)

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        whole = self.journal.key(key)
        found = self._journal.step(whole)
        if found is not None:
            return found.output
        record = StepRecord(key=whole, kind="value", name=key)
        made = as_stored(await make())
        await self._journal.finish(record.done(made))
        return made

    async def wait_signal(
        self,
        name: str,
        *,
        key: str,
        until: datetime | None = None,
        waiting_for: WaitingFor | None = None,
    ) -> SignalReceived | None:
        return await self._waits.signal(self._attempt, self._journal, name, key, until, waiting_for)

    async def take_steers(self, *, key: str) -> list[SignalReceived]:
        return await self._waits.steers(self._attempt, self._journal, key)

    async def sleep_until(self, moment: datetime, *, key: str) -> None:
        await self._waits.sleep(self._journal, moment, key)

    async def ask_approval(self, ask: ApprovalAsk, *, key: str) -> ApprovalDecision:
        return await self._waits.approval(self._attempt, self._journal, ask, key)
