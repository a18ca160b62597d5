"""What the doors need from the floors below: runs, the catalogue, and the checks of readiness.

Leans on the domain and on the small values of ``execution``; ``server.py`` passes the parts in. Refuses to know how a run is
stored, planned or carried out.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from agent_server.domain.agents import AgentInfo, LoadError, ToolInfo
from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.ids import RunId, Tenant
from agent_server.domain.plans import PlanState
from agent_server.domain.runs import Run, RunRequest, Step, Task
from agent_server.domain.stored_workflows import (
    DryRun,
    DryRunRequest,
    Saved,
    SaveMode,
    StoredWorkflow,
    WorkflowGraph,
    WorkflowReport,
    WorkflowVersion,
)
from agent_server.execution.events import StoredEvent
from agent_server.execution.paging import Page
from agent_server.execution.ports import Fence, SignalReceived
from agent_server.execution.runs import Idempotency, RunFilters, Submitted

Items = list[JsonObject]


class Follow(Protocol):
    """A run's events as they come, the stored ones first."""

    @property
    def lagged(self) -> bool:
        """True when the reader was too slow and events were left out; nothing follows then."""

    def batches(self) -> AsyncIterator[Sequence[StoredEvent]]:
        """Whatever there is, each time there is something; ends after the run's last event."""


class RunsPort(Protocol):
    """Runs, as the doors see them. Unknown ids raise ``NotFound``."""

    async def submit(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
    ) -> Submitted: ...

    async def submit_followed(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
        deltas: bool = True,
        continues: RunId | None = None,
        given: Fence | None = None,
    ) -> tuple[Submitted, AbstractAsyncContextManager[Follow]]: ...

    async def run_ephemeral(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        on_event: Callable[[StoredEvent], None] | None = None,
        deltas: bool = True,
        steers: list[SignalReceived] | None = None,
    ) -> Run: ...

    async def get(self, tenant: Tenant, run_id: RunId) -> Run: ...

    async def submitted(self, tenant: Tenant, run_id: str) -> tuple[Run, RunRequest]: ...

    async def conversation(self, tenant: Tenant, run_id: str) -> Items: ...

    async def delete(self, tenant: Tenant, run_id: str) -> None: ...

    async def list(
        self, tenant: Tenant, *, filters: RunFilters, limit: int, cursor: str | None
    ) -> Page[Run]: ...

    async def wait(self, tenant: Tenant, run_id: RunId, timeout_s: float) -> Run: ...

    async def cancel(self, tenant: Tenant, run_id: RunId, reason: str) -> Run: ...

    async def events(
        self, tenant: Tenant, run_id: RunId, after: int, limit: int
    ) -> Sequence[StoredEvent]: ...

    def follow(
        self, tenant: Tenant, run_id: RunId, after: int, *, deltas: bool = True
    ) -> AbstractAsyncContextManager[Follow]: ...

    async def request(self, tenant: Tenant, run_id: RunId) -> RunRequest: ...

    async def plan(self, tenant: Tenant, run_id: RunId) -> PlanState: ...

    async def tasks(self, tenant: Tenant, run_id: RunId) -> Sequence[Task]: ...

    async def steps(
        self, tenant: Tenant, run_id: RunId, *, limit: int, cursor: str | None
    ) -> Page[Step]: ...


class WorkflowsPort(Protocol):
    """Stored workflows, as the doors see them. ``text`` is a definition, YAML or JSON. Unknown
    names raise ``NotFound``, a definition with faults ``InvalidWorkflow``."""

    async def save(
        self,
        tenant: Tenant,
        principal: str,
        text: str,
        mode: SaveMode,
        *,
        name: str | None = None,
        if_match: Collection[str] | None = None,
        if_none_match: Collection[str] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Saved: ...

    async def get(
        self, tenant: Tenant, name: str, version: str | None = None
    ) -> StoredWorkflow: ...

    async def list(
        self, tenant: Tenant, *, q: str | None, limit: int, before: tuple[datetime, str] | None
    ) -> tuple[Sequence[WorkflowVersion], tuple[datetime, str] | None]: ...

    async def versions(
        self, tenant: Tenant, name: str, *, limit: int, below: int | None
    ) -> tuple[Sequence[WorkflowVersion], int | None]: ...

    async def delete(
        self, tenant: Tenant, name: str, *, if_match: Collection[str] | None = None
    ) -> None: ...

    async def validate(self, tenant: Tenant, text: str) -> WorkflowReport: ...

    async def dry_run(self, tenant: Tenant, asked: DryRunRequest) -> DryRun: ...

    async def graph(
        self, tenant: Tenant, name: str, version: str | None = None
    ) -> WorkflowGraph: ...

    def graph_of_run(
        self, workflow: JsonObject, tasks: Sequence[Task], *, succeeded: bool
    ) -> WorkflowGraph: ...

    def graph_of_plan(self, plan: PlanState) -> WorkflowGraph: ...


class ApproachInfo(Frozen):
    """A way to solve a task, as the API lists it."""

    name: str
    description: str = ""


class ModelInfo(Frozen):
    """A model that runs may name, as the API lists it."""

    name: str
    provider: str = ""
    default: bool = False
    description: str = ""


class Catalog(Protocol):
    """What is served at this moment."""

    def agents(self) -> Sequence[AgentInfo]: ...

    def load_errors(self) -> Sequence[LoadError]: ...

    async def tools(self) -> Sequence[ToolInfo]: ...

    def approaches(self) -> Sequence[ApproachInfo]: ...

    def models(self) -> Sequence[ModelInfo]: ...


Check = Callable[[], Awaitable[None]]
"""Returns when a part is ready; raises when it is not."""

Metrics = Callable[[], tuple[bytes, str]]
"""The metrics in Prometheus' text format, and its media type."""

Observe = Callable[[str, str, int, float], None]
"""Told of each call: method, route template, status, seconds until the answer began."""
