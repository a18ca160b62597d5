"""The nodes with others inside: parallel, branch, map and loop, each over lists of nodes.

Leans on whoever carries a list out. Refuses to know what the nodes of a list do.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta

import anyio

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    ErrorInfo,
    ExpressionError,
    InternalError,
    LoopBound,
    TaskFailed,
)
from agent_server.domain.workflows import BranchNode, LoopNode, MapNode, Node, ParallelNode
from agent_server.workflow.expressions import expression, items_of
from agent_server.workflow.failures import BrokenOff, Failed, timed_out
from agent_server.workflow.race import Quorum, Race
from agent_server.workflow.sight import Frame, result_of
from agent_server.workflow.values import Scope
from agent_server.workflow.walk import NOTHING, Ended, Walk, last_writes

CarryOut = Callable[[str, int, str, Frame, JsonObject], Awaitable[Ended]]
"""Carries a list out: the id of the node that it stands in, its number there, what its nodes' paths
begin with, the frame, and the variables."""


class Composites:
    """Carries them out, in one walk."""

    def __init__(self, walk: Walk, lane: CarryOut) -> None:
        self._walk = walk
        self._lane = lane

    async def carry_out(
        self, node: Node, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> Ended:
        """One attempt, within its time."""
        if node.timeout_s is None:
            return await self._once(node, path, frame, values, scope)
        return await self._within(node.timeout_s, node, path, frame, values, scope)

    async def _once(
        self, node: Node, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> Ended:
        if isinstance(node, ParallelNode):
            if node.wanted is not None:
                return await self._first(node, node.wanted, path, frame, values)
            return await self._parallel(node, path, frame, values)
        if isinstance(node, BranchNode):
            return await self._branch(node, path, frame, values, scope)
        if isinstance(node, MapNode):
            return await self._map(node, path, frame, values, scope)
        assert isinstance(node, LoopNode)
        return await self._loop(node, path, frame, values)

    async def _within(
        self,
        timeout_s: float,
        node: Node,
        path: str,
        frame: Frame,
        values: JsonObject,
        scope: Scope,
    ) -> Ended:
        """One attempt at a node with others inside that has so much time, a crash included."""

        async def deadline() -> str:
            return (utcnow() + timedelta(seconds=timeout_s)).isoformat()

        until = datetime.fromisoformat(await self._walk.ctx.value(f"{path}/until", deadline))
        ended: Ended | Failed | None = None

        async def race() -> bool:
            nonlocal ended
            left_s = (until - utcnow()).total_seconds()
            with anyio.move_on_after(max(0.0, left_s)):
                try:
                    ended = await self._once(node, path, frame, values, scope)
                except Failed as failed:
                    ended = failed
                except BrokenOff:
                    if utcnow() < until:
                        raise
            return ended is not None

        if not await self._walk.ctx.value(f"{path}/in_time", race):
            for inner in self._walk.graph.inside(node):
                frame.results[inner] = result_of("cancelled")
            raise Failed(node.id, path, timed_out(node.id, timeout_s).info())
        if ended is None:  # Known from the ledger.
            return await self._once(node, path, frame, values, scope)
        if isinstance(ended, Failed):
            raise ended
        return ended

    async def _parallel(
        self, node: ParallelNode, path: str, frame: Frame, values: JsonObject
    ) -> Ended:
        found, race = await self._walk.side_by_side(
            len(node.branches),
            node.max_parallel or len(node.branches),
            lambda number: self._lane(node.id, number, f"{path}.{number + 1}.", frame, values),
        )
        return self._all_of(node.branches, found, race, frame)

    def _all_of(
        self, ways: Sequence[Sequence[Node]], found: list[Ended], race: Race, frame: Frame
    ) -> Ended:
        """What all ``ways`` gave, or the failure that decides; those behind it never happened."""
        failed = race.settle()
        if failed is not None:
            if not self._walk.drain:
                for way in ways[race.first + 1 :]:
                    for inner in way:
                        self._walk.forget(frame, inner)
            raise failed
        return Ended([ended.output for ended in found], last_writes(found))

    async def _first(
        self, node: ParallelNode, wanted: int, path: str, frame: Frame, values: JsonObject
    ) -> Ended:
        """The first so many branches that succeed; the others are cancelled."""
        count = len(node.branches)
        found: dict[int, Ended] = {}
        quorum = Quorum(wanted, count)
        numbers = iter(range(count))

        async def keep(number: int) -> None:
            here = f"{path}.{number + 1}."
            found[number] = await self._lane(node.id, number, here, frame, values)

        async def work() -> None:
            for number in numbers:
                await quorum.run(number, lambda: keep(number))  # noqa: B023  # awaited at once

        async def decide() -> JsonObject:
            async with anyio.create_task_group() as group:
                quorum.group = group
                for _ in range(min(count, node.max_parallel or count)):
                    group.start_soon(work)
            if quorum.settle():
                return {"first": quorum.arrived}
            return {"failed": min(quorum.failed)}

        decided: JsonObject = await self._walk.ctx.value(f"{path}/first", decide)
        winners: list[int] = decided.get("first", [])
        failed = decided.get("failed")
        for number, branch in enumerate(node.branches):
            if number not in winners and number != failed:
                for inner in branch:
                    self._walk.forget(frame, inner)
        if failed is not None:
            if failed in quorum.failed:
                raise quorum.failed[failed]
            await keep(failed)  # Known from the ledger, it fails again.
            raise InternalError(
                f"The branch {failed + 1} of {node.id!r} failed before, and not now."
            )
        lost = [number for number in range(count) if number not in winners]
        await self._walk.abandon(*(f"{path}.{number + 1}." for number in lost))
        for number in winners:
            if number not in found:
                await keep(number)
        outputs = [found[number].output for number in winners]
        return Ended(
            outputs[0] if node.join == "any" else outputs,
            last_writes([found[number] for number in sorted(winners)]),
        )

    async def _branch(
        self, node: BranchNode, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> Ended:
        ways = (*(case.nodes for case in node.cases), node.otherwise)
        taken: list[int] = []
        for number, case in enumerate(node.cases):
            if (not taken or node.choose == "all") and expression(case.when).evaluate(scope):
                taken.append(number)
        if not taken and node.otherwise:
            taken.append(len(node.cases))
        for number, nodes in enumerate(ways):
            for index, inner in enumerate(nodes if number not in taken else ()):
                reason = f"{node.id} took another way"
                await self._walk.skipped(inner, f"{path}.{number + 1}.{index + 1}", frame, reason)

        def one(position: int) -> Awaitable[Ended]:
            way = taken[position]
            return self._lane(node.id, way, f"{path}.{way + 1}.", frame, values)

        if node.choose == "first":
            return await one(0) if taken else NOTHING
        found, race = await self._walk.side_by_side(len(taken), len(taken), one)
        return self._all_of([ways[way] for way in taken], found, race, frame)

    async def _map(
        self, node: MapNode, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> Ended:
        over = node.over
        items = items_of(over, scope)
        if not isinstance(items, list):
            shown = "null" if items is None else type(items).__name__
            raise ExpressionError(
                f"The map {node.id!r} goes over {over!r}, which gives {shown}, not a list."
            )
        self._walk.steps.need(len(items))

        errors: dict[int, ErrorInfo] = {}

        async def one(number: int) -> Ended:
            names = {**frame.names, node.name: items[number], "index": number}
            here = f"{path}.{number + 1}."
            try:
                return await self._lane(node.id, 0, here, Frame(names, frame), values)
            except Failed as failed:
                if node.on_item_error == "fail":
                    raise
                errors[number] = failed.error
                await self._walk.abandon(here)
                return NOTHING

        found, race = await self._walk.side_by_side(len(items), node.max_parallel, one)
        failed = race.settle()
        if failed is not None:
            raise failed
        if node.max_failures is not None and len(errors) > node.max_failures:
            raise Failed(node.id, path, _too_many(node, errors, len(items)))
        drop = node.on_item_error == "drop"
        return Ended(
            [e.output for number, e in enumerate(found) if not (drop and number in errors)],
            last_writes(found),
            tuple(
                {"index": number, "error": error.model_dump(mode="json")}
                for number, error in sorted(errors.items())
            ),
        )

    async def _loop(self, node: LoopNode, path: str, frame: Frame, values: JsonObject) -> Ended:
        inside = list(self._walk.graph.inside(node))
        for inner in inside:
            frame.results.pop(inner, None)
            frame.earlier.pop(inner, None)
        ended = NOTHING
        writes: JsonObject = {}
        outer = frame.names
        iteration = 1
        while True:
            now = {**values, **writes}
            if node.condition is not None and not self._ask(node, frame, now, iteration):
                break
            if iteration > node.max_iterations:
                raise Failed(node.id, path, _over_bound(node))
            for inner in inside:
                result = frame.results.pop(inner, None)
                if result is not None:
                    frame.earlier[inner] = result
            body = Frame({**outer, "iteration": iteration}, frame.parent)
            body.results, body.earlier = frame.results, frame.earlier
            ended = await self._lane(node.id, 0, f"{path}.{iteration}.", body, now)
            writes = {**writes, **ended.writes}
            if node.until is not None:
                if self._ask(node, frame, {**values, **writes}, iteration):
                    break
                if iteration == node.max_iterations:
                    raise Failed(node.id, path, _over_bound(node))
            iteration += 1
        return Ended(ended.output, writes)

    def _ask(self, node: LoopNode, frame: Frame, values: JsonObject, iteration: int) -> bool:
        scope = {**self._walk.scope(node, frame, values), "iteration": iteration}
        return bool(expression(node.condition or node.until or "false").evaluate(scope))


def _too_many(node: MapNode, errors: Mapping[int, ErrorInfo], count: int) -> ErrorInfo:
    first = errors[min(errors)]
    return TaskFailed(
        f"{len(errors)} of the {count} items of the map {node.id!r} failed, more than the "
        f"{node.max_failures} that may. The first: {first.message}",
        hint=first.hint,
    ).info()


def _over_bound(node: LoopNode) -> ErrorInfo:
    return LoopBound(
        f"The loop {node.id!r} would go on after {node.max_iterations} iterations.",
        hint="Raise max_iterations, or mend its condition.",
    ).info()
