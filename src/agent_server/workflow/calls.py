"""Which workflows a definition calls by name, and that this ends: none comes to call itself.

Leans on the domain's nodes. Refuses to fetch a definition: what a name stands for is said by
whoever asks, and a name that nobody explains is not followed.
"""

from collections.abc import Iterator
from typing import Final

from pydantic import ValidationError

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError
from agent_server.domain.workflows import Node, WorkflowDefinition, WorkflowNode, walk
from agent_server.workflow.graph import Graph

MAX_CHAIN: Final = 8
"""How many workflows may stand inside each other."""
Chain = tuple[str, ...]


def split_name(workflow: str, version: str | int | None = None) -> tuple[str, str | None]:
    """The name and the version that ``name@version`` stands for, or a name and ``version``."""
    name, at, written = workflow.partition("@")
    if at:
        return name, written
    return name, None if version is None else str(version)


def reference_to(name: str, version: str | int | None) -> str:
    """What ``split_name`` splits."""
    return name if version is None else f"{name}@{version}"


def nodes_in(definition: WorkflowDefinition) -> Iterator[Node]:
    """Every node, those of definitions that stand inside it too."""
    for node in walk(definition.nodes):
        yield node
        inner = _inline(node) if isinstance(node, WorkflowNode) else None
        if inner is not None:
            yield from nodes_in(inner)


def references_in(definition: WorkflowDefinition) -> Iterator[tuple[str, str | None]]:
    """The names and versions that ``nodes_in`` it call."""
    for node in nodes_in(definition):
        if isinstance(node, WorkflowNode) and isinstance(node.workflow, str):
            yield split_name(node.workflow, node.version)


def names_itself(definition: WorkflowDefinition, name: str, version: str | None) -> bool:
    """Whether a node inside ``definition`` that calls this means the definition itself."""
    own = None if definition.version is None else str(definition.version)
    return name == definition.name and version in (None, own)


def endless(graph: Graph) -> Iterator[FieldError]:
    """Each outermost node through which the workflow comes to call itself, or goes too deep."""
    held = graph.definition.workflows
    read: dict[str, WorkflowDefinition | None] = {}
    depths: dict[str, int] = {}

    def called(
        node: WorkflowNode, around: tuple[WorkflowDefinition, ...]
    ) -> WorkflowDefinition | None:
        if not isinstance(node.workflow, str):
            return _inline(node)
        name, version = split_name(node.workflow, node.version)
        reference = reference_to(name, version)
        if reference in held:
            if reference not in read:
                read[reference] = _read(held[reference])
            return read[reference]
        return next((each for each in around if names_itself(each, name, version)), None)

    def follow(
        node: WorkflowNode, around: tuple[WorkflowDefinition, ...], chain: Chain
    ) -> Chain | None:
        """The chain that has no good end, if there is one."""
        model = called(node, around)
        if model is None:
            return None
        title = reference_to(model.name, model.version)
        longer = (*chain, title)
        if isinstance(node.workflow, str):
            if title in chain:
                return longer
            if depths.get(title, 0) >= len(longer):
                return None  # Followed from here or from deeper down.
            depths[title] = len(longer)
        if len(longer) > MAX_CHAIN:
            return longer
        inner = (each for each in walk(model.nodes) if isinstance(each, WorkflowNode))
        found = (follow(each, (*around, model), longer) for each in inner)
        return next((bad for bad in found if bad is not None), None)

    own = graph.definition
    for place in graph.places.values():
        if isinstance(place.node, WorkflowNode):
            bad = follow(place.node, (own,), (reference_to(own.name, own.version),))
            if bad is not None:
                yield _endless(f"{place.path}/workflow", bad)


def _endless(path: str, chain: Chain) -> FieldError:
    shown = " → ".join(chain)
    if chain[-1] in chain[:-1]:
        return FieldError(
            path=path,
            message=f"the workflow calls itself: {shown}",
            hint="Use a loop, whose bound says how often it may go round.",
        )
    return FieldError(
        path=path,
        message=f"more than {MAX_CHAIN} workflows stand inside each other: {shown}",
        hint="Put the inner ones' nodes into the outer ones.",
    )


def _inline(node: WorkflowNode) -> WorkflowDefinition | None:
    return None if isinstance(node.workflow, str) else _read(node.workflow)


def _read(definition: JsonObject) -> WorkflowDefinition | None:
    """None where its form is wrong, which validation tells."""
    try:
        return WorkflowDefinition.model_validate(definition)
    except ValidationError:
        return None
