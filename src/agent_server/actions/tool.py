"""The action ``tool``: calls a tool of the server by name.

Leans on the durable tool call that it is lent, which ledgers the effect and keeps the tool's
policy. Refuses to know where tools come from.
"""

from typing import Any

from agent_server.actions.handler import ActionServices
from agent_server.domain.base import JsonObject
from agent_server.execution.ports import TaskContext


class CallTool:
    """Its output is the tool's."""

    name = "tool"
    description = "Call a tool by name, with arguments."
    parameters: JsonObject = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "description": "The tool's name."},
            "arguments": {"type": "object", "description": "Its arguments.", "default": {}},
        },
        "required": ["name"],
        "additionalProperties": False,
    }

    def __init__(self, services: ActionServices) -> None:
        self._call = services.call_tool

    async def handle(self, ctx: TaskContext, parameters: JsonObject, event: JsonObject) -> Any:
        return await self._call(
            ctx, parameters["name"], parameters.get("arguments", {}), key="tool/1"
        )
