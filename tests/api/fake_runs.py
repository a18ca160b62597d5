"""Runs in memory, for tests of the doors: they do what a test tells them and nothing else.

Leans on the live side of the real event log, so that following is the real thing.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from agent_server.api.ports import ApproachInfo, ModelInfo
from agent_server.domain.agents import AgentInfo, LoadError, ToolInfo
from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    IdempotencyMismatch,
    InvalidCursor,
    NotFound,
    RunEnded,
    UnknownAgent,
)
from agent_server.domain.ids import RunId, Tenant, new_run_id
from agent_server.domain.plans import PlanState
from agent_server.domain.runs import Run, RunRequest, RunStatus, Step, Task
from agent_server.execution.events import EventHub, StoredEvent, Subscription
from agent_server.execution.paging import Page
from agent_server.execution.runs import Idempotency, RunFilters, Submitted

ENDS = {"run.succeeded", "run.failed", "run.cancelled"}


class FakeFollow:
    def __init__(self, stored: list[StoredEvent], subscription: Subscription) -> None:
        self._stored = stored
        self._subscription = subscription

    @property
    def lagged(self) -> bool:
        return self._subscription.lagged

    async def batches(self) -> AsyncIterator[Sequence[StoredEvent]]:
        if self._stored:
            yield self._stored
        while not self.lagged:
            taken, _ = await self._subscription.get()
            if taken:
                yield taken


class FakeRuns:
    def __init__(self, queue_size: int = 100) -> None:
        self.runs: dict[str, Run] = {}
        self.log: dict[str, list[StoredEvent]] = {}
        self.hub = EventHub(queue_size)
        self.keys: dict[str, tuple[str, str]] = {}
        self.principals: list[tuple[str, str]] = []
        self.ephemeral_gate = asyncio.Event()
        self.ephemeral_cancelled = asyncio.Event()
        self.waiters: dict[str, asyncio.Event] = {}

    def say(self, run_id: str, kind: str, /, **fields: object) -> StoredEvent:
        """Let the run say something, and end it where that is the last word."""
        seq = None if kind == "message.delta" else len(self.log[run_id]) + 1
        data = json.dumps({"seq": seq, "v": 1, "type": kind, "run_id": run_id, **fields})
        event = StoredEvent(seq, kind, data.encode())
        if seq is not None:
            self.log[run_id].append(event)
        if kind in ENDS:
            status = RunStatus(kind.removeprefix("run."))
            self.runs[run_id] = self.runs[run_id].model_copy(
                update={"status": status, "output": fields.get("output"), "ended_at": utcnow()}
            )
            self.waiters[run_id].set()
        self.hub.publish(run_id, [event])
        return event

    async def submit(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
    ) -> Submitted:
        if request.agent == "nobody":
            raise UnknownAgent("There is no agent 'nobody'.", hint="Did you mean 'clerk'?")
        if idempotency is not None and idempotency.key in self.keys:
            fingerprint, run_id = self.keys[idempotency.key]
            if fingerprint != idempotency.fingerprint:
                raise IdempotencyMismatch("The key was used with another body.")
            return Submitted(self.runs[run_id], True)
        self.principals.append((tenant, principal))
        run_id = new_run_id()
        run = Run(
            id=run_id,
            kind=request.kind,
            status=RunStatus.RUNNING,
            goal=request.goal,
            agent=request.agent,
            input=request.input,
            created_at=utcnow(),
        )
        self.runs[run_id], self.log[run_id] = run, []
        self.waiters[run_id] = asyncio.Event()
        if idempotency is not None:
            self.keys[idempotency.key] = (idempotency.fingerprint, run_id)
        self.say(run_id, "run.created", kind=request.kind, name="x")
        if request.metadata.get("end_at_once"):
            self.say(run_id, "run.succeeded", output="done")
            run = self.runs[run_id]
        return Submitted(run, False)

    async def submit_followed(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
        deltas: bool = True,
    ) -> tuple[Submitted, AbstractAsyncContextManager[FakeFollow]]:
        made = await self.submit(
            request, tenant=tenant, principal=principal, idempotency=idempotency
        )
        return made, self.follow(tenant, made.run.id, 0, deltas=deltas)

    async def run_ephemeral(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        on_event: Callable[[StoredEvent], None] | None = None,
        steers: Any = None,
    ) -> Run:
        if request.agent == "nobody":
            raise UnknownAgent("There is no agent 'nobody'.")
        tell = on_event or (lambda event: None)
        tell(StoredEvent(1, "run.created", b'{"type":"run.created"}'))
        try:
            if request.metadata.get("wait"):
                await self.ephemeral_gate.wait()
        except asyncio.CancelledError:
            self.ephemeral_cancelled.set()
            raise
        tell(StoredEvent(None, "message.delta", b'{"type":"message.delta","text":"hi"}'))
        tell(StoredEvent(2, "run.succeeded", b'{"type":"run.succeeded"}'))
        return Run(id=new_run_id(), kind="agent", status=RunStatus.SUCCEEDED, created_at=utcnow())

    async def get(self, tenant: Tenant, run_id: RunId) -> Run:
        if run_id not in self.runs:
            raise NotFound(f"There is no run {run_id!r}.")
        return self.runs[run_id]

    async def list(
        self, tenant: Tenant, *, filters: RunFilters, limit: int, cursor: str | None
    ) -> Page[Run]:
        if cursor is not None:
            raise InvalidCursor("not a cursor")
        found = [r for r in self.runs.values() if filters.status in (None, r.status)]
        return Page(found[:limit], "bmV4dA" if len(found) > limit else None)

    async def wait(self, tenant: Tenant, run_id: RunId, timeout_s: float) -> Run:
        await self.get(tenant, run_id)
        try:
            await asyncio.wait_for(self.waiters[run_id].wait(), timeout_s)
        except asyncio.TimeoutError:
            pass
        return self.runs[run_id]

    async def cancel(self, tenant: Tenant, run_id: RunId, reason: str) -> Run:
        run = await self.get(tenant, run_id)
        if run.status.ended:
            raise RunEnded(f"The run {run_id!r} has ended.")
        self.say(run_id, "run.cancelled", reason=reason)
        return self.runs[run_id]

    async def events(
        self, tenant: Tenant, run_id: RunId, after: int, limit: int
    ) -> Sequence[StoredEvent]:
        return self.log[run_id][after : after + limit]

    @asynccontextmanager
    async def follow(
        self, tenant: Tenant, run_id: RunId, after: int, *, deltas: bool = True
    ) -> AsyncIterator[FakeFollow]:
        await self.get(tenant, run_id)
        subscription = self.hub.subscribe(run_id, deltas=deltas)
        try:
            yield FakeFollow(self.log[run_id][after:], subscription)
        finally:
            self.hub.unsubscribe(run_id, subscription)

    async def plan(self, tenant: Tenant, run_id: RunId) -> PlanState:
        await self.get(tenant, run_id)
        return PlanState(tasks=())

    async def tasks(self, tenant: Tenant, run_id: RunId) -> Sequence[Task]:
        await self.get(tenant, run_id)
        return []

    async def steps(
        self, tenant: Tenant, run_id: RunId, *, limit: int, cursor: str | None
    ) -> Page[Step]:
        await self.get(tenant, run_id)
        return Page([], None)


class NoWorkflows:
    """None are stored, and nothing else is asked of it."""

    async def get(self, tenant: Tenant, name: str, version: str | None = None) -> Any:
        raise NotFound(f"There is no stored workflow {name!r}.")


class FakeCatalog:
    def agents(self) -> Sequence[AgentInfo]:
        return [AgentInfo(name="clerk", title="Clerk")]

    def load_errors(self) -> Sequence[LoadError]:
        return [LoadError(source="bad.py", line=3, message="SyntaxError")]

    async def tools(self) -> Sequence[ToolInfo]:
        return [ToolInfo(name="add")]

    def approaches(self) -> Sequence[ApproachInfo]:
        return [ApproachInfo(name="react")]

    def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo(name="demo", default=True)]
