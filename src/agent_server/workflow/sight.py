"""What a node of a running workflow may see: the variables and the results before it.

Leans on the graph for the ids there are. Refuses to know how nodes are carried out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo
from agent_server.workflow.graph import Graph
from agent_server.workflow.values import Lookup


@dataclass(frozen=True)
class Variables:
    """The variables a node sees: their values, and by which place in the order they were written
    in this list (one that is missing comes from outside)."""

    values: JsonObject
    written: dict[str, int]

    def write(self, values: Mapping[str, Any], rank: int) -> "Variables":
        if not values:
            return self
        return Variables({**self.values, **values}, {**self.written, **dict.fromkeys(values, rank)})

    def writes(self) -> JsonObject:
        return {name: self.values[name] for name in self.written}


def merged(sources: list[Variables], outside: Variables) -> Variables:
    """What is seen after all of ``sources``: for each variable, the last writer in the order."""
    if not sources:
        return outside
    first = sources[0]
    if all(source is first for source in sources):
        return first
    values, written = dict(outside.values), dict[str, int]()
    for source in sources:
        for name, rank in source.written.items():
            if rank >= written.get(name, -1):
                written[name] = rank
                values[name] = source.values[name]
    return Variables(values, written)


@dataclass
class Frame:
    """Where results are kept: the workflow's own, or those of one item of a map."""

    names: JsonObject
    """``item``, ``index`` and ``iteration``, as they are called here."""
    parent: "Frame | None" = None
    results: dict[str, JsonObject] = field(default_factory=dict)
    earlier: dict[str, JsonObject] = field(default_factory=dict)
    """Results of the previous iterations of loops."""

    def find(self, node_id: str) -> JsonObject | None:
        frame: Frame | None = self
        while frame is not None:
            if node_id in frame.results:
                return frame.results[node_id]
            frame = frame.parent
        return None

    def find_earlier(self, node_id: str) -> JsonObject | None:
        frame: Frame | None = self
        while frame is not None:
            if node_id in frame.earlier:
                return frame.earlier[node_id]
            frame = frame.parent
        return None


class Results(Lookup):
    """``nodes`` in an expression."""

    __slots__ = ("_earlier", "_frame", "_graph")

    def __init__(self, graph: Graph, frame: Frame, earlier: Collection[str]) -> None:
        self._graph = graph
        self._frame = frame
        self._earlier = earlier

    def find(self, key: str) -> JsonObject:
        in_earlier = key in self._earlier
        found = self._frame.find_earlier(key) if in_earlier else self._frame.find(key)
        if found is not None:
            return found
        if key not in self._graph.places:
            raise KeyError(key)
        return result_of("pending")

    def known(self) -> Collection[str]:
        return self._graph.places


def result_of(status: str, output: Any = None, error: ErrorInfo | None = None) -> JsonObject:
    return {
        "status": status,
        "output": output,
        "error": None if error is None else error.model_dump(mode="json"),
    }
