"""What a node that does something is carried out as: the task's kind, and what it is told.

Leans on the domain's nodes and on expressions. Refuses to run anything.
"""

from typing import Final

from agent_server.domain.base import JsonObject
from agent_server.domain.workflows import (
    ActionNode,
    AgentNode,
    ApproachNode,
    ApprovalNode,
    Node,
    PlanNode,
    ToolNode,
    WaitNode,
    WorkflowNode,
)
from agent_server.execution.ports import TaskSpec
from agent_server.workflow.expressions import expression, render
from agent_server.workflow.values import Scope

ACTION_KIND: Final = "action_node"
PAUSE_KIND: Final = "pause"
FAULT_KIND: Final = "fault"
"""The failure of a node that was no task when it failed, recorded as one."""
_KINDS: Final = {"approach": "agent", "action": ACTION_KIND}
"""Where the kind of the task is not the type of the node."""
STANDING_STILL: Final = (WaitNode, ApprovalNode)
"""Nodes that take no place among the tasks that run at the same time."""


def spec_of(node: Node, path: str, payload: JsonObject) -> TaskSpec:
    """The task that ``node`` becomes at ``path``."""
    return TaskSpec(
        path=path,
        node=node.id,
        kind=_KINDS.get(node.type, node.type),
        payload=payload,
        description=node.description,
        agent=node.agent if isinstance(node, (AgentNode, ApproachNode)) else None,
    )


def payload_of(node: Node, scope: Scope) -> JsonObject:
    """What the node's task is told. Only what is set, so that it stays small in the database."""
    payload: JsonObject = {}
    if isinstance(node, (AgentNode, ApproachNode)):
        payload = {
            "agent": node.agent,
            "input": render(node.input, scope, hands_on=True),
            "approach": node.approach,
            "model": node.model,
            "output_schema": node.output_schema,
            "tools": None if node.tools is None else list(node.tools),
            "context": render(node.context, scope, hands_on=True) or None,
        }
    elif isinstance(node, PlanNode):
        payload = {
            "goal": render(node.goal, scope),
            "role": node.role,
            "input": render(node.input, scope, hands_on=True),
            "output_schema": node.output_schema,
            "agents": None if node.agents is None else list(node.agents),
            "tools": None if node.tools is None else list(node.tools),
            "approach": node.approach,
            "model": node.model,
        }
    elif isinstance(node, WorkflowNode):
        payload = {
            "workflow": node.workflow,
            "version": node.version,
            "input": render(node.input, scope, hands_on=True),
        }
    elif isinstance(node, WaitNode):
        seconds = node.duration_s
        if isinstance(seconds, str):
            seconds = expression(seconds).evaluate(scope)
        payload = {
            "duration_s": seconds,
            "until": render(node.until, scope),
            "signal": render(node.signal, scope),
        }
    elif isinstance(node, ApprovalNode):
        payload = {
            "subject": render(node.subject, scope),
            "input": render(node.input, scope, hands_on=True),
            "expires_s": node.expires_s,
            "on_expiry": node.on_expiry,
            "on_reject": node.on_reject,
            "approvers": None if node.approvers is None else list(node.approvers),
        }
    elif isinstance(node, ToolNode):
        payload = {"tool": node.tool, "arguments": render(node.arguments, scope, hands_on=True)}
    elif isinstance(node, ActionNode):
        payload = {
            "action": node.action,
            "parameters": render(node.parameters, scope, hands_on=True),
        }
    payload["timeout_s"] = node.timeout_s
    return {name: value for name, value in payload.items() if value is not None}
