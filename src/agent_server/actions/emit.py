"""The action ``emit``: says something in the run's own event stream.

Leans on nothing: the record of the action is the event. Refuses to know who listens.
"""

from typing import Any

from agent_server.actions.handler import ActionServices
from agent_server.domain.base import JsonObject
from agent_server.execution.ports import TaskContext


class Emit:
    """Readers find the event as the output of ``action.completed``."""

    name = "emit"
    description = "Put an event of your own into the run's event stream."
    parameters: JsonObject = {
        "type": "object",
        "properties": {
            "event": {
                "type": "string",
                "minLength": 1,
                "maxLength": 200,
                "description": "Its name.",
            },
            "payload": {"description": "Any JSON value that goes with it."},
        },
        "required": ["event"],
        "additionalProperties": False,
    }

    def __init__(self, services: ActionServices) -> None:
        del services

    async def handle(self, ctx: TaskContext, parameters: JsonObject, event: JsonObject) -> Any:
        return {"event": parameters["event"], "payload": parameters.get("payload")}
