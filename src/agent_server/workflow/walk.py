"""One walk through a workflow: what all its nodes share, and how work stands side by side in it.

Leans on the graph and on the contract of durable code. Refuses to know the types of nodes and in
which order they come.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Protocol

import anyio

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.workflows import Node
from agent_server.execution.ports import TaskContext
from agent_server.workflow.graph import Graph
from agent_server.workflow.leaves import spec_of
from agent_server.workflow.race import Race
from agent_server.workflow.sight import Frame, Results, result_of
from agent_server.workflow.steps import Steps
from agent_server.workflow.values import Scope


class Observer(Protocol):
    """Is told how each node ended, inner ones too, before anything that depends on it starts.

    Called again on replay. ``path`` tells one item or iteration from another.
    """

    async def node_completed(self, node: Node, path: str, output: Any) -> None: ...
    async def node_failed(self, node: Node, path: str, error: ErrorInfo) -> None: ...
    async def node_skipped(self, node: Node, path: str, reason: str) -> None: ...


@dataclass(frozen=True)
class Ended:
    """What a node, or a list of nodes, gave."""

    output: Any = None
    writes: JsonObject = field(default_factory=dict)
    failures: tuple[JsonObject, ...] = ()
    """What failed of a map that goes on nevertheless: ``{index, error}``."""
    went: bool = False
    """It failed and went to another node."""
    found: datetime | None = None
    """When its task had ended, where that was before this attempt asked for it."""


NOTHING: Final = Ended()
WENT: Final = Ended(went=True)


Undo = Callable[[tuple[str, ...]], Awaitable[object]]
"""Undoes what the nodes have done whose paths begin with one of these."""


@dataclass(frozen=True)
class Walk:
    """See the module."""

    ctx: TaskContext
    graph: Graph
    inputs: JsonObject
    drain: bool
    observer: Observer | None
    steps: Steps
    width: int
    """Tasks at the same time."""
    undo: Undo | None
    """None: nothing is undone, and nothing remembered for it."""

    def scope(self, node: Node, frame: Frame, values: JsonObject) -> Scope:
        earlier = self.graph.earlier.get(node.id, ())
        return {
            **frame.names,
            "inputs": self.inputs,
            "vars": values,
            "nodes": Results(self.graph, frame, earlier),
        }

    async def skipped(self, node: Node, path: str, frame: Frame, reason: str) -> Ended:
        for skipped in (node.id, *self.graph.inside(node)):
            frame.results[skipped] = result_of("skipped")
        await self.ctx.skip(spec_of(node, path, {}), reason)
        if self.observer is not None:
            await self.observer.node_skipped(node, path, reason)
        return NOTHING

    async def abandon(self, *scopes: str) -> None:
        """What happened below these paths does not count, and the workflow goes on: undo it."""
        if scopes and self.undo is not None:
            await self.undo(scopes)

    def forget(self, frame: Frame, node: Node) -> None:
        """Nobody may see how far this node came: it depends on who was faster."""
        frame.results[node.id] = result_of("cancelled")
        for inner in self.graph.inside(node):
            frame.results.pop(inner, None)

    async def side_by_side(
        self, count: int, width: int | None, one: Callable[[int], Awaitable[Ended]]
    ) -> tuple[list[Ended], Race]:
        """``one(0)`` … ``one(count - 1)``, at most ``width`` at a time, started in order."""
        found = [NOTHING] * count
        race = Race(self.drain)
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await race.run(number, lambda: keep(number))  # noqa: B023  # awaited at once

        async def keep(number: int) -> list[int]:
            found[number] = await one(number)
            return []

        async with anyio.create_task_group() as group:
            race.group = group
            for _ in range(min(count, width or self.width)):
                group.start_soon(work)
        return found, race


def last_writes(found: list[Ended]) -> JsonObject:
    writes: JsonObject = {}
    for ended in found:
        writes.update(ended.writes)
    return writes
