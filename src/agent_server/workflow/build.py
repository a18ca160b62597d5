"""Workflows written in Python: functions that give the same data as YAML does.

Leans on the domain's nodes, whose fields the functions take by keyword under the names that YAML
has (``as_``, ``while_`` and ``else_`` where Python has taken the word). Refuses to run or to check
anything: what comes out is a ``WorkflowDefinition`` like any other.

    from agent_server.workflow import build as b

    flow = b.workflow(
        "refine",
        b.agent("draft", "writer", "Write about {{ inputs.topic }}"),
        b.loop("polish", b.agent("again", "writer", "Better: {{ vars.text }}", output="text"),
               until="iteration == 3", max_iterations=3),
        inputs={"type": "object", "properties": {"topic": {"type": "string"}}},
        variables={"text": ""},
    )
    client.runs.create(workflow=b.data(flow), variables={"topic": "tea"})
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from agent_server.domain.base import JsonObject
from agent_server.domain.workflows import (
    ActionNode,
    AgentNode,
    ApproachNode,
    ApprovalNode,
    BranchNode,
    Case,
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
)

M = TypeVar("M", bound=BaseModel)


def workflow(name: str, *nodes: Node, **fields: Any) -> WorkflowDefinition:
    """A definition. ``fields``: ``inputs``, ``variables``, ``output``, ``version``, …"""
    return WorkflowDefinition.model_validate({"name": name, "nodes": nodes, **fields})


def agent(id: str, agent: str, input: Any, **fields: Any) -> AgentNode:
    return _node(AgentNode, fields, id=id, agent=agent, input=input)


def approach(id: str, approach: str, input: Any, **fields: Any) -> ApproachNode:
    return _node(ApproachNode, fields, id=id, approach=approach, input=input)


def plan(id: str, goal: str, **fields: Any) -> PlanNode:
    return _node(PlanNode, fields, id=id, goal=goal)


def tool(id: str, tool: str, arguments: JsonObject | None = None, **fields: Any) -> ToolNode:
    return _node(ToolNode, fields, id=id, tool=tool, arguments=arguments or {})


def action(id: str, action: str, parameters: JsonObject | None = None, **fields: Any) -> ActionNode:
    return _node(ActionNode, fields, id=id, action=action, parameters=parameters or {})


def set_(id: str, variables: JsonObject, **fields: Any) -> SetNode:
    return _node(SetNode, fields, id=id, variables=variables)


def sub(
    id: str, workflow: str | WorkflowDefinition, input: JsonObject | None = None, **fields: Any
) -> WorkflowNode:
    """A ``workflow`` node: a stored workflow's name, or a definition inline."""
    inner = data(workflow) if isinstance(workflow, WorkflowDefinition) else workflow
    return _node(WorkflowNode, fields, id=id, workflow=inner, input=input or {})


def wait(id: str, **fields: Any) -> WaitNode:
    """One of ``duration_s``, ``until`` and ``signal``."""
    return _node(WaitNode, fields, id=id)


def approval(id: str, subject: str, **fields: Any) -> ApprovalNode:
    return _node(ApprovalNode, fields, id=id, subject=subject)


def parallel(id: str, *branches: Sequence[Node], **fields: Any) -> ParallelNode:
    return _node(ParallelNode, fields, id=id, branches=branches)


def branch(id: str, *cases: Case, **fields: Any) -> BranchNode:
    """``cases`` are made by ``case``; ``else_`` is a list of nodes."""
    return _node(BranchNode, fields, id=id, cases=cases)


def case(when: str, *nodes: Node) -> Case:
    return Case.model_validate({"when": when, "nodes": nodes})


def map_(id: str, over: str | Sequence[Any], *nodes: Node, **fields: Any) -> MapNode:
    """``as_`` names the item."""
    return _node(MapNode, fields, id=id, over=over, nodes=nodes)


def loop(id: str, *nodes: Node, **fields: Any) -> LoopNode:
    """``while_`` or ``until``, and ``max_iterations``."""
    return _node(LoopNode, fields, id=id, nodes=nodes)


def data(definition: WorkflowDefinition) -> JsonObject:
    """The definition as JSON values, without what is left at its default."""
    made: JsonObject = _typed(definition, definition.model_dump(mode="json", exclude_defaults=True))
    return made


def _node(model: type[M], fields: Mapping[str, Any], **given: Any) -> M:
    named = {name.rstrip("_"): value for name, value in fields.items()}
    return model.model_validate({**named, **given})


def _typed(model: BaseModel, made: Any) -> Any:
    """Put the nodes' types back, which are at their default and tell one node from another."""
    if "type" in type(model).model_fields:
        made = {**model.model_dump(include={"type"}), **made}
    for name, field in type(model).model_fields.items():
        key = field.alias or name
        if key in made:
            made[key] = _in(getattr(model, name), made[key])
    return made


def _in(value: Any, made: Any) -> Any:
    if isinstance(value, BaseModel):
        return _typed(value, made)
    if isinstance(value, tuple) and isinstance(made, list):
        return [_in(one, other) for one, other in zip(value, made, strict=True)]
    return made
