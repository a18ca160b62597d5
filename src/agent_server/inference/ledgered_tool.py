"""Every function tool's call in a durable run as a step of the ledger.

Leans on the SDK's ``FunctionTool`` and on the journal's port. Refuses to know where tools come
from: functions, MCP tools and agents as tools are all told apart by what the SDK says of them.

The tool object stays the user's own, so that hooks and identity checks see what they know; only
its invoker is exchanged for one that does nothing outside a durable run. The exchange happens
when a model is about to be asked with the tool, since nothing can call it before.
"""

import asyncio
import inspect
import json
import math
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import anyio
from agents import FunctionTool, Tool
from agents.agent_tool_state import get_agent_tool_state_scope, peek_agent_tool_run_result
from agents.exceptions import ToolTimeoutError
from agents.tool import (
    _FailureHandlingFunctionToolInvoker,
    _get_function_tool_invoke_context,
    default_tool_timeout_error_message,
    invoke_function_tool,
)
from agents.tool_context import ToolContext

from agent_server.domain.agents import ToolEffect
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, RunCancelled, ToolError
from agent_server.domain.runs import Usage
from agent_server.execution.ports import ApprovalDecision, StepRecord, Suspend
from agent_server.inference.approvals import (
    SeenCall,
    ask,
    call_digest,
    decided,
    hold_by_policy,
    parsed,
)
from agent_server.inference.audit import AUDIT
from agent_server.inference.claims import Scope
from agent_server.inference.durable_run import PLACE, At, DurableRun, Place
from agent_server.inference.reconcile import reconciled
from agent_server.inference.tags import hint
from agent_server.inference.tool_output import output_from_json, output_to_json

Invoke = Callable[[Any, str], Awaitable[Any]]
_CALLED = Usage(tool_calls=1)
_FAILURE = "_agent_server_failure"
_OURS = "__agent_server_ledgered__"
_CANCELLED = ErrorInfo(code=RunCancelled.code, message="The tool cancelled itself.")


def instrument(run: DurableRun, tools: Iterable[Tool]) -> None:
    """Make the calls of ``tools`` steps of whichever durable run they happen in, and held where
    the policy says so."""
    for tool in tools:
        if not isinstance(tool, FunctionTool):
            continue
        hold_by_policy(run, tool)
        ledger(tool)


def ledger(tool: FunctionTool) -> None:
    """Make the calls of ``tool`` steps of whichever durable run they happen in."""
    invoke = tool.on_invoke_tool
    if isinstance(invoke, _LedgeredInvoker) or hasattr(invoke, _OURS):
        return
    if isinstance(invoke, _FailureHandlingFunctionToolInvoker):
        tool.on_invoke_tool = _LedgeredInvoker(tool, invoke)
    else:
        tool.on_invoke_tool = _ledgered(tool, invoke)


async def _as_called(ctx: ToolContext[Any], input: str) -> Any:
    """How the SDK calls its own invoker."""


_SIGNATURE = inspect.signature(_as_called)


class _LedgeredInvoker(_FailureHandlingFunctionToolInvoker):
    """The SDK's own invoker of a function tool, with the ledger around it.

    A subclass, because the SDK knows by its type that a tool came from a plain function.
    """

    def __init__(self, tool: FunctionTool, inner: _FailureHandlingFunctionToolInvoker) -> None:
        super().__init__(
            inner._invoke_tool_impl,
            partial(_note_failure, inner._on_handled_error),
            function_tool=tool,
        )
        for name, value in vars(inner).items():
            if name not in vars(self):
                setattr(self, name, value)
        # The SDK asks for it at each call, and working it out costs more than the rest of the call;
        # so does what an annotation means that is only text.
        self.__signature__, self.__annotations__ = _SIGNATURE, {}

    async def __call__(self, ctx: ToolContext[Any], input: str) -> Any:
        place = PLACE.get()
        tool = self._function_tool
        if place is None or tool is None:
            return await super().__call__(ctx, input)
        return await call_tool(place, tool, ctx, input, super().__call__)


def called(tool: FunctionTool, context: ToolContext[Any], arguments: str) -> Awaitable[Any]:
    """``tool`` called as the SDK calls it: straight, where that asks nothing of the tool and keeps
    no time."""
    if isinstance(tool.on_invoke_tool, _LedgeredInvoker) and tool.timeout_seconds is None:
        return tool.on_invoke_tool(context, arguments)
    return invoke_function_tool(function_tool=tool, context=context, arguments=arguments)


def _note_failure(
    told: Callable[[FunctionTool, Exception, str, ToolContext[Any]], None],
    tool: FunctionTool,
    error: Exception,
    arguments: str,
    context: ToolContext[Any],
) -> None:
    """Remember the error that the SDK is about to turn into text for the model."""
    setattr(context, _FAILURE, error)
    told(tool, error, arguments, context)


def _ledgered(tool: FunctionTool, invoke: Invoke) -> Invoke:
    narrow = cast(FunctionTool, SimpleNamespace(on_invoke_tool=invoke))

    async def inner(context: ToolContext[Any], arguments: str) -> Any:
        return await invoke(_get_function_tool_invoke_context(narrow, context), arguments)

    async def ledgered(context: ToolContext[Any], arguments: str) -> Any:
        place = PLACE.get()
        if place is None:
            return await inner(context, arguments)
        return await call_tool(place, tool, context, arguments, inner)

    setattr(ledgered, _OURS, True)
    return ledgered


async def call_tool(
    place: Place,
    tool: FunctionTool,
    context: ToolContext[Any],
    arguments: str,
    invoke: Invoke,
) -> Any:
    """Call ``tool`` once in the life of the run, or give what it gave in an earlier attempt.

    Raises what the tool raises; ``ToolError`` where the recorded call had raised; and
    ``Suspend`` (which also stops the run) for a call that may or may not have happened.
    """
    entered_s = asyncio.get_running_loop().time()
    run = place.run
    run.check()
    name = tool.qualified_name
    digest = call_digest(name, arguments)
    key, earlier = place.scope.tool_call(context.tool_call_id, digest)
    agent = getattr(context.agent, "name", None)
    wish = SeenCall(None, key, name, parsed(arguments), tool, agent)
    audit = AUDIT.get()
    if audit is not None:
        recorded = place.scope.ledger.earlier.get(key)
        edited = await decided(run, wish)
        given = wish.arguments if edited is None else edited.arguments
        now = StepRecord(key=key, kind="tool", name=name, input=given)
        audit.tool(now, recorded, earlier is not None)
        earlier = recorded
        if tool._is_agent_tool and recorded is not None and recorded.status == "done":
            with At(place.inside(key)):
                output = await invoke(context, arguments)
            run.check()
            audit.output(f"the agent {name!r}", output_to_json(tool, output), recorded.output, key)
            return output
    if earlier is not None and earlier.status == "done":
        return output_from_json(tool, earlier.output)
    if earlier is not None and earlier.status == "failed":
        if earlier.output is not None:
            return output_from_json(tool, earlier.output)
        raise _again(earlier)
    step = StepRecord(
        key=key,
        kind="tool",
        name=name,
        agent=agent,
        input=wish.arguments,
        input_hash=digest,
        attempts=earlier.attempts + 1 if earlier is not None else 1,
    )
    container = tool._is_agent_tool
    effect = ToolEffect.IDEMPOTENT if container else run.policies.effect(name, _hints(tool))
    if earlier is not None and not effect.repeatable:
        said = await reconciled(place, tool, earlier)
        if said.outcome == "happened":
            output = output_to_json(tool, said.result)
            await run.write(run.journal.finish(earlier.done(output, _CALLED)))
            return output_from_json(tool, output)
        if said.outcome == "fail":
            error = ToolError(f"The call of {name!r} was in doubt. {said.reason}".strip())
            await run.write(run.journal.finish(earlier.failed(error.info(), _CALLED)))
            run.stop(error)
            raise error
    decision = await _consent(run, wish, agent)
    if decision is not None and decision.arguments != step.input:
        arguments = context.tool_arguments = json.dumps(decision.arguments)
        context._function_tool_arguments = None  # those that the SDK prepared
        step = replace(step, input=decision.arguments)
    inside = place.inside(key)
    alone = run.one_call and place.depth == 0
    call = _Call(run, tool, effect, step, inside.scope, entered_s, alone)
    async with run.permitted(tool=name):
        run.check()
        try:
            await run.write(run.journal.begin(step, commit=not effect.repeatable))
        except asyncio.CancelledError:
            if call.overdue():
                return await call.timed_out(context, cast(float, tool.timeout_seconds), True)
            raise
        with At(inside):
            if container:
                return await call.carry_out(context, arguments, invoke)
            run.acts(key)
            try:
                return await call.carry_out(context, arguments, invoke)
            finally:
                run.acted(key)


@dataclass(frozen=True)
class _Call:
    """One call that is really made."""

    run: DurableRun
    tool: FunctionTool
    effect: ToolEffect
    step: StepRecord
    inside: Scope
    entered_s: float
    """When the SDK began to count the tool's own timeout, by the loop's clock."""
    alone: bool
    """Nothing follows from how it goes but what the task stores next."""

    async def carry_out(self, context: ToolContext[Any], arguments: str, invoke: Invoke) -> Any:
        run, tool = self.run, self.tool
        limit_s, own = self._limit_s()
        output: Any = None
        timed_out = True
        try:
            with anyio.CancelScope(deadline=self._deadline(limit_s)):
                output = await invoke(context, arguments)
                timed_out = False
        except asyncio.CancelledError:
            # Cancelled from outside: it stays as begun, unless it was the SDK whose clock went off
            # before ours. The tool's own doing: it has failed.
            if self.overdue():
                return await self.timed_out(context, cast(float, tool.timeout_seconds), True)
            if run.stopped is None and _self_cancelled():
                await self._failed(_CANCELLED)
            raise
        except Exception as error:
            run.check()
            await self._failed(_tool_error(error))
            raise
        failure = getattr(context, _FAILURE, None)
        if self.inside.used or isinstance(failure, Exception):
            # What it says may come of the stop itself, and is not recorded.
            run.check()
        if timed_out:
            return await self.timed_out(context, cast(float, limit_s), own)
        if tool._is_agent_tool and _interrupted(context):
            return output
        if isinstance(failure, Exception):
            setattr(context, _FAILURE, None)
            await self._failed(_tool_error(failure), output)
        else:
            done = self.step.done(output_to_json(tool, output), _CALLED)
            await run.write(run.journal.finish(done, commit=self._commits()))
        run.check()
        return output

    def _commits(self) -> bool:
        """Whether the call's end must be stored before anything follows from it."""
        if self.alone:
            return False
        return self.effect is not ToolEffect.NONE and not self.tool._is_agent_tool

    def _limit_s(self) -> tuple[float | None, bool]:
        """Seconds the call may take, and whether it is the tool's own limit.

        The tool's own is anticipated by a moment, so that the ledger learns of it before the SDK,
        which counts from the moment the call was entered.
        """
        policy = self.run.policies.timeout_s(self.step.name)
        if policy is None and not self.tool._is_agent_tool:
            policy = self.run.tool_timeout_s
        own = self.tool.timeout_seconds
        if own is not None and (policy is None or own <= policy):
            gone_s = asyncio.get_running_loop().time() - self.entered_s
            return max(0.0, own - min(0.01, own * 0.02) - gone_s), True
        return policy, False

    def _deadline(self, limit_s: float | None) -> float:
        """By the loop's clock."""
        return math.inf if limit_s is None else asyncio.get_running_loop().time() + limit_s

    def overdue(self) -> bool:
        """Whether the tool's own timeout has passed, so that a cancellation is the SDK's.

        The SDK then takes what the call returns or raises after all.
        """
        own = self.tool.timeout_seconds
        if own is None or self.run.stopped is not None:
            return False
        return asyncio.get_running_loop().time() - self.entered_s >= own - 0.001

    async def timed_out(self, context: ToolContext[Any], limit_s: float, own: bool) -> Any:
        """What the model is told; the same on replay."""
        tool = self.tool
        seconds = tool.timeout_seconds if own and tool.timeout_seconds else limit_s
        error = ToolTimeoutError(tool_name=tool.name, timeout_seconds=seconds)
        info = ErrorInfo(
            code=ToolError.code,
            message=str(error),
            hint="Set the tool's `timeout_s` in agent-server.toml, or AGENT_SERVER_TOOL_TIMEOUT_S.",
        )
        if own and tool.timeout_behavior == "raise_exception":
            await self._failed(info)
            raise error
        if own and tool.timeout_error_function is not None:
            told = tool.timeout_error_function(context, error)
            text = await told if isinstance(told, Awaitable) else told
        else:
            text = default_tool_timeout_error_message(tool_name=tool.name, timeout_seconds=seconds)
            if not self.effect.repeatable:
                text += " It may or may not have taken effect."
        await self._failed(info, text)
        return text

    async def _failed(self, error: ErrorInfo, told: Any = None) -> None:
        """Record the failure and what the model is told of it; with nothing told, it is raised."""
        output = None if told is None else output_to_json(self.tool, told)
        failed = self.step.failed(error, _CALLED, output=output)
        await self.run.write(self.run.journal.finish(failed, commit=self._commits()))


async def _consent(run: DurableRun, call: SeenCall, agent: str | None) -> ApprovalDecision | None:
    """The consent to ``call``; None where none is needed. The SDK stops at such a call before it
    comes here; one that came by another way stops the run."""
    try:
        if call.terms(run) is None:
            decision = await decided(run, call)
        else:
            decision = await ask(run, call, agent)
    except Suspend as suspend:
        await run.suspend(call.key, suspend)
        raise
    if decision is not None and decision.decision != "approve":
        raise ToolError(f"The call of {call.name!r} was not approved. {decision.reason}".strip())
    return decision


def _again(earlier: StepRecord) -> BaseException:
    """What a call raised in an earlier attempt, to be raised again."""
    error = earlier.error
    if error is None:
        return ToolError(f"Tool {earlier.name!r} failed.")
    if error.code == _CANCELLED.code:
        return asyncio.CancelledError()
    return ToolError(error.message, hint=error.hint)


def _hints(tool: FunctionTool) -> JsonObject | None:
    """What an MCP server said of its tool."""
    given = tool._mcp_annotations
    if given is None:
        return None
    return {
        "read_only": hint(given, "read_only_hint", "readOnlyHint"),
        "idempotent": hint(given, "idempotent_hint", "idempotentHint"),
    }


def _tool_error(error: Exception) -> ErrorInfo:
    text = str(error) or "no message"
    return ErrorInfo(code=ToolError.code, message=f"{type(error).__name__}: {text}")


def _interrupted(context: ToolContext[Any]) -> bool:
    """Whether an agent as a tool stands still for an approval inside it."""
    call = getattr(context, "tool_call", None)
    if call is None:
        return False
    nested = peek_agent_tool_run_result(call, scope_id=get_agent_tool_state_scope(context))
    return bool(getattr(nested, "interruptions", None))


def _self_cancelled() -> bool:
    """Whether nobody asked the current task to stop: a tool raised ``CancelledError`` itself.

    Python 3.10 cannot tell; the call is then left as begun.
    """
    task = asyncio.current_task()
    if sys.version_info < (3, 11) or task is None:
        return False
    return task.cancelling() == 0
