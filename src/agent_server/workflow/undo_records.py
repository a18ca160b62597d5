"""What the ledger holds of nodes that can be undone: before each begins, and when it has ended.

Leans on the graph, which knows what an undoing looks at. Refuses to undo anything.
"""

from datetime import datetime
from typing import Any, Final

from agent_server.domain.base import JsonObject
from agent_server.domain.workflows import Node
from agent_server.workflow.sight import Frame, Results
from agent_server.workflow.walk import NOTHING, Ended, Walk

UNDO_KEY: Final = "undo"
"""The end of the key under which the ledger holds, before a node begins, how to undo it."""
ENDED_KEY: Final = "ended"
"""The end of the key under which the ledger holds how a node ended that can be undone."""


class UndoRecords:
    """Those of one walk."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._made: dict[str, int] = {}
        self._era: int | None = None

    async def begun(self, node: Node, path: str, frame: Frame, values: JsonObject) -> None:
        """Write down, before the node begins, how it is undone and what its undoing will look at."""
        number = self._next_of(UNDO_KEY)
        results = Results(self._walk.graph, frame, ())
        record: JsonObject = {
            "number": number,
            "node": node.id,
            "type": node.type,
            "path": path,
            "attempts": node.retry.max_attempts if node.retry else 1,
            "output": node.output,
            "nodes": [each.model_dump(mode="json") for each in node.compensate],
            "names": {},
            "inputs": {},
            "vars": {},
            "results": {},
        }
        for root, key in self._walk.graph.looked_at_by_undo(node):
            if root == "nodes" and key is not None and key != node.id:
                record["results"][key] = results.find(key)
            elif root in ("inputs", "vars"):
                source = self._walk.inputs if root == "inputs" else values
                record[root] |= source if key is None else {key: source.get(key)}
            elif root in frame.names:
                record["names"][root] = frame.names[root]

        async def make() -> JsonObject:
            return record

        await self._walk.ctx.value(f"{path}/{UNDO_KEY}", make)

    async def ended(self, node: Node, path: str, status: str, ended: Ended = NOTHING) -> None:
        """Write down how a node that can be undone ended, as far as its undoing looks at it."""
        roots = {root for root, _ in self._walk.graph.looked_at_by_undo(node)}
        written = dict(ended.writes)
        if node.output is not None and status == "succeeded":
            written[node.output] = ended.output
        record = {
            "status": status,
            "output": ended.output if "nodes" in roots else None,
            "vars": written if "vars" in roots else {},
        }

        async def make() -> JsonObject:
            return record | {"order": self._order(path, ended.found)}

        await self._walk.ctx.value(f"{path}/{ENDED_KEY}", make)

    def _order(self, path: str, found: datetime | None) -> list[Any]:
        """The node's place among those that ended. ``found``: when it had ended that ended before
        this attempt asked for it; such come before all that this attempt saw end, since none of
        those can have waited for another."""
        number = self._next_of(ENDED_KEY)
        if self._era is None:
            self._era = number
        return [self._era, 1, number] if found is None else [self._era, 0, found.isoformat(), path]

    def _next_of(self, key: str) -> int:
        """How many records of that kind were made before, in earlier attempts too."""
        if key not in self._made:
            steps = self._walk.ctx.journal.recorded().values()
            self._made[key] = sum(step.name.endswith(f"/{key}") for step in steps)
        self._made[key] += 1
        return self._made[key] - 1
