"""A journal that forgets nothing and can die at any boundary, to test durable code.

Leans on the in-memory journal. Refuses to know what is tested: ``attempts`` runs a handler once
per prefix of its own ledger, as if the process had died right after each write.
"""

from collections.abc import Iterable
from typing import Any

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.events import EventBase
from agent_server.domain.ids import DEFAULT_TENANT, RunId, new_run_id
from agent_server.domain.runs import Budget, RunRequest
from agent_server.execution.ephemeral import EphemeralContext, EphemeralJournal
from agent_server.execution.ports import Estimate, RunSnapshot, StepRecord

__all__ = [
    "EphemeralContext",
    "EphemeralJournal",
    "RecordingJournal",
    "memory_context",
    "prefixes",
]


class RecordingJournal(EphemeralJournal):
    """Keeps what a durable journal would hold: ``events``, and ``writes`` in commit order.

    ``writes`` has a step as ``started`` only where it was begun with ``commit=True``.
    """

    def __init__(self, run_id: RunId, **options: Any) -> None:
        super().__init__(run_id, on_event=self._keep, **options)
        self.events: list[EventBase] = []
        self.deltas: list[str] = []
        self.writes: list[StepRecord] = []

    def _keep(self, event: EventBase) -> None:
        if event.transient:
            self.deltas.append(getattr(event, "text", ""))
        else:
            self.events.append(event)

    def types(self) -> list[str]:
        """The events' types, in order."""
        return [getattr(event, "type", "") for event in self.events]

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> int | None:
        most = await super().begin(step, commit=commit, estimate=estimate)
        if commit:
            self.writes.append(step)
        return most

    async def finish(self, step: StepRecord, *, commit: bool = True) -> None:
        await super().finish(step, commit=commit)
        self.writes.append(step)


def memory_context(
    request: RunRequest | None = None,
    *,
    recorded: Iterable[StepRecord] = (),
    path: str = "",
    payload: JsonObject | None = None,
    run_id: RunId | None = None,
    budget: Budget | None = None,
    attempt: int = 1,
) -> tuple[EphemeralContext, RecordingJournal]:
    """A task context in memory and its journal, which starts with the ``recorded`` steps."""
    identity = run_id or new_run_id()
    run = RunSnapshot(
        id=identity,
        tenant=DEFAULT_TENANT,
        request=request or RunRequest(agent="agent", input="hi"),
        created_at=utcnow(),
        budget=budget,
    )
    journal = RecordingJournal(identity, scope=path, recorded=recorded, budget=budget)
    context = EphemeralContext(run, journal=journal, path=path, payload=payload, attempt=attempt)
    return context, journal


def prefixes(writes: list[StepRecord]) -> list[list[StepRecord]]:
    """What the ledger holds after a crash at each boundary: none of the writes, one, …, all.

    A later write of a step replaces the earlier one at its place, as an upsert does.
    """
    held: list[list[StepRecord]] = []
    for length in range(len(writes) + 1):
        steps: dict[str, StepRecord] = {}
        for step in writes[:length]:
            steps[step.key] = step
        held.append(list(steps.values()))
    return held
