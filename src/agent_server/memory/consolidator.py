"""Starts a consolidation behind each run that succeeded, once, also over a crash.

Leans on the events it is told of and, for those that a crash kept from it, on the tables. Refuses
to consolidate by itself: it submits the workflow of ``memory.consolidation`` as a run.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Any, Final, Protocol

import structlog
from sqlalchemy import Connection, literal, select

from agent_server.domain.base import utcnow
from agent_server.domain.errors import AgentServerError
from agent_server.domain.events import EventBase, RunSucceeded
from agent_server.domain.ids import RunId, Tenant
from agent_server.domain.runs import Budget, RunRequest, RunStatus
from agent_server.execution.runs import Idempotency
from agent_server.memory.consolidation import CONSOLIDATES, WORKFLOW
from agent_server.storage.database import Database
from agent_server.storage.tables import idempotency_keys, runs

LOOK_BACK: Final = timedelta(days=1)
"""How long ago a run may have ended and still be consolidated after a crash."""
LOOK_EVERY_S: Final = 300.0
_AT_ONCE: Final = 100

log = structlog.get_logger(__name__)


class Submit(Protocol):
    def __call__(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
        continues: RunId | None = None,
    ) -> Awaitable[Any]: ...


class Consolidator:
    """One per process. ``notice`` is told of events; ``start`` and ``stop`` hold its one task."""

    def __init__(self, database: Database, submit: Submit, *, max_tokens: int) -> None:
        """``max_tokens`` is the budget of one consolidation."""
        self._database = database
        self._submit = submit
        self._max_tokens = max_tokens
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._refused: set[str] = set()
        """Runs for which none can be begun, so that they hold up no others."""

    def notice(self, events: Sequence[EventBase]) -> None:
        """Told of what happened in this process."""
        if any(isinstance(event, RunSucceeded) for event in events):
            self._wake.set()

    async def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work(), name="consolidator")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        while True:
            try:
                while await self._begin_some() >= _AT_ONCE:
                    pass
            except AgentServerError as error:
                # The next look finds the same runs again.
                log.warning("consolidation is put off", reason=error.detail)
            try:
                await asyncio.wait_for(self._wake.wait(), LOOK_EVERY_S)
            except asyncio.TimeoutError:
                pass
            self._wake.clear()

    async def _begin_some(self) -> int:
        """Submit for runs that have none; how many."""
        refused = self._refused
        rows = await self._database.read(lambda c: _unconsolidated(c, _AT_ONCE + len(refused)))
        rows = [row for row in rows if row.id not in refused]
        for row in rows:
            request = RunRequest(
                workflow=WORKFLOW,
                variables={"run_id": row.id},
                model=row.request.get("model"),
                subject=row.subject,
                budget=Budget(max_model_calls=5, max_tokens=self._max_tokens),
                metadata={"consolidates": row.id},
            )
            key = f"{CONSOLIDATES}{row.id}"
            fingerprint = sha256(key.encode()).hexdigest()
            try:
                await self._submit(
                    request,
                    tenant=Tenant(row.tenant),
                    principal=row.principal,
                    idempotency=Idempotency(key, fingerprint),
                    continues=RunId(row.id),
                )
            except AgentServerError as error:
                if error.status >= 500:
                    raise
                log.warning("a run is not consolidated", run_id=row.id, reason=error.detail)
                refused.add(row.id)
        return len(rows)


def _unconsolidated(connection: Connection, limit: int) -> Sequence[Any]:
    """Runs that succeeded lately, said something, and were not consolidated."""
    begun = (
        select(literal(1))
        .where(
            idempotency_keys.c.tenant == runs.c.tenant,
            idempotency_keys.c.key == literal(CONSOLIDATES) + runs.c.id,
        )
        .exists()
    )
    return connection.execute(
        select(runs.c.id, runs.c.tenant, runs.c.principal, runs.c.subject, runs.c.request)
        .where(
            runs.c.status == RunStatus.SUCCEEDED.value,
            runs.c.kind.in_(("agent", "goal")),
            runs.c.ended_at > utcnow() - LOOK_BACK,
            ~begun,
        )
        .order_by(runs.c.ended_at)
        .limit(limit)
    ).all()
