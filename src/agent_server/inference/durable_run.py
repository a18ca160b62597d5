"""One durable run of an agent: what its models and tools share, and how it is stopped.

Leans on the journal's port and on asyncio. Refuses to know the SDK's loop: what must leave that
loop intact (``Suspend``, a lost lease, cancellation) is kept here, since the SDK turns
exceptions of tools into text for the model.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    nullcontext,
)
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from agents import FunctionTool, ModelProvider

from agent_server.domain.agents import ApprovalTerms, ToolEffect
from agent_server.execution.permits import Permits, held, holding
from agent_server.execution.ports import Journal, StepRecord, Suspend, TaskContext
from agent_server.inference.attachments import Fetch
from agent_server.inference.audit import AUDIT
from agent_server.inference.claims import Ledger, Scope
from agent_server.inference.prices import Prices

T = TypeVar("T")


class ToolPolicies(Protocol):
    """What the operator decided about tools; asked at each call."""

    def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
        """What calling ``tool`` twice would do. ``annotations`` are the hints that an MCP server
        gave: ``read_only`` and ``idempotent``, each True, False or None."""

    def timeout_s(self, tool: str) -> float | None:
        """Seconds a call may take; None leaves it to the settings."""

    def max_concurrent(self, tool: str | None = None, agent: str | None = None) -> int | None:
        """How many calls of the tool, or tasks of the agent, may be at once over all nodes."""

    def reconciler(self, tool: str) -> FunctionTool | None:
        """What can say how a call of ``tool`` went that is in doubt; None: a person must."""

    def approval(
        self, tool: str, tags: frozenset[str] = frozenset(), agent: str | None = None
    ) -> ApprovalTerms | None:
        """How a person's consent to a call by ``agent`` (its name; ``"*"``: by any; None: by no
        agent) is asked for; None where none is needed."""


class HintedPolicies:
    """Policies without a policy file: ``once``, unless an MCP server's hints say better."""

    def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
        return effect_of_hints(annotations)

    def timeout_s(self, tool: str) -> float | None:
        return None

    def max_concurrent(self, tool: str | None = None, agent: str | None = None) -> int | None:
        return None

    def reconciler(self, tool: str) -> FunctionTool | None:
        return None

    def approval(
        self, tool: str, tags: frozenset[str] = frozenset(), agent: str | None = None
    ) -> ApprovalTerms | None:
        return None


def effect_of_hints(annotations: Mapping[str, Any] | None) -> ToolEffect:
    """The effect that an MCP tool's hints claim; ``once`` where they say nothing."""
    if annotations is not None:
        if annotations.get("read_only"):
            return ToolEffect.NONE
        if annotations.get("idempotent"):
            return ToolEffect.IDEMPOTENT
    return ToolEffect.ONCE


@dataclass
class DurableRun:
    """One call of ``AgentLoop.run``, shared by every agent that runs inside it."""

    ctx: TaskContext
    provider: ModelProvider
    policies: ToolPolicies
    default_model: str
    model_retries: int
    tool_timeout_s: float
    max_depth: int
    """Agents that may stand around an agent."""
    prices: Prices
    assumed_output_tokens: int
    permits: Permits | None = None
    throttle: "Throttle | None" = None
    tracing_disabled: bool = True
    one_call: bool = False
    """It is one tool call outside any agent, and as a rule all that its task does."""
    services: Mapping[type[Any], Any] = field(default_factory=dict)
    """What the server lends to its own tools, by what it is."""
    fetch: Fetch | None = None
    """Whoever keeps the files that a conversation names."""
    private_links: bool = False
    """Whether a conversation may link to what is not on the public internet."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    stopped: BaseException | None = None
    seen: dict[int, Any] = field(default_factory=dict)
    """The calls that models wished for (``approvals.SeenCall``), by the identity of the wish."""
    _acting: set[str] = field(default_factory=set)
    _quiet: "asyncio.Event" = field(default_factory=asyncio.Event)

    @property
    def journal(self) -> Journal:
        return self.ctx.journal

    def check(self) -> None:
        """Let nothing begin once the run is stopped; raises what stopped it."""
        if self.stopped is not None:
            raise self.stopped

    def stop(self, reason: BaseException) -> None:
        """Nothing of this run begins from now on; the first reason counts."""
        if self.stopped is None:
            self.stopped = reason

    def permitted(
        self, *, tool: str | None = None, agent: str | None = None
    ) -> AbstractAsyncContextManager[None]:
        """While in it, this is one of those calls of ``tool``, or tasks of ``agent``, that may be at
        once; waits for its turn."""
        most = self.policies.max_concurrent(tool, agent)
        name = f"tool {tool}" if tool is not None else f"agent {agent}"
        if most is None or self.permits is None or AUDIT.get() is not None or held(name):
            return nullcontext()
        return self._permitted(self.permits, name, most)

    @asynccontextmanager
    async def _permitted(self, permits: Permits, name: str, most: int) -> AsyncIterator[None]:
        holder = await self.write(permits.take(self.ctx, name, most))
        with holding(name):
            try:
                yield
            finally:
                await self.at_home(permits.give_back(name, holder))

    async def write(self, entry: Coroutine[Any, Any, T]) -> T:
        """Await a journal's write, from whichever loop; what it raises stops the run."""
        try:
            if asyncio.get_running_loop() is self.loop:
                return await entry
            return await self.at_home(entry)
        except Exception as error:
            self.stop(error)
            raise

    async def at_home(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` on the run's own loop: a tool in a thread may run agents on another."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def acts(self, key: str) -> None:
        """The tool call ``key`` acts, until it has ``acted``: ``suspend`` lets it end, so that none is
        cut off."""
        self._acting.add(key)
        self._quiet.clear()

    def acted(self, key: str) -> None:
        self._acting.discard(key)
        if not self._acting:
            self.on_loop(self._quiet.set)

    def on_loop(self, act: Callable[..., None], *args: Any) -> None:
        """``act(*args)`` on the run's own loop: at once if this is it."""
        if asyncio.get_running_loop() is self.loop:
            act(*args)
        else:
            self.loop.call_soon_threadsafe(act, *args)

    async def quiet(self, within_s: float | None = None) -> None:
        """Return when no tool acts, or after ``within_s``."""
        if not self._acting:
            return
        try:
            await asyncio.wait_for(self._quiet.wait(), within_s)
        except (asyncio.TimeoutError, TimeoutError):
            return

    async def suspend(self, key: str, reason: Suspend) -> None:
        """Stop the run at the call ``key`` to wait for a decision. Raises ``reason``, or what
        stopped the run before.

        Tools that act are let end first; not those that this call is itself a part of.
        """
        self.stop(reason)
        self._acting = {other for other in self._acting if not key.startswith(f"{other}/")}
        await self.at_home(self.quiet())
        self.check()


class Throttle(Protocol):
    """See ``throttle.Throttle``."""

    def counts_tokens(self, model: str) -> bool: ...
    async def turn(self, run: DurableRun, step: StepRecord, tokens: int) -> None: ...
    async def settle(self, model: str, more: int) -> None: ...
    async def refused(self, run: DurableRun, step: StepRecord, error: Exception) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where in the run the current code is: its run, and the scope of its steps."""

    run: DurableRun
    scope: Scope
    depth: int = 0
    """Tool calls around it."""

    def inside(self, key: str) -> "Place":
        """The place of what the tool call ``key`` does."""
        return Place(self.run, self.scope.ledger.scope(key), self.depth + 1)


PLACE: ContextVar[Place | None] = ContextVar("agent_server_place", default=None)
"""Set inside a durable run, and inherited by whatever tasks and threads it starts."""


class At:
    """Runs its block at a place. Written out, since each call of a tool passes through two."""

    __slots__ = ("_place", "_token")

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> None:
        self._token = PLACE.set(self._place)

    def __exit__(self, *_: object) -> None:
        PLACE.reset(self._token)


def enter(run: DurableRun, *parts: str) -> Place:
    """The place below the journal's own scope named by ``parts``."""
    journal = run.journal
    named = [part for part in parts if part]
    prefix = journal.key(*named) if named else journal.scope
    return Place(run, Ledger.of(journal).scope(prefix))
