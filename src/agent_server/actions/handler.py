"""What an action is: the Protocol that each handler keeps, and the handlers by name.

Leans on the contract of durable code. Refuses to know plans, models and when
an action fires.
"""

import difflib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent_server.actions.ssrf import GuardedHttp
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, InvalidRequest
from agent_server.domain.json_schema import faults_in
from agent_server.execution.ports import TaskContext
from agent_server.plugins import ACTIONS, Extension, extensions


class ToolCaller(Protocol):
    """Calls one tool by name, as a ledgered step of ``ctx``'s task."""

    async def __call__(
        self, ctx: TaskContext, name: str, arguments: JsonObject, *, key: str
    ) -> Any: ...


@dataclass(frozen=True)
class ActionServices:
    """What the server lends to actions that touch the world."""

    http: GuardedHttp
    call_tool: ToolCaller
    sleep: Callable[[float], Awaitable[None]]
    """Waits between two tries, in seconds."""


class ActionHandler(Protocol):
    """One kind of action.

    ``handle`` is durable code: it may be called again after a crash, and must then find what it
    has done in ``ctx.journal``. It runs in a task of its own, so its step keys are its own.
    ``parameters`` have been rendered and fit the schema. ``event`` is what the action fires on:
    ``type``, and as the type has it ``node``, ``path``, ``output``, ``error`` or ``plan``. The
    JSON value that it returns becomes the output of ``action.completed``; ``RunError`` becomes
    ``action.failed``, which leaves the run as it is.
    """

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> JsonObject:
        """The JSON Schema of its parameters: an object."""

    async def handle(self, ctx: TaskContext, parameters: JsonObject, event: JsonObject) -> Any: ...


class Actions:
    """The actions of this server by name: its own and those of plugins, made when first used."""

    def __init__(
        self, services: ActionServices, found: Mapping[str, Extension] | None = None
    ) -> None:
        self._services = services
        self._found = extensions(ACTIONS) if found is None else dict(found)
        self._made: dict[str, ActionHandler] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._found)

    def get(self, name: str) -> ActionHandler:
        """Raises ``InvalidRequest`` with the nearest names, or what a broken plugin raised."""
        if name not in self._found:
            near = difflib.get_close_matches(name, self.names, n=3)
            raise InvalidRequest(
                f"There is no action {name!r}.",
                hint=(
                    f"Did you mean {' or '.join(map(repr, near))}?"
                    if near
                    else f"There are: {', '.join(self.names)}."
                ),
            )
        if name not in self._made:
            self._made[name] = self._found[name].make(self._services)
        return self._made[name]

    def faults(self, name: str, parameters: JsonObject, *, rendered: bool) -> list[FieldError]:
        """What is wrong with ``parameters`` for the action ``name``.

        Before templates are rendered only the names can be judged; afterwards everything is.
        """
        schema = self.get(name).parameters
        if rendered:
            return faults_in(parameters, schema, at="parameters")
        known: JsonObject = schema.get("properties", {})
        missing = [n for n in schema.get("required", ()) if n not in parameters]
        unknown = [n for n in parameters if n not in known]
        if schema.get("additionalProperties", True) is not False:
            unknown = []
        return [
            *(
                FieldError(path=f"parameters/{n}", message=f"{name!r} needs the parameter {n!r}")
                for n in missing
            ),
            *(
                FieldError(
                    path=f"parameters/{n}",
                    message=f"{name!r} has no parameter {n!r}; it has {', '.join(known) or 'none'}",
                )
                for n in unknown
            ),
        ]

    def describe(self) -> list[JsonObject]:
        """Each action as it is listed; a plugin that cannot be loaded says so in ``error``."""
        listed: list[JsonObject] = []
        for name, extension in self._found.items():
            entry: JsonObject = {"name": name, "source": extension.distribution}
            try:
                handler = self.get(name)
                entry |= {"description": handler.description, "parameters": handler.parameters}
            except Exception as error:  # a broken plugin must not hide the others
                entry |= {"description": "", "error": str(error)}
            listed.append(entry)
        return listed
