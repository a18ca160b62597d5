"""The order in a definition: what each node waits for, what it may see, and what is wrong there.

Leans on the domain's nodes and on the names that expressions use. Refuses to know agents, tools
and how nodes run: validation reports the problems found here, the interpreter follows the order.

A node sees the results of the nodes that are certain to have ended before it: those it waits for,
directly or not, and what stands inside them. What runs beside it cannot be seen, so that the
result does not depend on who is faster.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, Final, NamedTuple

from agent_server.domain.errors import ExpressionError, FieldError
from agent_server.domain.workflows import (
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
from agent_server.workflow.expressions import Expr, expression, template, templates_in
from agent_server.workflow.values import did_you_mean, nearest

POLICIES: Final = frozenset({"fail", "continue"})
"""What ``on_error`` may say besides the id of a node."""
UNDO: Final = -1
"""The number of the list that compensates a node, beside the lists inside it."""
MAX_PROBLEMS: Final = 200
"""After so many, names are not looked at any further: a suggestion for each costs time."""


class Use(NamedTuple):
    """One expression of a node: where it stands, and whether it is asked around the body."""

    path: str
    expr: Expr
    around: bool = False
    """The ``while`` or ``until`` of a loop, which may look at the loop's own nodes."""


@dataclass
class Lane:
    """One list of nodes and its order."""

    nodes: tuple[Node, ...]
    path: str
    inside: "Place | None"
    """The node this list stands in."""
    waits: list[tuple[int, ...]] = field(default_factory=list)
    dependents: list[list[int]] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    """Each node's place in the order: whoever waits comes later, else the list decides."""
    before: list[int] = field(default_factory=list)
    """For each node, the bits of all nodes that have ended before it starts."""
    sequential: bool = True
    broken: bool = False
    """There is a cycle: nothing can be said about what comes before what."""
    goes: dict[int, int] = field(default_factory=dict)
    """Where a node goes when it has failed, by its ``on_error``."""
    undo: bool = False
    """It compensates the node that it stands in."""

    def comes_before(self, one: int, other: int) -> bool:
        """Whether node ``one`` has ended before ``other`` starts."""
        return bool(self.before[other] >> one & 1)

    def passed_over(self, index: int, went: Collection[int]) -> str | None:
        """Why node ``index`` does not run when the nodes ``went`` have failed and gone elsewhere:
        nothing goes to it, or somebody went to a node that it is not behind."""
        if index in self.goes.values():
            if any(self.goes[source] == index for source in went):
                return None
            return "nothing failed that goes to it"
        for source in went:
            target = self.goes[source]
            if self.comes_before(source, index) and not self.comes_before(target, index):
                return f"{self.nodes[source].id} failed and went to {self.nodes[target].id}"
        return None


@dataclass
class Place:
    """Where a node stands."""

    node: Node
    lane: Lane
    index: int
    path: str
    uses: list[Use] = field(default_factory=list)

    @property
    def parent(self) -> "Place | None":
        return self.lane.inside


@dataclass
class Graph:
    """A definition's order. ``problems`` is empty when it can be run."""

    definition: WorkflowDefinition
    lanes: dict[tuple[str, int], Lane] = field(default_factory=dict)
    """By the id of the node a list stands in (the root: ``""``) and the list's number in it."""
    places: dict[str, Place] = field(default_factory=dict)
    earlier: dict[str, frozenset[str]] = field(default_factory=dict)
    """For a node in a loop: the nodes whose previous iteration its expressions look at."""
    output_uses: list[Use] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    """Every variable that is declared or set."""
    problems: list[FieldError] = field(default_factory=list)

    def inside(self, node: Node) -> Iterator[str]:
        """The ids of the nodes inside ``node``."""
        for inner in lists_of(node):
            for child in inner:
                yield child.id
                yield from self.inside(child)

    def looked_at_by_undo(self, node: Node) -> set[tuple[str, str | None]]:
        """What the nodes that compensate ``node`` look at: names, each with its first key."""
        found: set[tuple[str, str | None]] = set()
        ids = [inner for each in node.compensate for inner in (each.id, *self.inside(each))]
        for place in (self.places[each] for each in ids):
            for use in place.uses:
                for root, keys, _ in use.expr.references:
                    found.add((root, keys[0] if keys and isinstance(keys[0], str) else None))
        return found


def analyse(definition: WorkflowDefinition, known: Iterable[str] = ()) -> Graph:
    """The order of ``definition``. ``known`` are ids of nodes that ended in an earlier plan:
    they may be named although they are not there."""
    graph = Graph(definition)
    earlier_plan = frozenset(known)
    _place(graph, definition.nodes, "/nodes", None, "", 0)
    graph.variables.update(definition.variables)
    for place in graph.places.values():
        if isinstance(place.node, SetNode):
            graph.variables.update(place.node.variables)
        if place.node.output is not None:
            graph.variables.setdefault(place.node.output, None)
    for use in _expressions(graph, definition.variables, "/variables"):
        _check_roots(graph, use, {"inputs"})
    graph.output_uses = list(_expressions(graph, definition.output, "/output"))
    for lane in list(graph.lanes.values()):
        _order(graph, lane, earlier_plan)
    for place in graph.places.values():
        names = _names_at(place)
        for use in place.uses:
            around = {"iteration"} if use.around else set()
            _check_roots(graph, use, {"inputs", "vars", "nodes"} | names | around)
            _check_sight(graph, use, place, earlier_plan)
    for use in graph.output_uses:
        _check_roots(graph, use, {"inputs", "vars", "nodes"})
        _check_sight(graph, use, None, earlier_plan)
    return graph


def _place(
    graph: Graph, nodes: tuple[Node, ...], path: str, inside: Place | None, owner: str, number: int
) -> None:
    lane = Lane(nodes, path, inside)
    graph.lanes[owner, number] = lane
    for index, node in enumerate(nodes):
        place = Place(node, lane, index, f"{path}/{index}")
        if node.id in graph.places:
            graph.problems.append(
                FieldError(
                    path=f"{place.path}/id",
                    message=f"the id {node.id!r} is taken by {graph.places[node.id].path}",
                    hint="Every node of a workflow needs an id of its own, inner ones too.",
                )
            )
        else:
            graph.places[node.id] = place
        place.uses = list(_uses(graph, node, place.path))
        for inner_number, (inner_path, inner) in enumerate(_inner(node, place.path)):
            if inner:
                _place(graph, inner, inner_path, place, node.id, inner_number)
        if node.compensate:
            _place(graph, node.compensate, f"{place.path}/compensate", place, node.id, UNDO)
            graph.lanes[node.id, UNDO].undo = True


def _inner(node: Node, path: str) -> Iterator[tuple[str, tuple[Node, ...]]]:
    if isinstance(node, ParallelNode):
        for number, branch in enumerate(node.branches):
            yield f"{path}/branches/{number}", branch
    elif isinstance(node, BranchNode):
        for number, case in enumerate(node.cases):
            yield f"{path}/cases/{number}/nodes", case.nodes
        yield f"{path}/else", node.otherwise
    elif isinstance(node, (MapNode, LoopNode)):
        yield f"{path}/nodes", node.nodes


def _uses(graph: Graph, node: Node, path: str) -> Iterator[Use]:
    """Every expression of ``node`` itself, not of the nodes inside it."""
    if node.when is not None:
        yield from _one(graph, node.when, f"{path}/when")
    if isinstance(node, (AgentNode, ApproachNode)):
        yield from _expressions(graph, node.input, f"{path}/input")
        yield from _expressions(graph, node.context, f"{path}/context")
    elif isinstance(node, PlanNode):
        yield from _expressions(graph, node.goal, f"{path}/goal")
        yield from _expressions(graph, node.input, f"{path}/input")
    elif isinstance(node, ApprovalNode):
        yield from _expressions(graph, node.subject, f"{path}/subject")
        yield from _expressions(graph, node.input, f"{path}/input")
    elif isinstance(node, WorkflowNode):
        yield from _expressions(graph, node.input, f"{path}/input")
    elif isinstance(node, WaitNode):
        if isinstance(node.duration_s, str):
            yield from _one(graph, node.duration_s, f"{path}/duration_s")
        yield from _expressions(graph, node.until, f"{path}/until")
        yield from _expressions(graph, node.signal, f"{path}/signal")
    elif isinstance(node, ToolNode):
        yield from _expressions(graph, node.arguments, f"{path}/arguments")
    elif isinstance(node, ActionNode):
        yield from _expressions(graph, node.parameters, f"{path}/parameters")
    elif isinstance(node, SetNode):
        yield from _expressions(graph, node.variables, f"{path}/variables")
    elif isinstance(node, BranchNode):
        for number, case in enumerate(node.cases):
            yield from _one(graph, case.when, f"{path}/cases/{number}/when")
    elif isinstance(node, MapNode):
        if isinstance(node.over, str):
            yield from _one(graph, node.over, f"{path}/over")
        else:
            yield from _expressions(graph, node.over, f"{path}/over")
    elif isinstance(node, LoopNode):
        if node.condition is not None:
            yield from _one(graph, node.condition, f"{path}/while", around=True)
        if node.until is not None:
            yield from _one(graph, node.until, f"{path}/until", around=True)


def _one(graph: Graph, source: str, path: str, around: bool = False) -> Iterator[Use]:
    try:
        yield Use(path, expression(source), around)
    except ExpressionError as error:
        graph.problems.append(FieldError(path=path, message=error.detail, hint=error.hint))


def _expressions(graph: Graph, value: Any, path: str) -> Iterator[Use]:
    for where, source in templates_in(value):
        try:
            for expr in template(source).expressions:
                yield Use(path + where, expr)
        except ExpressionError as error:
            graph.problems.append(
                FieldError(path=path + where, message=error.detail, hint=error.hint)
            )


# Order --------------------------------------------------------------------------------------


def _order(graph: Graph, lane: Lane, known: frozenset[str]) -> None:
    nodes = lane.nodes
    count = len(nodes)
    position = {node.id: index for index, node in enumerate(nodes)}
    lane.sequential = all(node.depends_on is None for node in nodes)
    _follow_errors(graph, lane, position)
    if lane.sequential:
        lane.waits = [(index - 1,) if index else () for index in range(count)]
        lane.dependents = [[index + 1] if index + 1 < count else [] for index in range(count)]
        lane.rank = list(range(count))
        lane.before = [(1 << index) - 1 for index in range(count)]
        return
    sources: dict[int, set[int]] = {}
    for source, target in lane.goes.items():
        sources.setdefault(target, set()).add(source)
    for index, node in enumerate(nodes):
        if node.depends_on is None:
            found_here = _implied(graph, lane, index) | sources.get(index, set())
            lane.waits.append(tuple(sorted(found_here - {index})))
            continue
        found: list[int] = []
        for number, name in enumerate(dict.fromkeys(node.depends_on)):
            if name in position:
                found.append(position[name])
            elif name not in known and len(graph.problems) < MAX_PROBLEMS:
                elsewhere = name in graph.places
                graph.problems.append(
                    FieldError(
                        path=f"{lane.path}/{index}/depends_on/{number}",
                        message=(
                            f"{name!r} is not in the same list as {node.id!r}"
                            if elsewhere
                            else f"{node.id!r} depends on {name!r}, which does not exist"
                        ),
                        hint=(
                            "Depend on the node of this list that it stands in."
                            if elsewhere
                            else did_you_mean(name, [n for n in position if n != node.id])
                        ),
                    )
                )
        lane.waits.append(tuple(dict.fromkeys((*found, *sorted(sources.get(index, ()))))))
    lane.dependents = [[] for _ in nodes]
    for index, waits in enumerate(lane.waits):
        for other in waits:
            lane.dependents[other].append(index)
    left = [len(waits) for waits in lane.waits]
    ready = [index for index in range(count) if not left[index]]
    heapify(ready)
    lane.rank = [count] * count
    lane.before = [0] * count
    placed = 0
    while ready:
        index = heappop(ready)
        lane.rank[index] = placed
        placed += 1
        for other in lane.waits[index]:
            lane.before[index] |= lane.before[other] | (1 << other)
        for dependent in lane.dependents[index]:
            left[dependent] -= 1
            if not left[dependent]:
                heappush(ready, dependent)
    if placed < count:
        lane.broken = True
        cycle = _cycle(lane, {index for index in range(count) if left[index]})
        names = [nodes[index].id for index in cycle]
        graph.problems.append(
            FieldError(
                path=f"{lane.path}/{cycle[0]}/depends_on",
                message="a cycle: " + " → ".join([*names, names[0]]),
                hint="Each of them waits for the next; remove one dependency.",
            )
        )


def _follow_errors(graph: Graph, lane: Lane, position: Mapping[str, int]) -> None:
    """Where the nodes of the list go when they fail."""
    for index, node in enumerate(lane.nodes):
        if node.on_error in POLICIES:
            continue
        target = position.get(node.on_error)
        message, hint = None, None
        if target is None and node.on_error in graph.places:
            message = f"{node.on_error!r} is not in the same list as {node.id!r}"
            hint = "Go to a later node of this list, whose nodes may then go on from there."
        elif target is None:
            message = f"on_error is 'fail', 'continue' or the id of a node, not {node.on_error!r}"
            hint = did_you_mean(node.on_error, [*POLICIES, *position])
        elif target == index or (lane.sequential and target < index):
            message = f"{node.id!r} cannot go back to {node.on_error!r}"
            hint = "Go to a later node; to try again, give the node a retry or put it in a loop."
        else:
            lane.goes[index] = target
        if message is not None and len(graph.problems) < MAX_PROBLEMS:
            graph.problems.append(
                FieldError(path=f"{lane.path}/{index}/on_error", message=message, hint=hint)
            )


def _implied(graph: Graph, lane: Lane, index: int) -> set[int]:
    """The nodes of the list whose results are used by one that names no dependency."""
    found: set[int] = set()
    ids = {lane.nodes[index].id, *graph.inside(lane.nodes[index])}
    for node_id in ids:
        place = graph.places.get(node_id)
        for use in place.uses if place else ():
            for reference in use.expr.references:
                if reference.root == "nodes" and reference.keys:
                    target = graph.places.get(str(reference.keys[0]))
                    while target is not None and target.lane is not lane:
                        target = target.parent
                    if target is not None:
                        found.add(target.index)
    return found


def _cycle(lane: Lane, stuck: set[int]) -> list[int]:
    """One cycle among nodes of which each waits for another of them, smallest first."""
    seen: dict[int, int] = {}
    trail: list[int] = []
    index = min(stuck)
    while index not in seen:
        seen[index] = len(trail)
        trail.append(index)
        index = min(other for other in lane.waits[index] if other in stuck)
    cycle = trail[seen[index] :]
    start = cycle.index(min(cycle))
    return cycle[start:] + cycle[:start]


# Sight --------------------------------------------------------------------------------------


def _names_at(place: Place) -> set[str]:
    names: set[str] = set()
    lane = place.lane
    while lane.inside is not None:
        node = lane.inside.node
        if isinstance(node, MapNode) and not lane.undo:
            names |= {node.name, "index"}
        elif isinstance(node, LoopNode) and not lane.undo:
            names.add("iteration")
        lane = lane.inside.lane
    return names


def _check_roots(graph: Graph, use: Use, allowed: set[str]) -> None:
    for reference in use.expr.references if len(graph.problems) < MAX_PROBLEMS else ():
        root, keys = reference.root, reference.keys
        if root not in allowed:
            hint = did_you_mean(root, allowed)
            if root in graph.places:
                hint = f"Write nodes.{root}.output."
            elif root in graph.variables:
                hint = f"Write vars.{root}."
            elif root in _input_names(graph.definition.inputs)[0]:
                hint = f"Write inputs.{root}."
            graph.problems.append(
                FieldError(path=use.path, message=f"there is no {root!r} here", hint=hint)
            )
        elif root == "vars" and keys and keys[0] not in graph.variables:
            graph.problems.append(
                FieldError(
                    path=use.path,
                    message=f"no variable {keys[0]!r} is declared or set",
                    hint=did_you_mean(str(keys[0]), graph.variables)
                    or "Declare it under 'variables'.",
                )
            )
        elif root == "inputs" and keys:
            names, closed = _input_names(graph.definition.inputs)
            if closed and keys[0] not in names:
                graph.problems.append(
                    FieldError(
                        path=use.path,
                        message=f"the inputs have no {keys[0]!r}",
                        hint=did_you_mean(str(keys[0]), names) or "Declare it under 'inputs'.",
                    )
                )


def _input_names(schema: Mapping[str, Any] | None) -> tuple[list[str], bool]:
    """The inputs' names, and whether there are no others."""
    if not schema:
        return [], False
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return [], schema.get("additionalProperties") is False
    return list(properties), not schema.get("additionalProperties", False)


FIELDS = ("output", "status", "error")
MAP_FIELDS = (*FIELDS, "failures")


def _check_sight(graph: Graph, use: Use, place: Place | None, known: frozenset[str]) -> None:
    for reference in use.expr.references if len(graph.problems) < MAX_PROBLEMS else ():
        if reference.root != "nodes":
            continue
        message, hint = None, None
        if not reference.keys or not isinstance(reference.keys[0], str):
            message = "'nodes' needs the id of a node, written out"
            hint = "Write nodes.<id>.output."
        else:
            name = reference.keys[0]
            target = graph.places.get(name)
            if target is None:
                if name not in known:
                    message = f"there is no node {name!r}"
                    dashed = (each for each in graph.places if each.startswith(f"{name}-"))
                    split = next(dashed, None)
                    hint = f"Write nodes['{split}']." if split else did_you_mean(name, graph.places)
            else:
                message, hint = _sight(graph, use, place, target)
            is_map = target is not None and isinstance(target.node, MapNode)
            fields = MAP_FIELDS if is_map else FIELDS
            if message is None and len(reference.keys) > 1 and reference.keys[1] not in fields:
                message = f"nodes.{name} has no {reference.keys[1]!r}"
                near = nearest(str(reference.keys[1]), fields)
                hint = (
                    f"Did you mean {near!r}?"
                    if near
                    else f"Write nodes.{name}.output, or .output.{reference.keys[1]} for a part of it."
                )
        if message is not None:
            graph.problems.append(FieldError(path=use.path, message=message, hint=hint))


def _sight(
    graph: Graph, use: Use, place: Place | None, target: Place
) -> tuple[str | None, str | None]:
    """Why the node ``target`` cannot be seen from ``place`` (None: the workflow's output)."""
    name = target.node.id
    viewers: dict[int, Place] = {}
    undoing: set[int] = set()
    """Places that are looked at from what compensates them."""
    viewer = place
    while viewer is not None:
        viewers[id(viewer.lane)] = viewer
        if viewer.lane.undo:
            undoing.add(id(viewer.parent))
        viewer = viewer.parent
    root = graph.lanes["", 0]
    seen = target
    hidden: Place | None = None
    while id(seen.lane) not in viewers and not (place is None and seen.lane is root):
        assert seen.parent is not None
        if seen.lane.undo:
            return f"{name!r} only runs when {seen.parent.node.id!r} is undone", None
        seen = seen.parent
        if isinstance(seen.node, MapNode):
            hidden = hidden or seen
    if hidden is not None:
        return (
            f"{name!r} stands inside the map {hidden.node.id!r}, which has one of it for each item",
            f"Write nodes.{hidden.node.id}.output: the list of its last nodes' outputs.",
        )
    if place is None:
        return None, None
    standing = viewers[id(seen.lane)]
    if seen.lane.broken:
        return None, None
    if seen is not standing and seen.lane.comes_before(seen.index, standing.index):
        return None, None
    if seen is standing and id(seen) in undoing:
        return None, None
    if seen is standing is place and use.around and target is not place:
        return None, None
    if not undoing and _common_loop(place, target):
        graph.earlier[place.node.id] = graph.earlier.get(place.node.id, frozenset()) | {name}
        return None, None
    if target is place:
        return f"{name!r} refers to its own result", None
    if seen is standing:
        if seen is target:
            return f"{name!r} has not ended while the nodes inside it run", None
        return (
            f"{name!r} and {place.node.id!r} stand in different branches of {seen.node.id!r}",
            "A branch cannot see what another one does.",
        )
    later = seen.lane.comes_before(standing.index, seen.index)
    return (
        f"{name!r} has not run when {place.node.id!r} does",
        (
            f"{seen.node.id!r} comes after {standing.node.id!r}."
            if later
            else f"Add {seen.node.id!r} to the depends_on of {standing.node.id!r}."
        ),
    )


def _common_loop(place: Place, target: Place) -> bool:
    """Whether both stand in one loop, with no map between it and either of them."""
    loops: set[int] = set()
    parent = place.parent
    while parent is not None and not isinstance(parent.node, MapNode):
        if isinstance(parent.node, LoopNode):
            loops.add(id(parent))
        parent = parent.parent
    parent = target.parent
    while parent is not None and not isinstance(parent.node, MapNode):
        if id(parent) in loops:
            return True
        parent = parent.parent
    return False
