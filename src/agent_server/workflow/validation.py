"""Says everything that is wrong with a workflow, all at once, before anything runs.

Leans on the domain's model for the form, on the graph for the order, and on a catalog for the
names of agents and tools. Refuses to know how a workflow is carried out.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, Protocol

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from agent_server.actions.firing import trigger_fault
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, InvalidRequest, InvalidWorkflow
from agent_server.domain.json_schema import KEYWORDS, faults_in, schema_fault
from agent_server.domain.workflows import (
    NODE_MODELS,
    NODE_TYPES,
    ActionNode,
    AgentNode,
    ApproachNode,
    Case,
    MapNode,
    PlanNode,
    Retry,
    ToolNode,
    WorkflowDefinition,
    WorkflowNode,
)
from agent_server.workflow.calls import endless, split_name
from agent_server.workflow.checks import check, names_missing
from agent_server.workflow.graph import MAX_PROBLEMS, Graph, analyse
from agent_server.workflow.values import RESERVED, did_you_mean, kind_of

MAX_REPORTED: Final = 100
"""Errors listed; the message counts all of them."""


Line = Callable[[str], int | None]
"""The line on which a place (a JSON pointer) stands."""


class Catalog(Protocol):
    """The names that exist on this server."""

    def tool_parameters(self, name: str) -> JsonObject | None:
        """JSON Schema of the arguments of the tool; None where that is not known."""

    def has_agent(self, name: str) -> bool: ...
    def has_tool(self, name: str) -> bool: ...
    def agent_names(self) -> Collection[str]: ...
    def tool_names(self) -> Collection[str]: ...
    def approach_names(self) -> Collection[str]: ...


def validate(
    definition: WorkflowDefinition | JsonObject,
    catalog: Catalog | None = None,
    *,
    actions: Collection[str] | None = None,
    workflows: Collection[str] | None = None,
    known: Iterable[str] = (),
    line: Line | None = None,
    under_way: bool = False,
) -> WorkflowDefinition:
    """``definition`` as a model, if nothing is wrong with it.

    Raises ``InvalidWorkflow`` whose ``errors`` name every fault with its place (a JSON pointer),
    its line where ``line`` finds one (``source.Source.line``), and a suggestion. The names that
    exist are those of ``catalog``, ``actions`` and ``workflows`` (stored ones); without one of
    them its names are not looked at. ``known`` are ids of nodes that ended earlier, which a
    revised plan may refer to. ``under_way``: what calls itself is told by the node that comes to.
    """
    graph, errors = _faults(definition, catalog, actions, workflows, known)
    if graph is not None:
        for reference, held in graph.definition.workflows.items():
            _, found = _inner(held, f"/workflows/{reference}", catalog, actions, workflows)
            errors += found
        errors += () if under_way else endless(graph)
    if errors:
        raise invalid(errors, line)
    assert graph is not None
    return graph.definition


def _faults(
    definition: WorkflowDefinition | JsonObject,
    catalog: Catalog | None,
    actions: Collection[str] | None,
    workflows: Collection[str] | None,
    known: Iterable[str] = (),
) -> tuple[Graph | None, list[FieldError]]:
    """The order of ``definition``, and its faults but for the workflows that it holds."""
    model, errors = parse(definition)
    if model is None:
        return None, errors
    broken = {error.path for error in errors}
    graph = analyse(model, known)
    if workflows is not None:
        workflows = {*workflows, model.name, *(split_name(held)[0] for held in model.workflows)}
    found = [
        *graph.problems,
        *islice(_names(graph, catalog, actions), MAX_PROBLEMS),
        *islice(check(graph, catalog), MAX_PROBLEMS),
        *_sub_workflows(graph, catalog, actions, workflows),
        *_local_names(graph),
        *_schemas(graph),
        *_actions(model, graph, actions),
    ]
    return graph, errors + [e for e in found if not any(_within(e.path, p) for p in broken)]


def invalid(errors: Iterable[FieldError], line: Line | None = None) -> InvalidWorkflow:
    """The error that tells ``errors``, each once and with its line."""
    found = list({(e.path, e.message): e for e in errors}.values())
    count = len(found)
    shown = found[:MAX_REPORTED]
    if line is not None:
        shown = [error.model_copy(update={"line": line(error.path)}) for error in shown]
    return InvalidWorkflow(
        f"The workflow has {count} {'error' if count == 1 else 'errors'}: "
        + "; ".join(f"{e.path or '/'}: {e.message}" for e in shown[:3])
        + ("; …" if count > 3 else "."),
        hint="Each entry of 'errors' names a place in the definition and what to do there.",
        errors=shown,
    )


def _within(path: str, broken: str) -> bool:
    return path == broken or path.startswith(broken + "/")


# Form ---------------------------------------------------------------------------------------

_FILL: Final[Mapping[str, Any]] = {
    "name": "workflow",
    "max_iterations": 1,
    "when": "inputs == 0",
    "over": "inputs.x",
    "while": "inputs == 0",
}
_ROUNDS: Final = 4


def parse(
    definition: WorkflowDefinition | JsonObject,
) -> tuple[WorkflowDefinition | None, list[FieldError]]:
    """The model, and what is wrong with the form of ``definition``.

    Where a part is wrong, the model holds a stand-in for it, so that the rest can be checked as
    well; the model is None when too little is left to check.
    """
    if isinstance(definition, WorkflowDefinition):
        return definition, []
    try:
        return WorkflowDefinition.model_validate(definition), []
    except ValidationError as error:
        problems = error.errors(include_url=False)
    if not isinstance(definition, dict) or any(not p["loc"] for p in problems):
        return None, [_form_error(definition, p) for p in problems]
    errors: list[FieldError] = []
    mended = copy.deepcopy(definition)
    for _ in range(_ROUNDS):
        real = [p for p in problems if not _only_follows(p)]
        if not errors:
            errors = _joined(_form_error(definition, p) for p in real)
        for problem in real:
            _mend(mended, problem)
        try:
            return WorkflowDefinition.model_validate(mended), errors
        except ValidationError as error:
            problems = error.errors(include_url=False)
    return None, errors


def _only_follows(problem: ErrorDetails) -> bool:
    """Pydantic also calls a list too short when an item in it was wrong."""
    return problem["type"] == "too_short" and bool(problem["input"])


def _steps(definition: Any, problem: ErrorDetails) -> tuple[list[Any], Any]:
    """Where it is, without the types that pydantic puts in there, and the holder of its end."""
    loc = problem["loc"]
    if problem["type"] in _KINDS and loc and loc[-1] in _ALTERNATIVES:
        loc = loc[:-1]
    steps: list[Any] = []
    value = definition
    holder: Any = None
    item = False
    for part in loc:
        if item and isinstance(value, dict) and part == value.get("type"):
            item = False
            continue
        item = isinstance(part, int)
        steps.append(part)
        holder = value
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return steps, holder


def _form_error(definition: Any, problem: ErrorDetails) -> FieldError:
    steps, holder = _steps(definition, problem)
    path = "".join(f"/{part}" for part in steps)
    kind, message, hint = problem["type"], problem["msg"], None
    if kind == "extra_forbidden":
        known = _fields(holder, steps)
        message = f"there is no field {str(steps[-1])!r} here"
        hint = did_you_mean(str(steps[-1]), known) or (
            "Fields: " + ", ".join(known) + "." if known else None
        )
    elif kind == "missing":
        message = f"the field {str(steps[-1])!r} is missing"
        if steps[-1] == "max_iterations":
            hint = "A loop needs a bound; it fails when it would go on after it."
    elif kind == "union_tag_invalid":
        given = problem["input"].get("type") if isinstance(problem["input"], dict) else None
        message = f"there is no node type {given!r}"
        hint = did_you_mean(str(given), NODE_TYPES) or f"Types: {', '.join(sorted(NODE_TYPES))}."
    elif kind == "union_tag_not_found":
        message = "the node has no 'type'"
        hint = f"Types: {', '.join(sorted(NODE_TYPES))}."
    elif kind == "too_short":
        message = "it is empty; at least one is needed"
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
    elif kind == "string_pattern_mismatch" and steps and steps[-1] == "id":
        message = f"{problem['input']!r} cannot be an id"
        hint = "An id begins with a letter and goes on with letters, digits, '_' and '-'."
    elif kind == "literal_error":
        message = f"{problem['input']!r} is none of {problem['ctx']['expected']}"
        hint = did_you_mean(str(problem["input"]), re.findall("'([^']*)'", message)[1:])
    elif kind in _KINDS:
        message, hint = _wrong_kind(problem, steps)
    else:
        message = message.replace("Input should be", "it must be").replace("String", "the text")
    return FieldError(path=path, message=message, hint=hint)


_KINDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "string_type": "text",
}
"""What was asked for, by pydantic's name of the error."""
_ALTERNATIVES: Final = ("str", "int", "float", "tuple[any, ...]", "dict[str,any]")
"""What pydantic appends to the place of a field that takes one of several types."""


def _joined(errors: Iterable[FieldError]) -> list[FieldError]:
    """``errors``, of which those about the types that one field takes are told as one."""
    found: dict[tuple[str, str], FieldError] = {}
    for error in errors:
        wanted, a_type, given = error.message.partition(", not ")
        key = (error.path, "" if a_type else error.message)
        if key in found:
            other = found[key].message.partition(", not ")[0]
            message = f"{other} or {wanted.removeprefix('it must be ')}, not {given}"
            error = error.model_copy(update={"message": message})
        found[key] = error
    return list(found.values())


def _wrong_kind(problem: ErrorDetails, steps: list[Any]) -> tuple[str, str | None]:
    given, field, wanted = (
        problem["input"],
        str(steps[-1] if steps else ""),
        _KINDS[problem["type"]],
    )
    shown = f"{given!r}" if isinstance(given, str) and len(given) < 60 else kind_of(given)
    hint = None
    if wanted == "a list" and isinstance(given, str):
        hint = f"Write [{given}]."
    elif wanted == "a list":
        hint = "Begin each of them with '- '."
    elif field == "retry":
        hint = f"Write {{max_attempts: {given}}}." if isinstance(given, int) else None
    elif field.endswith("_s") and isinstance(given, str):
        hint = "Seconds, without a unit."
    return f"it must be {wanted}, not {shown}", hint


def _fields(holder: Any, steps: list[Any]) -> list[str]:
    model: type[BaseModel] | None = WorkflowDefinition
    if len(steps) > 1:
        kind = holder.get("type") if isinstance(holder, dict) else None
        model = NODE_MODELS.get(kind) if isinstance(kind, str) else None
        if steps[-2] == "retry":
            model = Retry
        elif model is None and "cases" in steps[-3:]:
            model = Case
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _mend(definition: JsonObject, problem: ErrorDetails) -> None:
    """Put a stand-in where ``problem`` is, so that everything else can be checked."""
    steps, holder = _steps(definition, problem)
    end = steps[-1] if steps else None
    kind = problem["type"]
    try:
        if kind in (
            "union_tag_invalid",
            "union_tag_not_found",
            "model_type",
            "model_attributes_type",
        ):
            given = problem["input"]
            name = given.get("id") if isinstance(given, dict) else None
            stand_in = {"type": "set", "id": name or f"unnamed{id(given)}", "variables": {"_": 0}}
            stand_in["variables"] = {"unnamed": None}
            if isinstance(given, dict) and isinstance(given.get("depends_on"), list):
                stand_in["depends_on"] = given["depends_on"]
            holder[end] = stand_in
        elif kind == "missing":
            if end == "id":
                holder[end] = f"unnamed{id(holder)}"
            elif end in ("nodes", "branches", "cases", "variables"):
                _fill_list(holder, str(end))
            else:
                holder[end] = _FILL.get(str(end), "unnamed")
        elif kind == "value_error" and isinstance(problem["input"], dict):
            node = problem["input"]
            for name in ("until", "signal", "first", "join", "max_failures"):
                node.pop(name, None)
            if node.get("type") == "loop":
                node.setdefault("while", _FILL["while"])
            elif node.get("type") == "wait":
                node["duration_s"] = 0
        elif kind == "too_short":
            _fill_list(holder, end)
        elif isinstance(holder, dict):
            holder.pop(end, None)
        elif isinstance(holder, list) and isinstance(end, int):
            holder[end] = "unnamed"
    except (KeyError, IndexError, TypeError):
        return


def _fill_list(holder: Any, end: Any) -> None:
    node = {"type": "set", "id": f"unnamed{id(holder)}x{end}", "variables": {"unnamed": None}}
    filled: dict[Any, Any] = {
        "branches": [[node]],
        "cases": [{"when": "false", "nodes": [node]}],
        "variables": {"unnamed": None},
    }
    holder[end] = filled.get(end, [node])


# Names --------------------------------------------------------------------------------------


def _names(
    graph: Graph, catalog: Catalog | None, actions: Collection[str] | None
) -> Iterable[FieldError]:
    for place in graph.places.values():
        node, path = place.node, place.path
        if isinstance(node, ActionNode) and actions is not None and node.action not in actions:
            yield _unknown(f"{path}/action", "action", node.action, actions)
        if catalog is None:
            continue
        if isinstance(node, (AgentNode, ApproachNode)):
            if node.agent is not None and not catalog.has_agent(node.agent):
                yield _unknown(f"{path}/agent", "agent", node.agent, catalog.agent_names())
            if node.approach is not None and node.approach not in catalog.approach_names():
                yield _unknown(
                    f"{path}/approach", "approach", node.approach, catalog.approach_names()
                )
            for number, tool in enumerate(node.tools or ()):
                if not catalog.has_tool(tool):
                    yield _unknown(f"{path}/tools/{number}", "tool", tool, catalog.tool_names())
        elif isinstance(node, PlanNode):
            for number, agent in enumerate(node.agents or ()):
                if not catalog.has_agent(agent):
                    yield _unknown(f"{path}/agents/{number}", "agent", agent, catalog.agent_names())
            for number, tool in enumerate(node.tools or ()):
                if not catalog.has_tool(tool):
                    yield _unknown(f"{path}/tools/{number}", "tool", tool, catalog.tool_names())
        elif isinstance(node, ToolNode) and not catalog.has_tool(node.tool):
            yield _unknown(f"{path}/tool", "tool", node.tool, catalog.tool_names())


def _unknown(path: str, what: str, name: str, known: Collection[str]) -> FieldError:
    hint = did_you_mean(name, known)
    return FieldError(path=path, message=f"there is no {what} {name!r}", hint=hint)


def _sub_workflows(
    graph: Graph,
    catalog: Catalog | None,
    actions: Collection[str] | None,
    workflows: Collection[str] | None,
) -> Iterator[FieldError]:
    for place in graph.places.values():
        node, path = place.node, place.path
        if not isinstance(node, WorkflowNode):
            continue
        if isinstance(node.workflow, str):
            name, _ = split_name(node.workflow)
            if "@" in node.workflow and node.version is not None:
                message = "the version is given twice"
                yield FieldError(path=f"{path}/version", message=message)
            if workflows is not None and name not in workflows:
                yield _unknown(f"{path}/workflow", "stored workflow", name, workflows)
            continue
        inner, errors = _inner(node.workflow, f"{path}/workflow", catalog, actions, workflows)
        yield from errors
        if inner is not None and not errors:
            yield from names_missing(node.input, inner.inputs, f"{path}/input")


def _inner(
    definition: JsonObject,
    path: str,
    catalog: Catalog | None,
    actions: Collection[str] | None,
    workflows: Collection[str] | None,
) -> tuple[WorkflowDefinition | None, list[FieldError]]:
    """A definition that stands at ``path`` of another one, and its faults."""
    graph, errors = _faults(definition, catalog, actions, workflows)
    if graph is not None and graph.definition.workflows:
        message = "only the outermost definition of a run holds 'workflows'"
        errors.append(FieldError(path="/workflows", message=message))
    placed = [error.model_copy(update={"path": f"{path}{error.path}"}) for error in errors]
    return None if graph is None else graph.definition, placed


def _local_names(graph: Graph) -> Iterable[FieldError]:
    for place in graph.places.values():
        node = place.node
        if isinstance(node, MapNode) and node.name in RESERVED:
            yield FieldError(
                path=f"{place.path}/as",
                message=f"{node.name!r} means something else in expressions",
                hint="Choose another name for the item.",
            )


def _schemas(graph: Graph) -> Iterable[FieldError]:
    schemas: list[tuple[str, JsonObject]] = []
    inputs = graph.definition.inputs
    if inputs is not None:
        schemas.append(("/inputs", inputs))
        for name in () if "properties" in inputs else inputs:
            if name not in KEYWORDS and not name.startswith(("$", "x-")):
                yield FieldError(
                    path=f"/inputs/{name}",
                    message=f"{name!r} is no keyword of JSON Schema",
                    hint=f"Write inputs: {{properties: {{{name}: {{type: string}}}}}}.",
                )
    for place in graph.places.values():
        if isinstance(place.node, (AgentNode, ApproachNode, PlanNode)) and place.node.output_schema:
            schemas.append((f"{place.path}/output_schema", place.node.output_schema))
    for path, schema in schemas:
        fault = schema_fault(schema)
        if fault is not None:
            yield FieldError(path=path, message=fault)


def _actions(
    model: WorkflowDefinition, graph: Graph, actions: Collection[str] | None
) -> Iterable[FieldError]:
    for number, action in enumerate(model.actions):
        fault = trigger_fault(action.trigger, list(graph.places))
        if fault is not None:
            yield FieldError(path=f"/actions/{number}/trigger", message=fault)
        if actions is not None and action.action not in actions:
            yield _unknown(f"/actions/{number}/action", "action", action.action, actions)


# Inputs -------------------------------------------------------------------------------------


def check_inputs(definition: WorkflowDefinition, given: JsonObject | None) -> JsonObject:
    """``given`` with the schema's defaults, if it fits ``definition.inputs``.

    A schema that names properties and says nothing of others takes no others. A property that is
    neither given nor required is null. Raises ``InvalidRequest`` with every fault at once.
    """
    values = dict(given or {})
    schema = definition.inputs
    if schema is None:
        return values
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    for name, sub in properties.items():
        if name not in values and isinstance(sub, dict) and "default" in sub:
            values[name] = sub["default"]
    errors = faults_in(values, {"type": "object", **schema})
    if properties and "additionalProperties" not in schema and "patternProperties" not in schema:
        errors += [
            FieldError(
                path=f"/{name}",
                message=f"the workflow has no input {name!r}",
                hint=did_you_mean(name, properties),
            )
            for name in values
            if name not in properties
        ]
    if errors:
        errors = [FieldError(**{**e.model_dump(), "path": f"/variables{e.path}"}) for e in errors]
        raise InvalidRequest(
            f"The variables do not fit the inputs of the workflow {definition.name!r}: "
            + "; ".join(f"{e.path}: {e.message}" for e in errors[:3])
            + ("; …" if len(errors) > 3 else "."),
            errors=errors,
        )
    return {**dict.fromkeys(properties), **values}
