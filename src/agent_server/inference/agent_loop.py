"""The durable agent loop: runs an unchanged SDK agent so that a crash repeats nothing finished.

Leans on the SDK's ``Runner`` and on the ledgered models and tools. Refuses to know where agents
come from, how runs are stored, and what becomes of the result.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from traceback import format_exception
from typing import Any, Protocol, TypeVar

import structlog
from agents import Agent, FunctionTool, ModelProvider, RunHooks, RunItem
from agents.tool_context import ToolContext
from agents.usage import Usage

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ApprovalExpired, ToolError
from agent_server.execution.permits import Permits
from agent_server.execution.ports import Suspend, TaskContext
from agent_server.inference.approvals import SeenCall, ask, ask_for_all, needs_consent
from agent_server.inference.attachments import Fetch
from agent_server.inference.durable_run import (
    At,
    DurableRun,
    HintedPolicies,
    Place,
    Throttle,
    ToolPolicies,
    enter,
)
from agent_server.inference.failures import SEE_LOG, as_run_error
from agent_server.inference.hosting import install, run_at
from agent_server.inference.ledgered_model import History
from agent_server.inference.ledgered_tool import called, ledger
from agent_server.inference.prices import Prices
from agent_server.inference.steered import Steered
from agent_server.inference.tailored import calls_among, client_tools
from agent_server.inference.tool_output import json_value
from agent_server.settings import Settings

T = TypeVar("T")
_log = structlog.get_logger(__name__)
_STOPPING_S = 2.0
"""Seconds that tools get to notice that their run was cancelled."""


class RunSession(Protocol):
    """A session as one run sees it: what was there before, and what this run adds."""

    @property
    def shortened(self) -> bool:
        """Whether ``get_items`` gives less than was said, once it was asked."""

    async def get_items(self, limit: int | None = None) -> list[Any]: ...
    async def add_items(self, items: list[Any]) -> None: ...
    def staged(self, pending: Collection[str] = ()) -> list[JsonObject]:
        """What to store with the run's last transaction; ``pending`` are ids of calls whose output
        is still to come."""


OpenSession = Callable[[TaskContext, str], RunSession]
"""Opens the session of that id for the run."""


@dataclass(frozen=True)
class AgentResult:
    """What running an agent gave."""

    output: Any
    """The final output as a JSON value."""
    text: str
    """The final output as text: itself, or its JSON."""
    last_agent: str
    new_items: list[JsonObject] = field(default_factory=list)
    """What the run added to the conversation, as input items, with what was said into it meanwhile;
    the input itself is not in it."""
    session_items: list[JsonObject] = field(default_factory=list)
    """What the run adds to its session, to be stored with the run's last transaction."""
    calls: list[JsonObject] = field(default_factory=list)
    """Calls for the caller to carry out: ``call_id``, ``name``, ``arguments`` (JSON). With any,
    there is no final output yet."""


class AgentLoop:
    """Built once; runs any number of agents side by side."""

    def __init__(
        self,
        provider: ModelProvider,
        settings: Settings,
        *,
        policies: ToolPolicies | None = None,
        open_session: OpenSession | None = None,
        tracing: bool = False,
        services: Mapping[type[Any], Any] | None = None,
        prices: Prices | None = None,
        fetch: Fetch | None = None,
        permits: Permits | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        """``tracing`` lets the SDK make spans for processors that this process has set; without
        it a run makes none. ``services`` is what the server lends to its own tools, ``fetch`` how
        it gets files that a conversation names; ``permits`` and ``throttle`` hold what is limited.
        """
        self._permits = permits
        self._throttle = throttle
        self._services = services or {}
        self._fetch = fetch
        self._provider = provider
        self._settings = settings
        self._policies = policies or HintedPolicies()
        self._open_session = open_session
        self._tracing = tracing
        self._prices = prices or Prices(settings.prices)
        install()

    async def run(
        self,
        ctx: TaskContext,
        agent: Agent[Any],
        input: str | list[JsonObject],
        *,
        scope: str = "",
        model: str | None = None,
        session_id: str | None = None,
        context: Any = None,
        max_turns: int | None = None,
        hooks: RunHooks[Any] | None = None,
        listener: Agent[Any] | None = None,
    ) -> AgentResult:
        """Run ``agent`` to its final output, each model and tool call a step below ``scope``.

        ``model`` replaces the default for agents that name none. ``context`` is handed to tools,
        guardrails and dynamic instructions as the SDK does. With ``listener``, in a session or a
        run that is ``steerable``, what is said into the run meanwhile is put into the conversation
        at the next turn, after the input guardrails of ``listener`` have seen it. Called again after a crash with the
        same arguments, it goes on from the first step that is missing.

        Raises ``RunError`` when the run fails; ``Suspend`` when a call needs approval, or may or
        may not have happened before a crash. Cancellation stops the model call in flight at once
        and leaves a bounded moment to tools.
        """
        run = self._durable_run(ctx, model)
        async with run.permitted(agent=agent.name):
            return await self._run(
                run, agent, input, scope, session_id, context, max_turns, hooks, listener
            )

    async def _run(
        self,
        run: DurableRun,
        agent: Agent[Any],
        input: str | list[JsonObject],
        scope: str,
        session_id: str | None,
        context: Any,
        max_turns: int | None,
        hooks: RunHooks[Any] | None,
        listener: Agent[Any] | None,
    ) -> AgentResult:
        ctx = run.ctx
        place = enter(run, scope)
        turns = max_turns or self._settings.max_turns
        session = None
        history: list[Any] = []
        if session_id is not None and self._open_session is not None:
            session = self._open_session(ctx, session_id)
            history = await session.get_items()
        options = ctx.run.request.options
        heard = None
        if listener is not None and (
            session is not None or (options is not None and options.steerable)
        ):
            heard = Steered(place, listener, len(history))
        given: str | list[Any] = input
        if (session is not None or heard is not None) and isinstance(input, str):
            given = [{"role": "user", "content": input}]
        stored = session is not None and not session.shortened
        earlier = History(session_id, history) if session_id and history and stored else None
        speaker = agent
        new_items: list[JsonObject] = []
        while True:
            asked = [*history, *given] if history else given
            playing = run_at(
                place,
                speaker,
                asked,
                history=earlier,
                context=context,
                max_turns=turns,
                hooks=hooks,
                steered=heard,
            )
            result = await self._played(place, agent, turns, playing)
            theirs = client_tools(agent)
            await ask_for_all(place, [i for i in result.interruptions if i.name not in theirs])
            calls = calls_among(result.interruptions, theirs) if theirs else []
            added = [_input_item(one) for one in result.new_items if one.type not in _NOT_SAID]
            if isinstance(given, str):
                new_items = added
                break
            more: list[Any] = []
            if heard is not None:
                if not calls:
                    taken = heard.more(result.context_wrapper, result.last_agent)
                    more = await self._played(place, agent, turns, taken)
                added = heard.conversation([*given, *added], more)[len(given) :]
            new_items += added
            given = [*given, *added]
            if not more:
                if session is not None:
                    await session.add_items(given)
                break
            speaker = result.last_agent
        output = {"tool_calls": calls} if calls else json_value(result.final_output)
        pending = [call["call_id"] for call in calls]
        return AgentResult(
            output=output,
            text=output if isinstance(output, str) else json.dumps(output, ensure_ascii=False),
            last_agent=result.last_agent.name,
            new_items=new_items,
            session_items=session.staged(pending) if session is not None else [],
            calls=calls,
        )

    async def _played(
        self, place: Place, agent: Agent[Any], turns: int, playing: Awaitable[T]
    ) -> T:
        """What a part of the run of ``agent`` gives; what it raises is told as ``run`` promises."""
        run = place.run
        try:
            with At(place):
                result = await playing
        except asyncio.CancelledError as cancelled:
            run.stop(cancelled)
            await run.quiet(_STOPPING_S)
            raise
        except Exception as error:
            run.check()
            failure = as_run_error(error, agent, turns)
            trace = "".join(format_exception(error)) if failure.hint == SEE_LOG else None
            _log.info(
                "agent.failed",
                agent=agent.name,
                code=failure.code,
                error=failure.detail,
                traceback=trace,
            )
            if failure is error:
                raise
            raise failure from error
        run.check()
        return result

    async def call_tool(
        self, ctx: TaskContext, tool: FunctionTool, arguments: JsonObject, *, key: str
    ) -> Any:
        """Call ``tool`` outside any agent, as the step ``key`` (``tool/1``): its JSON output.

        Raises ``ToolError`` where an agent would be told of the failure, and ``Suspend`` as
        ``run`` does.
        """
        run = self._durable_run(ctx, None, one_call=True)
        above, _, call_id = key.rpartition("/")
        place = enter(run, above.removesuffix("tool").rstrip("/"))
        ledger(tool)
        text = json.dumps(arguments)
        tool_context: ToolContext[Any] = ToolContext(
            context=None,
            usage=_unused(),
            tool_name=tool.name,
            tool_call_id=call_id,
            tool_arguments=text,
        )
        try:
            with At(place):
                if await needs_consent(run, tool, tool_context, arguments, call_id):
                    whole = place.scope.tool_key(call_id)
                    await ask(run, SeenCall(None, whole, tool.qualified_name, arguments, tool))
                output = await called(tool, tool_context, text)
        except asyncio.CancelledError as cancelled:
            run.stop(cancelled)
            await run.quiet(_STOPPING_S)
            raise
        except Exception as error:
            run.check()
            if isinstance(error, (ToolError, Suspend, ApprovalExpired)):
                raise
            raise ToolError(
                f"Tool {tool.name!r} failed: {type(error).__name__}: {error}"
            ) from error
        run.check()
        whole = place.scope.tool_key(call_id)
        step = ctx.journal.recorded(whole).get(whole)
        if step is not None and step.error is not None:
            raise ToolError(
                f"Tool {tool.name!r} failed: {step.error.message}", hint=step.error.hint
            )
        return json_value(output)

    def _durable_run(
        self, ctx: TaskContext, model: str | None, *, one_call: bool = False
    ) -> DurableRun:
        return DurableRun(
            ctx=ctx,
            one_call=one_call,
            provider=self._provider,
            policies=self._policies,
            default_model=model or self._settings.effective_model,
            model_retries=self._settings.model_retries,
            tool_timeout_s=self._settings.tool_timeout_s,
            max_depth=self._settings.max_agent_depth,
            prices=self._prices,
            assumed_output_tokens=self._settings.budget_output_tokens,
            tracing_disabled=not self._tracing,
            services=self._services,
            fetch=self._fetch,
            private_links=self._settings.http_allow_private,
            permits=self._permits,
            throttle=self._throttle,
        )


_UNUSED = Usage()


def _unused() -> Usage:
    """As ``Usage()``, of which the SDK checks each part anew."""
    usage = object.__new__(Usage)
    usage.__dict__.update(_UNUSED.__dict__, request_usage_entries=[])
    return usage


_NOT_SAID = frozenset({"tool_approval_item"})
"""Items of the SDK's own bookkeeping, which no model reads."""


def _input_item(item: RunItem) -> JsonObject:
    return dict(item.to_input_item())
