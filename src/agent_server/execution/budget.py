"""The budget of a run: room is reserved before each call, and settled by what it really used.

Leans on the store's reservations, so that all processes that work at one run share one count.
Refuses to know what a call does: the caller says what it will use, as far as that can be known.

How it stays below its ceilings, whatever runs side by side and whoever dies:

- A reservation is a row, made in a transaction that locks the run's row, and taken away in the
  transaction that adds what the call used to the run's totals. So the sum of both never misses a
  call, and two processes never give the same room away twice.
- A call that was begun and never heard of again (its process died, its branch was given up) was
  perhaps made and billed: it keeps counting as a call, and holds no tokens and no money back.
- Where there is no room beside the calls in flight, the next model call waits for them: what they
  really use is usually less than what was reserved.
- Of the calls whose most output is not known, one at a time may say as much as it likes; those beside
  it are held to what is reserved for them. An answer that is cut short by that is asked for again,
  as the one that may. So a ceiling is passed by at most one call.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal, Protocol

from sqlalchemy import Connection

from agent_server.domain.errors import BudgetExceeded, FieldError
from agent_server.domain.events import BudgetWarning
from agent_server.domain.runs import Budget, StepKind, Usage
from agent_server.execution import store
from agent_server.execution.ports import UNDO_MARK, Estimate, Holder, LostLease
from agent_server.storage.database import Database

POLL_S = 0.25
"""How often a waiting call looks whether one in another process has ended."""
WARN_SHARE = 0.8
"""The share of a ceiling at which ``budget.warning`` is said, where no setting says."""
LIMITS = ("max_model_calls", "max_tool_calls", "max_tokens", "max_cost_usd")


class Totals(Protocol):
    """What a run has used: its row."""

    @property
    def model_calls(self) -> int: ...
    @property
    def tool_calls(self) -> int: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def cost_pico(self) -> int: ...
    @property
    def unpriced_calls(self) -> int: ...


@dataclass(frozen=True)
class Reserved:
    """What one call holds. ``open``: it is under way; else only its calls count. ``open_ended``: it
    may say as much as it likes. A call of the kind ``value`` is between two tries, and holds what
    the first has used."""

    kind: StepKind
    model_calls: int
    tool_calls: int
    tokens: int = 0
    cost_pico: int = 0
    open: bool = True
    open_ended: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why there is no room; with ``wait``, calls in flight may leave some."""

    error: BudgetExceeded
    wait: bool


UNDO_CALLS = 20
"""Calls that what undoes may make in any case, beside the run's ceiling."""


def undoing(budget: Budget) -> Budget:
    """What a run may have used in all when it undoes what it did: its ceilings once more, and at
    least ``UNDO_CALLS`` calls, so that what stopped it does not keep it from tidying up."""
    more: dict[str, Decimal | int] = {}
    for name in LIMITS:
        most = getattr(budget, name)
        if most is not None:
            calls = name.endswith("_calls")
            more[name] = most + (max(most, UNDO_CALLS) if calls else most)
    return budget.model_copy(update=more)


@dataclass(frozen=True)
class Grant:
    """The call may be made. ``most_output``: with at most so many output tokens, where the agent
    sets no maximum. ``lost``: how many calls under its key were begun before."""

    open_ended: bool = False
    most_output: int | None = None
    lost: int = 0


def limited(budget: Budget | None) -> bool:
    """Whether calls must be counted."""
    return budget is not None and any(getattr(budget, name) is not None for name in LIMITS)


def decide(
    budget: Budget,
    used: Totals,
    held: Iterable[Reserved],
    kind: StepKind,
    estimate: Estimate | None,
    calls: int = 1,
    *,
    whole: bool = False,
) -> Grant | Refusal:
    """Whether ``calls`` calls of one step may be made beside those that are ``held``, and how.

    ``whole``: its answer must not be cut short, so that it waits for its turn to be open-ended.
    """
    others = list(held)
    rationed = budget.max_tokens is not None or budget.max_cost_usd is not None
    if not rationed or kind != "model" or estimate is None or estimate.bounded:
        return refusal(budget, used, others, kind, estimate, calls) or Grant()
    if not any(one.open and one.open_ended for one in others):
        return refusal(budget, used, others, kind, estimate, calls) or Grant(open_ended=True)
    if whole:
        return Refusal(_exceeded("max_tokens", 0, "waits for its turn"), True)
    most = estimate.output_tokens
    held_to = replace(estimate, bounded=True)
    return refusal(budget, used, others, kind, held_to, calls) or Grant(most_output=most)


def refusal(
    budget: Budget,
    used: Totals,
    held: Iterable[Reserved],
    kind: StepKind,
    estimate: Estimate | None,
    calls: int = 1,
) -> Refusal | None:
    """Why ``calls`` calls of one step may not be made beside those that are ``held``, if so."""
    others = list(held)
    waiting = kind == "model" and any(one.open and one.kind == "model" for one in others)
    name = f"max_{kind}_calls"
    most = getattr(budget, name)
    count = getattr(used, f"{kind}_calls")
    reserved = sum(getattr(one, f"{kind}_calls") for one in others) + calls - 1
    if most is not None and count + reserved >= most:
        beside = f"{count}, and {reserved} begun" if reserved else f"{count}"
        return Refusal(_exceeded(name, most, f"is used up ({beside})"), waiting)
    if kind != "model":
        return _spent(budget, used)
    if budget.max_tokens is not None:
        taken = used.input_tokens + used.output_tokens
        held_tokens = sum(one.tokens for one in others if one.open)
        ahead = 0 if estimate is None else estimate.input_tokens
        after = 0 if estimate is None else estimate.output_tokens
        most_tokens = Decimal(budget.max_tokens)
        found = _room("max_tokens", most_tokens, taken, held_tokens, ahead, after, estimate, others)
        if found is not None:
            return found
    if budget.max_cost_usd is not None:
        if used.unpriced_calls or (estimate is not None and estimate.input_cost_usd is None):
            model = "" if estimate is None else f" {estimate.model!r}"
            return Refusal(unpriced(f"the model{model} has no known price"), False)
        spent = Decimal(used.cost_pico) / store.PICO
        held_cost = Decimal(sum(one.cost_pico for one in others if one.open)) / store.PICO
        before = (estimate.input_cost_usd if estimate else None) or Decimal(0)
        behind = (estimate.output_cost_usd if estimate else None) or Decimal(0)
        limit = budget.max_cost_usd
        return _room("max_cost_usd", limit, spent, held_cost, before, behind, estimate, others)
    return None


def _room(
    name: str,
    most: Decimal,
    taken: Decimal | int,
    held: Decimal | int,
    ahead: Decimal | int,
    behind: Decimal | int,
    estimate: Estimate | None,
    others: Iterable[Reserved],
) -> Refusal | None:
    """Whether a call that takes ``ahead`` for certain and ``behind`` perhaps still fits."""
    if taken >= most:
        return Refusal(_exceeded(name, most, f"is used up ({_shown(taken)})"), False)
    if taken + held + ahead + behind <= most:
        return None
    in_flight = any(one.open and one.kind == "model" for one in others)
    bounded = estimate is not None and estimate.bounded
    if not in_flight and not bounded and taken + ahead <= most:
        return None  # It goes alone: nobody knows what it will say.
    need = ahead + behind if bounded else ahead
    said = f"has no room for the next model call: {_shown(taken)} used, about {_shown(need)} needed"
    return Refusal(_exceeded(name, most, said), in_flight)


def _spent(budget: Budget, used: Totals) -> Refusal | None:
    """A tool call costs no tokens; but nothing goes on once they are used up."""
    tokens = used.input_tokens + used.output_tokens
    if budget.max_tokens is not None and tokens >= budget.max_tokens:
        return Refusal(_exceeded("max_tokens", budget.max_tokens, f"is used up ({tokens})"), False)
    cost = Decimal(used.cost_pico) / store.PICO
    if budget.max_cost_usd is not None and cost >= budget.max_cost_usd:
        return Refusal(
            _exceeded("max_cost_usd", budget.max_cost_usd, f"is used up ({_shown(cost)})"), False
        )
    return None


def _exceeded(name: str, most: Decimal | int, said: str) -> BudgetExceeded:
    return BudgetExceeded(
        f"The run's budget {name}={_shown(most)} {said}.",
        hint=f"Retry the run with a larger {name}; what is done is kept.",
        errors=[FieldError(path=f"/budget/{name}", message=said)],
    )


def unpriced(why: str) -> BudgetExceeded:
    """The error of a money budget that cannot be kept."""
    return BudgetExceeded(
        f"The run has a money budget (max_cost_usd), but {why}.",
        hint="Set the price in AGENT_SERVER_PRICES or under [prices] in agent-server.toml, use a "
        "model with a known price, or limit tokens or calls instead.",
        errors=[FieldError(path="/budget/max_cost_usd", message=why)],
    )


def warnings(budget: Budget, before: Totals, after: Totals, share: float) -> list[BudgetWarning]:
    """A warning for each ceiling of which ``share`` was reached between two totals."""
    said = []
    for name in LIMITS:
        most = getattr(budget, name)
        if most is None:
            continue
        mark = Decimal(str(share)) * most
        if _amount(name, before) < mark <= _amount(name, after):
            said.append(
                BudgetWarning(limit=name, used=_shown(_amount(name, after)), maximum=_shown(most))
            )
    return said


def _shown(amount: Decimal | int) -> str:
    """Without trailing zeros and without an exponent."""
    return f"{Decimal(amount).normalize():f}"


def _amount(name: str, used: Totals) -> Decimal:
    if name == "max_tokens":
        return Decimal(used.input_tokens + used.output_tokens)
    if name == "max_cost_usd":
        return Decimal(used.cost_pico) / store.PICO
    return Decimal(getattr(used, name.removeprefix("max_")))


class Meter:
    """One run's budget, as the tasks in this process meet it.

    ``warn_share`` is the share of a ceiling at which ``budget.warning`` is said.
    """

    def __init__(self, database: Database, budget: Budget | None, warn_share: float) -> None:
        self.budget = budget
        self.limited = limited(budget)
        self.warn_share = warn_share
        self._database = database
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._cut_short = False
        """An answer was cut short: further ones may be as long, and take turns instead."""

    async def reserve(
        self, holder: Holder, key: str, kind: Literal["model", "tool"], estimate: Estimate | None
    ) -> Grant:
        """Make room for the call ``key``. Waits for calls in flight where they may leave room, in
        turn.

        Raises ``BudgetExceeded``, and ``LostLease`` when ``holder`` has lost its task.
        """
        async with self._turn:
            while True:
                self._changed.clear()
                found = await self._try(holder, key, kind, estimate, whole=self._cut_short)
                if isinstance(found, Grant):
                    return found
                if not found.wait:
                    raise found.error
                try:
                    await asyncio.wait_for(self._changed.wait(), POLL_S)
                except asyncio.TimeoutError:
                    pass

    async def again(
        self, holder: Holder, key: str, estimate: Estimate | None, spent: Usage
    ) -> Grant:
        """Make room for one more try of the model call ``key``, which is under way. Never waits
        after a failure: others wait for this one. With ``spent``, what answers that were cut short
        have used, it waits until it may be open-ended. Raises ``BudgetExceeded``."""
        if estimate is not None and spent.output_tokens:
            self._cut_short = True
            await self._database.write(lambda c: self._put_aside(c, holder, key, spent))
            self._changed.set()
            return await self.reserve(holder, key, "model", estimate.after(spent))
        found = await self._try(holder, key, "model", estimate)
        if isinstance(found, Grant):
            return found
        raise found.error

    def settled(self) -> None:
        """A call in this process ended: there may be room."""
        self._changed.set()

    def _put_aside(self, connection: Connection, holder: Holder, key: str, spent: Usage) -> None:
        """The call ``key`` is between two tries: it holds what it has used, and nobody waits for
        it."""
        self._fence(connection, holder)
        store.locked_run_row(connection, holder.run_id)
        begun = [r for r in store.reservations_of(connection, holder.run_id) if r.key == key]
        used = spent.input_tokens + spent.output_tokens
        values = self._row(holder, key, sum(row.model_calls for row in begun))
        cost = store.pico(spent.cost_usd or Decimal(0))
        store.reserve(connection, values | {"kind": "value", "tokens": used, "cost_pico": cost})

    def _fence(self, connection: Connection, holder: Holder) -> None:
        where = (holder.run_id, holder.path, holder.owner, holder.epoch)
        if not store.holds(connection, *where):
            raise LostLease(f"task {holder.path!r} of {holder.run_id} was taken over")

    def _row(self, holder: Holder, key: str, model_calls: int) -> dict[str, Any]:
        return {
            "run_id": holder.run_id,
            "key": key,
            "task_path": holder.path,
            "epoch": holder.epoch,
            "kind": "model",
            "model_calls": model_calls,
            "tool_calls": 0,
            "tokens": 0,
            "cost_pico": 0,
            "under_way": True,
            "open_ended": False,
        }

    async def _try(
        self,
        holder: Holder,
        key: str,
        kind: Literal["model", "tool"],
        estimate: Estimate | None,
        *,
        whole: bool = False,
    ) -> Grant | Refusal:
        """Reserve the call, with all earlier ones under its key."""
        assert self.budget is not None
        budget = undoing(self.budget) if UNDO_MARK in holder.path else self.budget

        def transaction(connection: Connection) -> Grant | Refusal:
            self._fence(connection, holder)
            used = store.locked_run_row(connection, holder.run_id)
            held: list[Reserved] = []
            before = 0
            for row in store.reservations_of(connection, holder.run_id):
                if row.key == key:
                    before += row.model_calls + row.tool_calls
                    continue
                held.append(
                    Reserved(
                        row.kind,
                        row.model_calls,
                        row.tool_calls,
                        row.tokens,
                        row.cost_pico,
                        open=row.live,
                        open_ended=bool(row.open_ended),
                    )
                )
            found = decide(budget, used, held, kind, estimate, before + 1, whole=whole)
            if isinstance(found, Refusal):
                return found
            values = self._row(holder, key, before + 1 if kind == "model" else 0)
            values |= {"kind": kind, "open_ended": found.open_ended}
            if kind == "tool":
                values["tool_calls"] = before + 1
            if estimate is not None:
                cost = store.pico(estimate.cost_usd)
                values |= {"tokens": estimate.tokens, "cost_pico": cost}
            store.reserve(connection, values)
            return replace(found, lost=before)

        return await self._database.write(transaction)
