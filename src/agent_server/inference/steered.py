"""What is said into a run while its agent works: taken between turns, and kept in its place.

Leans on ``TaskContext.take_steers``. Refuses to know how a message reaches the run. The SDK makes
each turn's input anew from what it generated itself, so a message is put into every later input
again, behind the item that it came after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agents import Agent, RunContextWrapper
from agents.exceptions import InputGuardrailTripwireTriggered

from agent_server.inference.durable_run import Place

Items = list[Any]


@dataclass
class _Said:
    """``items`` stand behind ``after``, which was the last of ``index`` items."""

    index: int
    after: Any
    items: Items


class Steered:
    """The messages for one agent loop, and where they stand in its conversation.

    ``agent`` is whose input guardrails look at them, as at the run's first input; the first
    ``before`` items of each input are a history that was there before.
    """

    def __init__(self, place: Place, agent: Agent[Any], before: int) -> None:
        self._place = place
        self._agent = agent
        self._before = before
        self._turn = 0
        self._inputs: list[_Said] = []
        self._kept: list[_Said] = []

    async def next_input(self, items: Items, context: RunContextWrapper[Any] | None) -> Items:
        """``items`` as the model is to be asked them at its next turn, with all that was said.

        Raises what the SDK does for an input that a guardrail refuses.
        """
        said = await self._take(replaying=self._place.scope.replaying)
        if said:
            await self._guard(context or RunContextWrapper(None), said)
            after = items[-1] if items else None
            self._inputs.append(_Said(len(items), after, said))
            self._kept.append(_Said(max(0, len(items) - self._before), after, said))
        return _joined(items, self._inputs, move=True)

    async def more(self, context: RunContextWrapper[Any], speaker: Agent[Any]) -> Items:
        """What was said since the last turn, now that ``speaker`` would end, and goes on with it."""
        said = await self._take(replaying=False)
        if said and speaker is not self._agent:  # whose guardrails the SDK asks by itself
            await self._guard(context, said)
        return said

    def conversation(self, items: Sequence[Any], added: Sequence[Any] = ()) -> Items:
        """``items``, which follow the history, with all that was said in its place, and ``added``,
        which goes on from there: from now on the input holds them."""
        whole = [*_joined(list(items), self._kept), *added]
        self._inputs, self._kept = [], []
        return whole

    async def _take(self, *, replaying: bool) -> Items:
        self._turn += 1
        run, prefix = self._place.run, self._place.scope.prefix
        scope = run.journal.scope
        below = prefix[len(scope) :].strip("/")
        key = "/".join(part for part in (below, "steer", str(self._turn)) if part)
        if replaying and run.journal.key(key) not in run.journal.recorded(run.journal.key(key)):
            return []  # This turn went by without: what has come since is for a later one.
        said: Items = []
        for one in await run.write(run.ctx.take_steers(key=key)):
            given = one.payload
            said += [{"role": "user", "content": given}] if isinstance(given, str) else given
        return said

    async def _guard(self, context: RunContextWrapper[Any], said: Items) -> None:
        for guardrail in self._agent.input_guardrails:
            result = await guardrail.run(self._agent, said, context)
            if result.output.tripwire_triggered:
                raise InputGuardrailTripwireTriggered(result)


def _joined(items: Items, places: list[_Said], *, move: bool = False) -> Items:
    """``items`` with what was said put behind what it came after; where that is gone (a handoff
    may shorten what the next agent sees), at the end. With ``move``, it stays there from then on.
    """
    if not places:
        return items
    at: dict[int, Items] = {}
    for one in places:
        index = _index(items, one)
        if move and index != one.index:
            one.index, one.after = index, items[index - 1] if index else None
        at.setdefault(index, []).extend(one.items)
    joined: Items = []
    for index in range(len(items) + 1):
        joined += at.get(index, ())
        joined += items[index : index + 1]
    return joined


def _index(items: Items, one: _Said) -> int:
    if one.index <= len(items) and (not one.index or items[one.index - 1] == one.after):
        return one.index
    for index in range(len(items), 0, -1):
        if items[index - 1] == one.after:
            return index
    index = min(one.index, len(items))
    # Never between a call and its output: a model refuses that.
    while 0 < index < len(items) and all(
        "call_id" in item for item in items[index - 1 : index + 1]
    ):
        index += 1
    return index
