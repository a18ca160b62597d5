"""Rates: so many calls, and so much in them, in any minute, over all nodes.

Leans on the store. Refuses to know what is called. Each call is booked before it is made, at the
earliest moment at which no minute holds more than it may; who is booked for later comes back then,
and goes without another look.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from agent_server.execution import store
from agent_server.storage.database import Database
from agent_server.storage.tables import EPOCH

WINDOW = 61
"""Whole seconds that hold any sixty that begin within them."""
FORGOTTEN_S = 3_600
"""A booking that nobody came for is let go of so long after its moment."""


@dataclass(frozen=True)
class Rate:
    """The most in a minute; None where there is no such limit."""

    calls: int | None = None
    amount: int | None = None


class Rates:
    """One per node."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def book(self, name: str, rate: Rate, amount: int, holder: str) -> timedelta:
        """How long ``holder`` has to wait before its call, which takes ``amount``; nothing once
        the moment has come for which it was booked."""

        def transaction(connection: Connection) -> timedelta:
            state, now = store.rate(connection, name)
            wait_s, state = booked(state, _seconds(now), rate, amount, holder)
            store.store_rate(connection, name, state)
            return timedelta(seconds=wait_s)

        return await self._database.write(transaction)

    async def settle(self, name: str, more: int) -> None:
        """A call that was booked took that much more, or less, than it was booked with."""

        def transaction(connection: Connection) -> None:
            state, now = store.rate(connection, name)
            store.store_rate(connection, name, corrected(state, _seconds(now), more))

        if more:
            await self._database.write(transaction)

    async def close(self, name: str, wait: timedelta) -> None:
        """Nobody is to call until ``wait`` has passed: whoever is called said so."""

        def transaction(connection: Connection) -> None:
            state, now = store.rate(connection, name)
            store.store_rate(connection, name, closed(state, _seconds(now), wait.total_seconds()))

        await self._database.write(transaction)


def _seconds(moment: datetime) -> float:
    return (moment - EPOCH).total_seconds()


def _read(state: Any, now_s: float) -> dict[str, Any]:
    """``used``: [second, calls, amount] of the last minute and of bookings to come."""
    state = state or {"used": [], "closed": 0.0, "booked": {}}
    return {
        "used": [entry for entry in state["used"] if entry[0] > now_s - WINDOW],
        "closed": state["closed"],
        "booked": {h: s for h, s in state["booked"].items() if s > now_s - FORGOTTEN_S},
    }


def booked(
    state: Any, now_s: float, rate: Rate, amount: int, holder: str
) -> tuple[float, dict[str, Any]]:
    """Seconds that ``holder`` waits, and the state from now on. Pure."""
    state = _read(state, now_s)
    come = state["booked"].get(holder)
    if come is not None and now_s < state["closed"]:
        del state["booked"][holder]  # Its moment is no good any more; it is counted, and lost.
    elif come is not None:
        if come <= now_s:
            del state["booked"][holder]
        return max(0.0, come - now_s), state
    used = state["used"]
    if rate.amount is not None:
        amount = min(amount, rate.amount)  # More than a minute's whole would never have its turn.
    earliest = max(now_s, state["closed"], used[-1][0] if used else 0.0)
    moments = [earliest, *(float(entry[0] + WINDOW) for entry in used)]
    moment = next(
        moment
        for moment in sorted(m for m in moments if m >= earliest)
        if _fits(used, math.floor(moment), rate, amount)
    )
    second = math.floor(moment)
    if used and used[-1][0] == second:
        used[-1] = [second, used[-1][1] + 1, used[-1][2] + amount]
    else:
        used.append([second, 1, amount])
    if moment > now_s:
        state["booked"][holder] = moment
    return max(0.0, moment - now_s), state


def _fits(used: list[Any], second: int, rate: Rate, amount: int) -> bool:
    window = [entry for entry in used if entry[0] > second - WINDOW]
    calls, taken = sum(e[1] for e in window), sum(e[2] for e in window)
    return (rate.calls is None or calls < rate.calls) and (
        rate.amount is None or taken + amount <= rate.amount
    )


def corrected(state: Any, now_s: float, more: int) -> dict[str, Any]:
    """The state, with the difference in the present second. Pure."""
    kept = _read(state, now_s)
    past = [entry for entry in kept["used"] if entry[0] <= now_s]
    if past:
        past[-1][2] = max(0, past[-1][2] + more)
    return kept


def closed(state: Any, now_s: float, wait_s: float) -> dict[str, Any]:
    """The state, with nobody's turn before that. Pure."""
    kept = _read(state, now_s)
    kept["closed"] = max(kept["closed"], now_s + wait_s)
    return kept
