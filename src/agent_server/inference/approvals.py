"""Consent to tool calls: who asks for it, how a decision reaches the SDK, and what is refused.

Leans on the SDK's own approvals and on ``TaskContext.ask_approval``. Refuses to decide: a call
that needs consent ends the turn as the SDK does it, with everything else in it carried out; once
it is decided, the run is played again from its ledger, and the decision is put into the SDK's
context when the model's answer with that call comes by, before the SDK looks for it.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, cast

from agents import FunctionTool, ModelResponse, RunContextWrapper, Tool
from agents.items import ToolApprovalItem

from agent_server.domain.agents import ApprovalTerms
from agent_server.domain.approvals import arguments_hash
from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.runs import WaitingFor
from agent_server.execution.ports import ApprovalAsk, ApprovalDecision, Suspend
from agent_server.inference.durable_run import PLACE, DurableRun, Place
from agent_server.inference.tags import tags_of

NOBODY = "Nobody decided in time about this call, so it was not made."
NO_TERMS = ApprovalTerms()


@dataclass(frozen=True)
class SeenCall:
    """A call that a model wished for, with the key it has or will have in the ledger."""

    item: Any
    key: str
    name: str
    arguments: Any
    tool: Tool | None
    agent: str | None = None

    def terms(self, run: DurableRun) -> ApprovalTerms | None:
        """How the operator wants consent to it, if so."""
        return run.policies.approval(self.name, tags_of(self.tool), self.agent)


class ByPolicy:
    """A tool's ``needs_approval`` in a durable run: its own, or the operator's policy."""

    def __init__(self, tool: FunctionTool) -> None:
        self._name = tool.qualified_name
        self._tags = tags_of(tool)
        self._own: bool | Callable[..., Any] = tool.needs_approval

    async def __call__(
        self, context: RunContextWrapper[Any], arguments: JsonObject, call_id: str
    ) -> bool:
        place = PLACE.get()
        if place is not None:
            agent = _caller(place, call_id)
            if place.run.policies.approval(self._name, self._tags, agent) is not None:
                return True
        if callable(self._own):
            said = self._own(context, arguments, call_id)
            return bool(await said if isinstance(said, Awaitable) else said)
        return self._own


def hold_by_policy(run: DurableRun, tool: FunctionTool) -> None:
    """Let the SDK stop at ``tool`` where the policy asks for consent."""
    if isinstance(tool.needs_approval, ByPolicy):
        return
    if run.policies.approval(tool.qualified_name, tags_of(tool), "*") is not None:
        tool.needs_approval = ByPolicy(tool)


def _caller(place: Place, call_id: str) -> str | None:
    """The agent whose model wished for that call at ``place``."""
    start = place.scope.tool_key("")
    wished: list[SeenCall] = list(place.run.seen.values())
    for seen in reversed(wished):
        if seen.key.startswith(start) and _field(seen.item, "call_id") == call_id:
            return seen.agent
    return None


async def foresee(
    place: Place,
    agent: Any,
    context: RunContextWrapper[Any] | None,
    tools: list[Tool],
    response: ModelResponse,
) -> None:
    """Note the calls in a model's answer, and tell the SDK what was decided about them before.

    Raises ``ApprovalExpired`` for one that the run was to fail for.
    """
    by_name = {tool.name: tool for tool in tools}
    for item in response.output:
        call_id = _field(item, "call_id") or _field(item, "id")
        if not call_id or _field(item, "type") in _NO_CALLS:
            continue
        name = _field(item, "name") or str(_field(item, "type") or "tool")
        tool = by_name.get(name)
        text = _field(item, "arguments")
        given = parsed(text) if isinstance(text, str) else _plain(item)
        if isinstance(tool, FunctionTool):
            name = tool.qualified_name
        key = place.scope.next_tool_key(call_id, call_digest(name, text))
        seen = SeenCall(item, key, name, given, tool, getattr(agent, "name", None))
        place.run.seen[id(item)] = seen
        decision = await decided(place.run, seen)
        if decision is None or context is None:
            continue
        pending = ToolApprovalItem(agent=agent, raw_item=cast(Any, item))
        if decision.decision == "approve":
            context.approve_tool(pending)
        else:
            told = decision.reason or None
            late = decision.decision == "expired"
            context.reject_tool(pending, rejection_message=NOBODY if late else told)


async def decided(run: DurableRun, call: SeenCall) -> ApprovalDecision | None:
    """What the ledger holds of a decision about exactly this call; None while it holds none."""
    whole = f"{call.key}/approval"
    found = run.journal.recorded(whole).get(whole)
    if found is None or found.status != "done":
        return None
    if found.output["asked_hash"] != arguments_hash(call.arguments):
        return None
    return await ask(run, call)


async def ask(run: DurableRun, call: SeenCall, agent: str | None = None) -> ApprovalDecision:
    """The decision about ``call``, asked for once. Raises ``Suspend`` until there is one."""
    terms = call.terms(run) or NO_TERMS
    expires_at = None
    if terms.expires_s is not None:
        expires_at = utcnow() + timedelta(seconds=terms.expires_s)  # only the first asking counts
    wanted = ApprovalAsk(
        subject=call.name,
        arguments=call.arguments,
        expires_at=expires_at,
        on_expiry=terms.on_expiry,
        approvers=terms.approvers,
        schema=_takes(call),
        agent=agent,
    )
    scope = run.journal.scope
    below = call.key[len(scope) + 1 :] if scope else call.key
    return await run.at_home(run.ctx.ask_approval(wanted, key=f"{below}/approval"))


def _takes(call: SeenCall) -> JsonObject:
    """What edited arguments must fit. Only a function's call is made here and can be given others:
    a hosted tool is called by the model's provider with what the model said."""
    if isinstance(call.tool, FunctionTool):
        return call.tool.params_json_schema
    return {"const": call.arguments}


async def ask_for_all(place: Place, interruptions: Sequence[ToolApprovalItem]) -> None:
    """Ask for consent to every call that the agent's run stands still for, and stand still.

    Raises ``Suspend`` if there is any, also for one that was decided meanwhile: the run is then
    played again at once.
    """
    waits: list[Suspend] = []
    for pending in interruptions:
        run = place.run
        call = run.seen.get(id(pending.raw_item)) or _unseen(place, pending)
        try:
            await ask(run, call, getattr(pending.agent, "name", None))
        except Suspend as suspend:
            waits.append(suspend)
    if len(waits) < len(interruptions):
        waiting = WaitingFor(kind="approval", detail="A decision has come meanwhile.")
        raise Suspend(waiting, wake_at=utcnow())
    if waits:
        moments = [suspend.wake_at for suspend in waits if suspend.wake_at is not None]
        raise Suspend(waits[0].waiting_for, wake_at=min(moments, default=None))


async def needs_consent(
    run: DurableRun, tool: FunctionTool, context: Any, arguments: JsonObject, call_id: str
) -> bool:
    """Whether a call outside any agent would be held, too."""
    if tool.needs_approval is False:
        return run.policies.approval(tool.qualified_name, tags_of(tool)) is not None
    return await ByPolicy(tool)(context, arguments, call_id)


def call_digest(name: str, arguments: str | None) -> str:
    """What a call is recognised by when it is played again: the tool and the text it is given."""
    return sha256(f"{name}\0{arguments}".encode()).hexdigest()


def parsed(arguments: str) -> Any:
    """The arguments as JSON; as text where they do not parse."""
    try:
        return json.loads(arguments) if arguments else {}
    except ValueError:
        return arguments


_NO_CALLS = ("message", "reasoning")


def _unseen(place: Place, pending: ToolApprovalItem) -> SeenCall:
    """A call that no model of ours was heard to wish for: the SDK's copy of one, or a server's."""
    call_id = pending.call_id or pending.name or "call"
    wished: list[SeenCall] = list(place.run.seen.values())
    for seen in wished:
        if call_id in (_field(seen.item, "call_id"), _field(seen.item, "id")):
            return seen
    arguments = pending.arguments
    given = parsed(arguments) if isinstance(arguments, str) else arguments
    return SeenCall(pending, place.scope.tool_key(call_id), pending.name or "", given, None)


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def _plain(item: Any) -> Any:
    """A call that has no text of arguments, as JSON: a shell's commands, a patch."""
    return item if isinstance(item, dict) else item.model_dump(mode="json", exclude_unset=True)
