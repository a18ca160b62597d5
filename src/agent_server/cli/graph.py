"""Draws the graph of a workflow or of a run as a tree for a terminal.

Leans on rich and on the marks of the tree of tasks. A pure function of the graph and the room
there is; refuses to print.
"""

from rich.text import Text
from rich.tree import Tree

from agent_server.cli.errors import printable
from agent_server.cli.tree import MARKS
from agent_server.domain.stored_workflows import GraphNode, WorkflowGraph

UNDO_LANE = -1


def tree_of(graph: WorkflowGraph, width: int = 100) -> Tree:
    """``graph`` as a tree: what stands inside a node hangs below it, in the order in which it is
    carried out; an order that the list does not show is told by ``after``."""
    title = Text(graph.name, "bold", no_wrap=True)
    if graph.version is not None:
        title.append(f" @{graph.version}", "dim")
    tree = Tree(title, guide_style="dim")
    inside: dict[str | None, dict[int, list[GraphNode]]] = {}
    for node in graph.nodes:
        inside.setdefault(node.inside, {}).setdefault(node.lane, []).append(node)
    after: dict[str, list[str]] = {}
    cases: dict[tuple[str, str], str] = {}
    goes: dict[str, str] = {}
    rescued: dict[str, list[str]] = {}
    for edge in graph.edges:
        if edge.kind == "then":
            after.setdefault(edge.target, []).append(edge.source)
        elif edge.kind == "case":
            cases[edge.source, edge.target] = edge.label
        elif edge.kind == "error":
            goes[edge.source] = edge.target
            rescued.setdefault(edge.target, []).append(edge.source)

    def hang(branch: Tree, lane: list[GraphNode], room: int) -> None:
        before: str | None = None
        for node in lane:
            told = after.get(node.id, [])
            notes = []
            if node.id in rescued:
                notes.append(f"only if {' or '.join(rescued[node.id])} fails")
            elif told != ([before] if before else []):
                notes.append(f"after {', '.join(told)}" if told else "at once")
            if node.id in goes:
                notes.append(f"on error {goes[node.id]}")
            child = branch.add(_line(node, notes, room))
            before = node.id
            for number, inner in sorted(inside.get(node.id, {}).items()):
                way = _way(node, number, cases.get((node.id, inner[0].id)))
                if way is None:
                    hang(child, inner, room - 4)
                else:
                    hang(child.add(Text(way, "dim", no_wrap=True)), inner, room - 8)

    hang(tree, inside.get(None, {}).get(0, []), width - 4)
    return tree


def _way(node: GraphNode, number: int, label: str | None) -> str | None:
    """What the list ``number`` inside ``node`` is called; None needs no name."""
    if number == UNDO_LANE:
        return "undone by"
    if node.type == "branch":
        return "else" if label == "else" else f"when {printable(label or '?')}"
    return f"branch {number + 1}" if node.type == "parallel" else None


def _line(node: GraphNode, notes: list[str], room: int) -> Text:
    mark, style = MARKS.get(node.status or "", ("•", "dim"))
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{mark} ", style)
    text.append(node.id, "bold" if node.status in ("running", "waiting") else "")
    tail = f"  ×{node.count}" if node.count > 1 else ""
    tail += "".join(f"  ({note})" for note in notes)
    label = printable(node.label)
    left = room - len(text) - len(tail) - 2
    if left > 8:
        text.append("  " + (label if len(label) <= left else label[: left - 1] + "…"), "dim")
    text.append(tail, "dim italic")
    return text
