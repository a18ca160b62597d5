"""What a definition says that can never be right: types that do not fit, nodes that never run.

Leans on the graph and on JSON Schema's words for types. Refuses to guess: where a type or a value
is only known when the workflow runs, nothing is said here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Protocol

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ExpressionError, FieldError, error_codes
from agent_server.domain.json_schema import faults_in
from agent_server.domain.workflows import (
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
)
from agent_server.workflow.expressions import expression
from agent_server.workflow.graph import Graph, Place, Use
from agent_server.workflow.language import Reference
from agent_server.workflow.values import did_you_mean, kind_of

_BARE: Final = re.compile(
    r"""\s*[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[(?:'[^'\\]*'|"[^"\\]*"|\d+)\])*\s*"""
)
"""An expression that is nothing but one name with keys behind it."""
_LIST: Final[JsonObject] = {"type": "array"}
_APPROVAL: Final[JsonObject] = {
    "type": "object",
    "properties": {
        "approved": {"type": "boolean"},
        "decision": {"type": "string"},
        "reason": {},
        "by": {},
        "input": {},
    },
    "additionalProperties": False,
}
_WORDS: Final[Mapping[str, str]] = {
    "object": "an object",
    "array": "a list",
    "string": "text",
    "integer": "a number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


class ToolParameters(Protocol):
    """Where the parameters of tools are known."""

    def tool_parameters(self, name: str) -> JsonObject | None:
        """JSON Schema of the arguments of the tool, or None."""


def moment(text: str) -> datetime:
    """An RFC 3339 moment with its offset. Raises ``ValueError``."""
    found = datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace("z", "+00:00"))
    if found.tzinfo is None:
        raise ValueError("it has no offset")
    return found


def check(graph: Graph, tools: ToolParameters | None) -> Iterator[FieldError]:
    """Every fault of this kind."""
    for place in graph.places.values():
        yield from _never(place)
        yield from _policies(place)
        yield from _values(graph, place)
        if isinstance(place.node, ToolNode) and tools is not None:
            yield from _arguments(place, tools.tool_parameters(place.node.tool))
        for use in place.uses:
            yield from _keys(graph, use)
    for use in graph.output_uses:
        yield from _keys(graph, use)


# Nodes that never run -----------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _constant(source: str) -> tuple[Any] | None:
    """The value of an expression that depends on nothing."""
    try:
        found = expression(source)
        return None if found.references else (found.evaluate({}),)
    except ExpressionError:
        return None


def _never(place: Place) -> Iterator[FieldError]:
    node, path = place.node, place.path
    if node.when is not None and (value := _constant(node.when)) and not value[0]:
        yield _unreachable(f"{path}/when", f"{node.id!r} never runs: its 'when' is always false")
    if isinstance(node, BranchNode):
        taken = False
        for number, case in enumerate(node.cases):
            value = _constant(case.when)
            where = f"{path}/cases/{number}"
            if taken:
                yield _unreachable(where, "an earlier case is always taken")
            elif value and not value[0]:
                yield _unreachable(
                    f"{where}/when", "it is always false, so the case is never taken"
                )
            taken = taken or bool(value and value[0] and node.choose == "first")
        always = any((value := _constant(case.when)) and value[0] for case in node.cases)
        if always and node.otherwise:
            yield _unreachable(f"{path}/else", "a case is always taken, so 'else' never is")
    elif isinstance(node, LoopNode):
        value = _constant(node.condition or "")
        if value and not value[0]:
            yield _unreachable(f"{path}/while", "it is always false, so the body never runs")


def _unreachable(path: str, message: str) -> FieldError:
    return FieldError(path=path, message=message, hint="Take it out, or mend the condition.")


# Policies -----------------------------------------------------------------------------------


def _policies(place: Place) -> Iterator[FieldError]:
    node, path = place.node, place.path
    codes = error_codes()
    for number, code in enumerate(node.retry.on if node.retry else ()):
        if code not in codes:
            yield FieldError(
                path=f"{path}/retry/on/{number}",
                message=f"there is no error code {code!r}",
                hint=did_you_mean(code, codes) or "docs/errors.md lists them.",
            )
    inside: Place | None = place
    while node.compensate and inside is not None:
        if inside.lane.undo:
            yield FieldError(
                path=f"{path}/compensate",
                message="what compensates a node is not compensated itself",
                hint="Give it a retry, and let it go on with on_error: continue.",
            )
        inside = inside.parent


# Values -------------------------------------------------------------------------------------


def _values(graph: Graph, place: Place) -> Iterator[FieldError]:
    node, path = place.node, place.path
    if isinstance(node, MapNode) and isinstance(node.over, str):
        known = _types(graph, path + "/over", place)
        if known is not None and "array" not in known:
            shown = " or ".join(dict.fromkeys(_WORDS.get(kind, kind) for kind in known))
            yield FieldError(
                path=f"{path}/over",
                message=f"a map needs a list, and {node.over!r} is {shown}",
                hint="values(…) makes a list of an object's values.",
            )
    elif isinstance(node, WaitNode):
        if node.until is not None and "{{" not in node.until:
            try:
                moment(node.until)
            except ValueError:
                yield FieldError(
                    path=f"{path}/until",
                    message=f"{node.until!r} is not an RFC 3339 moment with an offset",
                    hint="Such as 2030-01-31T09:00:00Z.",
                )
        if isinstance(node.duration_s, str) and (value := _constant(node.duration_s)):
            if type(value[0]) not in (int, float) or value[0] < 0:
                yield FieldError(
                    path=f"{path}/duration_s", message="it must be a number of seconds, at least 0"
                )


def _arguments(place: Place, schema: JsonObject | None) -> Iterator[FieldError]:
    """Arguments that the tool does not have, and literal ones of a wrong type."""
    assert isinstance(place.node, ToolNode)
    properties = (schema or {}).get("properties")
    if schema is None or not isinstance(properties, dict):
        return
    for name, value in place.node.arguments.items():
        path = f"{place.path}/arguments/{name}"
        if name not in properties:
            if schema.get("additionalProperties") is False:
                yield FieldError(
                    path=path,
                    message=f"the tool {place.node.tool!r} has no argument {name!r}",
                    hint=did_you_mean(name, properties),
                )
        elif isinstance(properties[name], dict) and not _templated(value):
            fitting = {**properties[name], "$defs": schema.get("$defs", {})}
            yield from faults_in(value, fitting, at=path)


def _templated(value: Any) -> bool:
    if isinstance(value, str):
        return "{{" in value
    if isinstance(value, dict):
        return any(map(_templated, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_templated, value))


# Types --------------------------------------------------------------------------------------


def _types(graph: Graph, path: str, place: Place) -> list[str] | None:
    """The JSON types that the expression at ``path`` may have; None where that is not known."""
    use = next((use for use in place.uses if use.path == path), None)
    if use is None:
        return None
    if not use.expr.references:
        value = _constant(use.expr.source)
        return None if value is None else [_type_name(value[0])]
    if not _BARE.fullmatch(use.expr.source) or len(use.expr.references) != 1:
        return None
    schema = _schema_of(graph, use.expr.references[0])
    kinds = schema.get("type") if isinstance(schema, dict) else None
    return [kinds] if isinstance(kinds, str) else kinds


def _type_name(value: Any) -> str:
    words = {word: kind for kind, word in _WORDS.items()}
    return words[kind_of(value)]


def _keys(graph: Graph, use: Use) -> Iterator[FieldError]:
    """Keys that are not in what they are looked up in."""
    for reference in use.expr.references:
        schema, rest = _start(graph, reference)
        for key in rest:
            if not isinstance(schema, dict):
                break
            fault = _no_key(schema, key)
            if fault is not None:
                hint = did_you_mean(str(key), list(schema.get("properties") or ()))
                yield FieldError(path=use.path, message=fault, hint=hint)
                break
            schema = _step(schema, key)


def _no_key(schema: JsonObject, key: str | int) -> str | None:
    kind, properties = schema.get("type"), schema.get("properties")
    if kind in ("integer", "number", "boolean", "null"):
        return f"{_WORDS[str(kind)]} has no {key!r}"
    if kind in ("array", "string") and isinstance(key, str):
        return f"{_WORDS[str(kind)]} has no {key!r}"
    closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    if kind == "object" and closed and isinstance(properties, dict) and key not in properties:
        return f"there is no {key!r} in it"
    return None


def _schema_of(graph: Graph, reference: Reference) -> Any:
    schema, rest = _start(graph, reference)
    for key in rest:
        schema = _step(schema, key) if isinstance(schema, dict) else None
    return schema


def _step(schema: JsonObject, key: str | int) -> Any:
    if isinstance(key, int):
        return schema.get("items")
    properties = schema.get("properties")
    return properties.get(key) if isinstance(properties, dict) else None


def _start(graph: Graph, reference: Reference) -> tuple[Any, tuple[str | int, ...]]:
    """The schema of what a reference begins with, and the keys that are left."""
    root, keys = reference.root, reference.keys
    if root in ("index", "iteration"):
        return {"type": "integer"}, keys
    if root == "inputs" and keys:  # Its own keys are checked with the names.
        return _step(graph.definition.inputs or {}, keys[0]), keys[1:]
    if root == "nodes" and len(keys) > 1 and str(keys[0]) in graph.places:
        node, field = graph.places[str(keys[0])].node, keys[1]
        if field == "output":
            return _output_of(node), keys[2:]
        return {"status": {"type": "string"}, "failures": _LIST}.get(str(field)), keys[2:]
    return None, keys


def _output_of(node: Node) -> Any:
    """The JSON Schema of a node's output, null left aside."""
    if isinstance(node, (AgentNode, ApproachNode, PlanNode)):
        return node.output_schema
    if isinstance(node, (MapNode,)):
        return {"type": "array", "items": _output_of(node.nodes[-1])}
    if isinstance(node, ParallelNode):
        return None if node.join == "any" else _LIST
    if isinstance(node, BranchNode):
        return _LIST if node.choose == "all" else None
    if isinstance(node, ApprovalNode):
        return _APPROVAL
    if isinstance(node, SetNode):
        properties: dict[str, Any] = dict.fromkeys(node.variables)
        return {"type": "object", "properties": properties, "additionalProperties": False}
    return None


def names_missing(given: Iterable[str], schema: JsonObject | None, path: str) -> list[FieldError]:
    """What is wrong with the names under which a sub-workflow's inputs are given."""
    properties = (schema or {}).get("properties")
    if schema is None or not isinstance(properties, dict):
        return []
    found = [
        FieldError(path=path, message=f"the workflow needs the input {name!r}")
        for name in schema.get("required") or ()
        if name not in given
    ]
    if "additionalProperties" not in schema and "patternProperties" not in schema:
        found += [
            FieldError(
                path=f"{path}/{name}",
                message=f"the workflow has no input {name!r}",
                hint=did_you_mean(name, properties),
            )
            for name in given
            if name not in properties
        ]
    return found
