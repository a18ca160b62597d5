"""A definition as a picture: nodes and edges, the states of a run, and Mermaid text.

Leans on the graph for the order. Refuses to know where a run's tasks come from and how a terminal
or a page draws.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from agent_server.domain.plans import TaskStatus
from agent_server.domain.stored_workflows import GraphEdge, GraphNode, WorkflowGraph
from agent_server.domain.workflows import (
    LEAF_TYPES,
    ActionNode,
    AgentNode,
    ApproachNode,
    ApprovalNode,
    BranchNode,
    LoopNode,
    MapNode,
    Node,
    ParallelNode,
    PlanNode,
    SetNode,
    ToolNode,
    WaitNode,
    WorkflowDefinition,
    WorkflowNode,
    lists_of,
)
from agent_server.workflow.graph import UNDO, Graph, Lane, analyse

States = Mapping[str, tuple[str, int]]
"""Of each node that was met: how far it is, and how many times it was carried out or skipped."""

MAX_LABEL: Final = 60
_TELLING: Final[tuple[str, ...]] = (
    "running",
    "waiting",
    "failed",
    "queued",
    "cancelled",
    "succeeded",
    "skipped",
    "pending",
)
"""Of several items or iterations, the state that comes first here is the node's."""
_LIVE: Final = frozenset({"running", "waiting", "queued"})


def draw(definition: WorkflowDefinition, states: States | None = None) -> WorkflowGraph:
    """``definition``, which must be valid, with the states of a run where there is one."""
    graph = analyse(definition)
    nodes = tuple(_nodes(graph, states or {}))
    edges = tuple(_edges(graph))
    version = definition.version
    return WorkflowGraph(
        name=definition.name,
        version=None if version is None else str(version),
        nodes=nodes,
        edges=edges,
        mermaid=mermaid(nodes, edges),
    )


def _nodes(graph: Graph, states: States) -> Iterator[GraphNode]:
    for (owner, number), lane in graph.lanes.items():
        for index in sorted(range(len(lane.nodes)), key=lambda i: lane.rank[i]):
            node = lane.nodes[index]
            status, count = states.get(node.id, (None, 0))
            yield GraphNode(
                id=node.id,
                type=node.type,
                label=_cut(label_of(node)),
                inside=owner or None,
                lane=number,
                status=status,
                count=count,
            )


def _edges(graph: Graph) -> Iterator[GraphEdge]:
    for (owner, number), lane in graph.lanes.items():
        ids = [node.id for node in lane.nodes]
        for index, waits in enumerate(lane.waits):
            for other in waits:
                if lane.goes.get(other) == index:
                    continue
                if not lane.sequential or index not in lane.goes.values():
                    yield GraphEdge(source=ids[other], target=ids[index])
        for source, target in lane.goes.items():
            yield GraphEdge(source=ids[source], target=ids[target], kind="error")
        if not owner:
            continue
        place = graph.places[owner]
        first = [ids[i] for i, waits in enumerate(lane.waits) if not waits]
        if number == UNDO:
            yield from (GraphEdge(source=owner, target=target, kind="undo") for target in first)
        elif isinstance(place.node, BranchNode):
            cases = place.node.cases
            when = _cut(cases[number].when) if number < len(cases) else "else"
            yield from (GraphEdge(source=owner, target=t, kind="case", label=when) for t in first)
        elif isinstance(place.node, LoopNode):
            last = [ids[i] for i, after in enumerate(lane.dependents) if not after]
            yield GraphEdge(source=last[-1], target=first[0], kind="again", label="again")


def label_of(node: Node) -> str:
    """What a node does, in a few words."""
    words: Any
    if isinstance(node, (AgentNode, ApproachNode)):
        words = f"agent {node.agent}" if node.agent else f"approach {node.approach}"
    elif isinstance(node, ToolNode):
        words = f"tool {node.tool}"
    elif isinstance(node, ActionNode):
        words = f"action {node.action}"
    elif isinstance(node, WorkflowNode):
        named = node.workflow if isinstance(node.workflow, str) else node.workflow.get("name")
        words = f"workflow {named}" + (f"@{node.version}" if node.version is not None else "")
    elif isinstance(node, PlanNode):
        words = f"plan: {node.goal}"
    elif isinstance(node, ApprovalNode):
        words = f"approval: {node.subject}"
    elif isinstance(node, WaitNode):
        seconds = node.duration_s
        if node.signal is not None:
            words = f"wait for {node.signal}"
        elif node.until is not None:
            words = f"wait until {node.until}"
        else:
            words = f"wait {seconds:g} s" if isinstance(seconds, float) else f"wait {seconds} s"
    elif isinstance(node, SetNode):
        words = f"set {', '.join(node.variables)}"
    elif isinstance(node, ParallelNode):
        wanted = node.wanted
        words = f"parallel, {'all' if wanted is None else f'first {wanted}'}"
    elif isinstance(node, BranchNode):
        words = "branch" if node.choose == "first" else "branch, every case that is true"
    elif isinstance(node, MapNode):
        over = node.over if isinstance(node.over, str) else f"{len(node.over)} items"
        words = f"for each {node.name} of {over}"
    else:
        assert isinstance(node, LoopNode)
        words = f"while {node.condition}" if node.condition else f"until {node.until}"
    return str(words)


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_LABEL else flat[: MAX_LABEL - 1] + "…"


# A run's states -----------------------------------------------------------------------------


def states_of(
    definition: WorkflowDefinition, tasks: Iterable[tuple[str, TaskStatus]], *, succeeded: bool
) -> States:
    """How far each node is, given the tasks of a run (path and status, in the order in which they
    were made) and whether the run has succeeded.

    A node that is no task of its own is taken as done when something after it has begun.
    """
    graph = analyse(definition)
    found: dict[str, dict[str, str]] = {}
    for path, status in tasks:
        node = node_at(definition, path)
        if node is not None:
            found.setdefault(node.id, {})[re.sub(r"@\d+$", "", path)] = status
    states: dict[str, tuple[str, int]] = {
        node_id: (min(by_path.values(), key=_TELLING.index), len(by_path))
        for node_id, by_path in found.items()
    }
    _infer(graph, "", states, succeeded)
    return states


def _infer(graph: Graph, owner: str, states: dict[str, tuple[str, int]], succeeded: bool) -> None:
    """Fill in the nodes of the lists inside ``owner`` that are no tasks; those inside first."""
    for (inside, _), lane in graph.lanes.items():
        if inside != owner:
            continue
        for index in sorted(range(len(lane.nodes)), key=lambda i: -lane.rank[i]):
            node = lane.nodes[index]
            if node.id in states and states[node.id][0] == "skipped":
                for inner in graph.inside(node):
                    states.setdefault(inner, ("skipped", 0))
            else:
                _infer(graph, node.id, states, succeeded)
            if node.id not in states:
                states[node.id] = (_inferred(graph, lane, index, states, succeeded), 0)


def _inferred(graph: Graph, lane: Lane, index: int, states: States, succeeded: bool) -> str:
    node = lane.nodes[index]
    if isinstance(node, LEAF_TYPES):
        return "pending"
    inner = {states.get(name, ("pending", 0))[0] for name in graph.inside(node)}
    if inner & _LIVE:
        return "running"
    begun = (states.get(lane.nodes[i].id, ("pending", 0))[0] for i in lane.dependents[index])
    if succeeded or any(status not in ("pending", "skipped") for status in begun):
        return "succeeded"
    if "failed" in inner:
        return "failed"
    return "running" if "succeeded" in inner else "pending"


def node_at(definition: WorkflowDefinition, path: str) -> Node | None:
    """The node whose task stands at ``path``; None for one of a workflow or a plan inside."""
    parts = [part.partition("@")[0] for part in path.split(".")]
    lane, node = definition.nodes, None
    while parts:
        part = parts.pop(0)
        undone = part.endswith("!")
        index = _number(part.rstrip("!"), len(lane))
        if index is None:
            return None
        node = lane[index]
        if undone:
            lane = node.compensate
        elif parts:
            lists = lists_of(node)
            one = isinstance(node, (MapNode, LoopNode))
            number = _number(parts.pop(0), None if one else len(lists))
            if number is None or not parts or not lists:
                return None
            lane = lists[0 if one else number]
    return node


def _number(part: str, count: int | None) -> int | None:
    """The position that ``part`` counts from 1, if it is one of ``count``."""
    if not part.isdecimal() or not 0 < int(part) <= (int(part) if count is None else count):
        return None
    return int(part) - 1


# Mermaid ------------------------------------------------------------------------------------

_SHAPES: Final[Mapping[str, tuple[str, str]]] = {
    "approval": ("{{", "}}"),
    "wait": ("([", "])"),
    "set": ("[/", "/]"),
    "workflow": ("[[", "]]"),
    "plan": ("[[", "]]"),
}
_ARROWS: Final[Mapping[str, str]] = {
    "then": "-->",
    "case": "-->",
    "again": "-.->",
    "error": "-. on error .->",
    "undo": "-. undone by .->",
}
_COLOURS: Final[Mapping[str, str]] = {
    "succeeded": "fill:#d7f5dd,stroke:#2e7d32,color:#000",
    "failed": "fill:#fbdada,stroke:#c62828,color:#000",
    "running": "fill:#d9ecff,stroke:#1565c0,color:#000",
    "waiting": "fill:#fff3cd,stroke:#b26a00,color:#000",
    "queued": "fill:#eeeeee,stroke:#757575,color:#000",
    "cancelled": "fill:#eeeeee,stroke:#757575,color:#000,stroke-dasharray:4",
    "skipped": "fill:#fafafa,stroke:#bdbdbd,color:#757575,stroke-dasharray:4",
}
_RESERVED: Final = frozenset(
    {
        "end",
        "graph",
        "subgraph",
        "flowchart",
        "class",
        "classdef",
        "click",
        "style",
        "default",
        "linkstyle",
        "direction",
    }
)


def mermaid(nodes: Iterable[GraphNode], edges: Iterable[GraphEdge]) -> str:
    """A Mermaid flowchart: nodes with others inside are subgraphs, a branch asks in a diamond."""
    nodes = list(nodes)
    names = _names(nodes)
    inside: dict[str | None, dict[int, list[GraphNode]]] = {}
    for node in nodes:
        if node.lane != UNDO:
            inside.setdefault(node.inside, {}).setdefault(node.lane, []).append(node)
    undoing = [node for node in nodes if node.lane == UNDO]
    lines = ["flowchart TD"]

    def put(node: GraphNode, indent: str) -> None:
        name = names[node.id]
        text = f"{_escaped(node.id)}<br/>{_escaped(node.label)}"
        if node.count > 1:
            text += f"<br/>×{node.count}"
        if node.id not in inside:
            before, after = _SHAPES.get(node.type, ("[", "]"))
            lines.append(f'{indent}{name}{before}"{text}"{after}')
            return
        lines.append(f'{indent}subgraph {name}["{text}"]')
        lines.append(f"{indent}  direction TB")
        if node.type == "branch":
            lines.append(f'{indent}  {name}_if{{"?"}}')
        for number in sorted(inside[node.id]):
            for inner in inside[node.id][number]:
                put(inner, indent + "  ")
        lines.append(f"{indent}end")

    for node in [*inside.get(None, {}).get(0, []), *undoing]:
        put(node, "  ")
    for edge in edges:
        source = names[edge.source] + ("_if" if edge.kind == "case" else "")
        label = f'|"{_escaped(edge.label)}"|' if edge.label else ""
        lines.append(f"  {source} {_ARROWS[edge.kind]}{label} {names[edge.target]}")
    for status in sorted({node.status for node in nodes if node.status in _COLOURS}, key=str):
        lines.append(f"  classDef {status} {_COLOURS[str(status)]}")
        members = ",".join(names[node.id] for node in nodes if node.status == status)
        lines.append(f"  class {members} {status}")
    return "\n".join(lines) + "\n"


def _names(nodes: Iterable[GraphNode]) -> dict[str, str]:
    """A name of each node that Mermaid does not misread."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in nodes:
        name = node.id.replace("-", "_")
        while name.lower() in _RESERVED or name in taken:
            name += "_"
        taken |= {name, f"{name}_if"}
        names[node.id] = name
    return names


def _escaped(text: str) -> str:
    return (
        text.replace("#", "#35;")
        .replace('"', "#quot;")
        .replace("<", "#lt;")
        .replace(">", "#gt;")
        .replace("`", "#96;")
    )
