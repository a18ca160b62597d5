"""The composition root: builds every part from the settings and joins them, once.

The one file that knows everyone, and that nobody below the command line knows. Leans on all
rooms; refuses to do any work of its own.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
from fastapi import FastAPI

from agent_server import __version__
from agent_server.actions.handler import Actions, ActionServices
from agent_server.actions.ssrf import GuardedHttp
from agent_server.actions.tasks import ActionTask
from agent_server.api.app import build_app
from agent_server.api.control import ControlRoutes
from agent_server.api.deps import ApiDeps
from agent_server.api.halts import HaltRoutes
from agent_server.api.history import HistoryRoutes
from agent_server.api.memories import MemoryRoutes
from agent_server.api.ports import ApproachInfo, ModelInfo
from agent_server.api.sessions import SessionRoutes
from agent_server.api.sse import Streams
from agent_server.auth.gate import Gate, require_safe
from agent_server.domain.agents import AgentInfo, LoadError, ToolInfo
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest, Unavailable
from agent_server.domain.events import EventBase
from agent_server.domain.ids import Tenant
from agent_server.domain.json_schema import schema_fault
from agent_server.domain.runs import RunRequest
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.execution.control import Control
from agent_server.execution.crash import crash_point
from agent_server.execution.engine import Engine
from agent_server.execution.events import EventHub
from agent_server.execution.halts import Halts
from agent_server.execution.history import History
from agent_server.execution.permits import Permits
from agent_server.execution.ports import Handler, TaskContext
from agent_server.execution.rates import Rates
from agent_server.execution.runs import Runs
from agent_server.execution.threads import ToolThreads
from agent_server.inference.agent_loop import AgentLoop
from agent_server.inference.attachments import check_links
from agent_server.inference.budgets import BudgetRules
from agent_server.inference.demo import NAME as DEMO
from agent_server.inference.prices import Prices
from agent_server.inference.providers import Providers
from agent_server.inference.throttle import Throttle
from agent_server.memory.apart import Apart
from agent_server.memory.consolidator import Consolidator
from agent_server.memory.conversations import Conversations
from agent_server.memory.desk import MemoryDesk
from agent_server.memory.documents import Documents
from agent_server.memory.erasure import Erasure
from agent_server.memory.experience import Experience, story_of
from agent_server.memory.long_term import LongTermMemory
from agent_server.memory.session_store import (
    SessionStore,
    append_items,
    branch_session,
    items_before,
)
from agent_server.memory.store import MemoryStore
from agent_server.memory.trimming import Trimming, Window
from agent_server.memory.turns import Turns
from agent_server.observability import Metrics, Redaction, log_end, secrets_of
from agent_server.planning.goal import GoalRun, check_edit
from agent_server.protocols.openai.deps import OpenAIDeps
from agent_server.protocols.openai.door import OpenAIDoor
from agent_server.reasoning.approaches import Approaches
from agent_server.reasoning.solver import Solver
from agent_server.reasoning.tasks import AgentRun, AgentTask
from agent_server.reasoning.thinking import Thinking
from agent_server.registry.connected import ConnectedLoop
from agent_server.registry.registry import Registry
from agent_server.settings import Settings
from agent_server.storage.database import Database, database_at, ping
from agent_server.storage.files import Files
from agent_server.storage.migrate import current_revision, head_revision, migrate, serves
from agent_server.storage.outside import keep_outside
from agent_server.workflow.calls import split_name
from agent_server.workflow.library import Library
from agent_server.workflow.tasks import handlers as workflow_handlers
from agent_server.workflow.tasks import timed
from agent_server.workflow.validation import check_inputs, validate

FEATURES = ("runs", "goals", "agents", "workflows", "sessions", "memories", "events")


@dataclass(frozen=True)
class Parts:
    """What a server is made of; ``create_app`` keeps it at ``app.state.parts``."""

    settings: Settings
    database: Database
    registry: Registry
    providers: Providers
    engine: Engine
    runs: Runs
    control: Control
    halts: Halts
    streams: Streams
    metrics: Metrics
    approaches: Approaches
    actions: Actions
    prices: Prices
    library: Library
    sessions: SessionStore
    memories: MemoryStore
    long_term: LongTermMemory
    files: Files
    memory: MemoryDesk
    erasure: Erasure
    consolidator: Consolidator | None
    history: History

    def drain(self) -> None:
        """The end has begun: not ready, no stream, no new work; tasks get the grace time."""
        self.streams.drain()
        self.engine.drain()


def create_app(settings: Settings, *, providers: Providers | None = None) -> FastAPI:
    """The application for ``settings``: nothing is opened before its lifespan begins.

    ``providers`` replaces where models come from, for tests and embedding. Raises
    ``ConfigurationError`` when the settings are not safe to serve.
    """
    require_safe(settings)
    parts = build_parts(settings, providers or Providers(settings))
    openai = _openai(parts)
    app = build_app(
        ApiDeps(
            settings=settings,
            runs=parts.runs,
            catalog=_Catalogue(parts),
            workflows=parts.library,
            gate=Gate(settings),
            streams=parts.streams,
            checks={"database": lambda: _check_database(parts.database)},
            metrics=parts.metrics.render,
            observe=parts.metrics.http_request,
            version=__version__,
            features=FEATURES,
        ),
        lambda app: _lifespan(parts),
        [
            *SessionRoutes(parts.sessions).routes(),
            *MemoryRoutes(parts.memory, parts.erasure, settings).routes(),
            *ControlRoutes(parts.control, settings).routes(),
            *HaltRoutes(parts.halts, settings).routes(),
            *HistoryRoutes(
                parts.history, settings, Redaction(secrets_of(settings), max_depth=1_000).value
            ).routes(),
            *openai.routes(),
        ],
        {"v1": openai.manners},
        openai.sockets(),
    )
    app.state.parts = parts
    app.state.drain = parts.drain
    return app


def _openai(parts: Parts) -> OpenAIDoor:
    embedding = parts.long_term.embedding
    return OpenAIDoor(
        OpenAIDeps(
            settings=parts.settings,
            runs=parts.runs,
            control=parts.control,
            catalog=_Catalogue(parts),
            workflows=parts.library,
            sessions=parts.sessions,
            conversations=Conversations(parts.database),
            files=parts.files,
            embedder=embedding.embedder if embedding is not None else None,
            streams=parts.streams,
        )
    )


def build_parts(
    settings: Settings, providers: Providers, *, sessions: SessionStore | None = None
) -> Parts:
    """Join the parts. Opens nothing. ``sessions`` replaces where conversations are kept, for
    replays."""
    metrics = Metrics()
    hub = EventHub(settings.stream_queue_size)
    registry = Registry(settings)

    def catalog() -> Any:
        return registry.snapshot

    prices = Prices(settings.prices, lambda: catalog().policies.prices)

    def transacted(mode: str, seconds: float, succeeded: bool) -> None:
        if succeeded:
            metrics.transaction(seconds)
        else:
            metrics.database_error()

    def observe(events: list[EventBase]) -> None:
        for event in events:
            metrics.observe(event)
            if event.ends_run:
                log_end(event)
        if consolidator is not None:
            consolidator.notice(events)

    database = database_at(
        settings.database, pool_size=settings.database_pool_size, observer=transacted
    )
    keep_outside(database, settings, metrics.blob, crash_point)
    long_term = LongTermMemory(database, settings)
    store = long_term.store
    documents = Documents(
        size=settings.memory_chunk_characters,
        overlap=settings.memory_chunk_overlap,
        apart=Apart(seconds=settings.document_read_s, memory_bytes=settings.document_read_bytes),
    )
    desk = MemoryDesk(database, store, documents)
    experience = (
        Experience(store, lambda ctx: story_of(runs, ctx)) if settings.memory_experience else None
    )
    history = sessions or SessionStore(database, store)

    async def summarise(ctx: TaskContext, text: str) -> str:
        return await thinking.summarise(ctx, text)

    trimming = Trimming(
        Window(settings.session_max_items, settings.session_max_tokens),
        summarise if settings.session_summaries else None,
    )
    files = Files(database, settings.max_files_bytes)
    bare_loop = AgentLoop(
        providers,
        settings,
        policies=registry,
        open_session=trimming.opener(history),
        services={MemoryDesk: desk},
        permits=Permits(database, lambda: engine.node),
        throttle=Throttle(
            Rates(database),
            settings.model_rates,
            provider=providers.provider,
            patience=timedelta(seconds=settings.model_rate_patience_s),
        ),
        prices=prices,
        fetch=files.whole,
    )
    loop = ConnectedLoop(bare_loop, registry)
    thinking = Thinking(loop)

    def call_tool(
        ctx: TaskContext, name: str, arguments: JsonObject, *, key: str
    ) -> Coroutine[Any, Any, Any]:
        return bare_loop.call_tool(ctx, catalog().tool(name), arguments, key=key)

    approaches = Approaches()
    actions = Actions(
        ActionServices(
            http=GuardedHttp(
                allow_private=settings.http_allow_private,
                timeout_s=settings.http_action_timeout_s,
            ),
            call_tool=call_tool,
            sleep=anyio.sleep,
        )
    )
    solver = Solver(catalog, loop, approaches)
    checks = _Checks(
        registry, providers, approaches, actions, database, settings.http_allow_private
    )
    of_workflows = dict(
        workflow_handlers(
            agent=AgentTask(solver, experience),
            call_tool=call_tool,
            actions=actions,
            max_parallel=settings.max_parallel_tasks,
            max_nodes=settings.max_run_nodes,
            stored=checks.library,
        )
    )
    goals = GoalRun(catalog, loop, actions, settings, experience)
    handlers: dict[str, Handler] = {
        "run.goal": goals,
        "plan": timed(goals.node),
        "run.agent": AgentRun(solver, lambda tenant, run_id: runs.conversation(tenant, run_id)),
        "action": ActionTask(actions),
        **of_workflows,
    }
    engine = Engine(
        database=database,
        hub=hub,
        settings=settings,
        handlers=handlers,
        append_items=Turns(store).append if settings.memory_sessions else append_items,
        observe=observe,
    )
    runs = Runs(
        database=database,
        engine=engine,
        hub=hub,
        settings=settings,
        limit=BudgetRules(
            settings,
            lambda request: catalog().models_of(request, settings.effective_model),
            of_agent=lambda agent: catalog().agent_budget(agent),
            limits_of=lambda tenant, key: catalog().limits(tenant, key),
            prices=prices,
        ).apply,
        prepare=checks,
        observe=observe,
    )
    consolidator = (
        Consolidator(database, runs.submit, max_tokens=settings.memory_consolidation_tokens)
        if settings.memory_consolidation and settings.effective_model != DEMO
        else None
    )
    streams = Streams(
        limit=settings.max_streams,
        per_key=settings.streams_per_key,
        ping_s=settings.stream_ping_s,
        on_open=metrics.stream_opened,
        on_close=lambda lagged: metrics.stream_closed(lagged=lagged),
    )
    metrics.watch_queue(lambda: engine.queued)
    return Parts(
        settings=settings,
        database=database,
        registry=registry,
        providers=providers,
        engine=engine,
        runs=runs,
        streams=streams,
        metrics=metrics,
        approaches=approaches,
        actions=actions,
        prices=prices,
        library=checks.library,
        control=Control(database=database, engine=engine),
        halts=Halts(
            runs,
            lambda request, plan: check_edit(
                plan, request, catalog(), actions, settings.max_plan_tasks
            ),
        ),
        sessions=history,
        memories=store,
        long_term=long_term,
        files=files,
        memory=desk,
        erasure=Erasure(database, store, runs.cancel),
        consolidator=consolidator,
        history=History(
            runs,
            effect_of=registry.effect,
            branch_session=branch_session,
            session_before=items_before,
            version=__version__,
        ),
    )


@asynccontextmanager
async def _lifespan(parts: Parts) -> AsyncIterator[None]:
    """Open in order, and close in the reverse order whatever happened."""
    asyncio.get_running_loop().set_default_executor(ToolThreads(parts.settings.tool_threads))
    await parts.database.open()
    try:
        await migrate(parts.database)
        await parts.long_term.open()
        await parts.registry.load()
        try:
            await parts.registry.start()
            await parts.engine.start()
            parts.long_term.start()
            if parts.consolidator is not None:
                await parts.consolidator.start()
            try:
                yield
            finally:
                if parts.consolidator is not None:
                    await parts.consolidator.stop()
                parts.drain()
                await parts.engine.stop()
                await parts.long_term.stop()
        finally:
            await parts.registry.close()
            await parts.providers.aclose()
    finally:
        await parts.database.close()


async def _check_database(database: Database) -> None:
    """Raises when the database does not answer or its schema is not one for this program."""

    def revision(connection: Any) -> str | None:
        ping(connection)
        return current_revision(connection)

    found = await database.read(revision)
    if not serves(found):
        raise Unavailable(f"The database is at revision {found!r}, not {head_revision()!r}.")


class _Catalogue:
    """What is served, in the API's words."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def agents(self) -> Sequence[AgentInfo]:
        return self._parts.registry.describe_agents()

    def load_errors(self) -> Sequence[LoadError]:
        return self._parts.registry.snapshot.errors

    async def tools(self) -> Sequence[ToolInfo]:
        return self._parts.registry.describe_tools()

    def approaches(self) -> Sequence[ApproachInfo]:
        return [
            ApproachInfo(name=entry["name"], description=entry["description"])
            for entry in self._parts.approaches.describe()
        ]

    def models(self) -> Sequence[ModelInfo]:
        return [
            ModelInfo(name=entry["id"], provider=entry["provider"], default=entry["default"])
            for entry in self._parts.providers.describe()
        ]


class _Names:
    """The names that a workflow may use, as its validation asks for them."""

    def __init__(self, registry: Registry, approaches: Approaches) -> None:
        catalog = registry.snapshot
        self._agents = catalog.agents
        self._tools = catalog.tools
        self._approaches = approaches.names

    def has_agent(self, name: str) -> bool:
        return name in self._agents

    def has_tool(self, name: str) -> bool:
        return name in self._tools

    def tool_parameters(self, name: str) -> JsonObject | None:
        tool = self._tools.get(name)
        return None if tool is None else tool.params_json_schema

    def agent_names(self) -> Sequence[str]:
        return tuple(self._agents)

    def tool_names(self) -> Sequence[str]:
        return tuple(self._tools)

    def approach_names(self) -> Sequence[str]:
        return self._approaches


class _Checks:
    """Every name in a request, looked up before anything is stored."""

    def __init__(
        self,
        registry: Registry,
        providers: Providers,
        approaches: Approaches,
        actions: Actions,
        database: Database,
        private_links: bool,
    ) -> None:
        self._private_links = private_links
        self._registry = registry
        self._providers = providers
        self._approaches = approaches
        self._actions = actions
        self.library = Library(database, self.definition)

    def definition(
        self, definition: JsonObject, workflows: Collection[str] | None
    ) -> WorkflowDefinition:
        """A workflow's definition, its names looked up. Raises ``InvalidWorkflow``."""
        names = _Names(self._registry, self._approaches)
        return validate(definition, names, actions=self._actions.names, workflows=workflows)

    async def __call__(self, request: RunRequest, tenant: Tenant) -> RunRequest:
        catalog = self._registry.snapshot
        for name in (*(request.agents or ()), *([request.agent] if request.agent else ())):
            catalog.agent(name)
        for name in request.tools or ():
            catalog.tool(name)
        if request.approach is not None:
            self._approaches.check(request.approach)
        if request.model is not None:
            self._providers.get_model(request.model)
        if not self._private_links:
            check_links(request.input)
        if isinstance(request.expected_output, dict):
            fault = schema_fault(request.expected_output)
            if fault is not None:
                raise InvalidRequest(
                    f"'expected_output' is not a valid JSON Schema: {fault}",
                    hint="Correct the schema, or say in words what is to come out.",
                )
        if request.workflow is not None:
            workflow = request.workflow
            if isinstance(workflow, str):
                workflow = await self.library.definition(tenant, *split_name(workflow))
            check_inputs(self.definition(workflow, None), request.variables)
            pinned = await self.library.pinned(
                tenant, workflow, stored=isinstance(request.workflow, str)
            )
            request = request.model_copy(update={"workflow": pinned})
        return request
