"""The handlers of nodes that stand still: for a moment, a signal, or a person's decision.

Leans on the durable waits of the contract: a handler is called again from its start when there is
something to see, and finds the moments that it decided in its ledger. Refuses to hold a worker.
"""

import math
from datetime import datetime, timedelta, timezone
from typing import Any

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import ApprovalRejected, ExpressionError
from agent_server.domain.workflows import MAX_WAIT_S
from agent_server.execution.ports import ApprovalAsk, TaskContext
from agent_server.workflow.checks import moment
from agent_server.workflow.failures import timed_out


async def wait(ctx: TaskContext) -> Any:
    """The handler of ``wait`` nodes. The payload: ``signal``, ``until`` or ``duration_s``, and
    ``timeout_s``."""
    told = ctx.payload
    timeout_s: float | None = told.get("timeout_s")
    ends = None if timeout_s is None else await _ahead(ctx, "timeout", timeout_s)
    if "signal" in told:
        received = await ctx.wait_signal(told["signal"], key="signal", until=ends)
        if received is None:
            raise timed_out(ctx.node, timeout_s or 0)
        return received.payload
    if "until" in told:
        wakes = _moment(told["until"])
    else:
        wakes = await _ahead(ctx, "wakes", _seconds(told.get("duration_s")))
    if ends is not None and ends < wakes:
        await ctx.sleep_until(ends, key="slept")
        raise timed_out(ctx.node, timeout_s or 0)
    await ctx.sleep_until(wakes, key="slept")
    return wakes.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


async def approval(ctx: TaskContext) -> JsonObject:
    """The handler of ``approval`` nodes. The payload: the node's fields, filled in."""
    told = ctx.payload
    timeout_s: Any = told.get("timeout_s")
    expires_s: Any = told.get("expires_s")
    overdue = timeout_s is not None and (expires_s is None or timeout_s < expires_s)
    within_s = timeout_s if overdue else expires_s
    approvers = told.get("approvers")
    decision = await ctx.ask_approval(
        ApprovalAsk(
            subject=ctx.node,
            arguments=told.get("input"),
            detail=told["subject"],
            expires_at=None if within_s is None else await _ahead(ctx, "expires", within_s),
            on_expiry="reject" if overdue else told["on_expiry"],
            approvers=None if approvers is None else tuple(approvers),
        ),
        key="approval",
    )
    if decision.decision == "expired" and overdue:
        raise timed_out(ctx.node, timeout_s)
    approved = decision.decision == "approve"
    if not approved and told["on_reject"] == "fail":
        why = f" by {decision.by}" if decision.by else " (nobody decided in time)"
        raise ApprovalRejected(
            f"{told['subject']!r} was rejected{why}"
            + (f": {decision.reason}" if decision.reason else "."),
            hint="With on_reject: continue the workflow goes on and may look at approved.",
        )
    return {
        "approved": approved,
        "decision": decision.decision,
        "reason": decision.reason,
        "by": decision.by,
        "input": decision.arguments,
    }


async def pause(ctx: TaskContext) -> None:
    """The handler of the wait before another attempt. The payload: ``delay_s``."""
    await ctx.sleep_until(await _ahead(ctx, "wakes", ctx.payload["delay_s"]), key="slept")


async def _ahead(ctx: TaskContext, key: str, seconds: float) -> datetime:
    """The moment so many seconds after it was first asked for."""

    async def make() -> str:
        return (utcnow() + timedelta(seconds=seconds)).isoformat()

    return datetime.fromisoformat(await ctx.value(key, make))


def _moment(given: Any) -> datetime:
    try:
        return moment(str(given))
    except ValueError as error:
        raise ExpressionError(
            f"'until' gives {given!r}, which is not an RFC 3339 moment with an offset: {error}.",
            hint="Such as 2030-01-31T09:00:00Z.",
        ) from None


def _seconds(given: Any) -> float:
    fits = type(given) in (int, float) and math.isfinite(given) and 0 <= given <= MAX_WAIT_S
    if not fits:
        shown = repr(given)[:80]
        raise ExpressionError(f"'duration_s' must be from 0 to {MAX_WAIT_S} seconds, not {shown}.")
    return float(given)
