"""An agent as one run wants it: the user's own, with the run's ``RunOptions`` laid over a copy.

Leans on the SDK's way to clone an agent. Refuses to touch the agent itself, and to carry out a
tool of the caller's: a call of one stops the SDK's loop, as a call that needs consent does.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from agents import (
    Agent,
    AgentOutputSchemaBase,
    FunctionTool,
    ModelSettings,
    RunContextWrapper,
)
from agents.exceptions import ModelBehaviorError, UserError
from agents.models import get_default_model_settings
from agents.tool_context import ToolContext
from openai.types.shared import Reasoning

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.options import ClientTool, RunOptions

_OURS = "__agent_server_client_tool__"


def tailored(agent: Agent[Any], options: RunOptions) -> Agent[Any]:
    """``agent`` with ``options`` applied: a copy where they change it.

    Raises ``InvalidRequest`` when a tool of the caller's has the name of one of the agent's.
    """
    taken = {tool.name for tool in agent.tools}
    for tool in options.tools:
        if tool.name in taken:
            raise InvalidRequest(
                f"The agent {agent.name!r} has a tool {tool.name!r} of its own.",
                hint="Give the caller's tool another name.",
            )
    settings = _settings(agent, options)
    changes: dict[str, Any] = {}
    if settings is not agent.model_settings:
        changes["model_settings"] = settings
    if options.alone:
        changes |= {"tools": [], "mcp_servers": [], "handoffs": [], "output_type": None}
        changes |= {"instructions": options.instructions, "input_guardrails": []}
        return agent.clone(**changes)
    if options.tools:
        changes["tools"] = [*agent.tools, *map(_client_tool, options.tools)]
    if options.instructions is not None:
        changes["instructions"] = _instructions(agent.instructions, options.instructions)
    if options.output_schema is not None:
        changes["output_type"] = _GivenSchema(options)
    # A clone goes through all the checks of the SDK again: as much CPU as a model call.
    return agent.clone(**changes) if changes else agent


def client_tools(agent: Agent[Any]) -> frozenset[str]:
    """The names of the tools that the caller carries out."""
    return frozenset(tool.name for tool in agent.tools if hasattr(tool, _OURS))


def _settings(agent: Agent[Any], options: RunOptions) -> Any:
    given: dict[str, Any] = {
        "tool_choice": options.tool_choice,
        "parallel_tool_calls": options.parallel_tool_calls,
        "max_tokens": options.max_output_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "reasoning": Reasoning(**options.reasoning) if options.reasoning else None,
        "verbosity": options.verbosity,
        "truncation": options.truncation,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return agent.model_settings
    if sets_nothing(agent):
        return OverDefaults(**changes)
    return replace(agent.model_settings, **changes)


class OverDefaults(ModelSettings):
    """What a run sets of an agent that sets nothing itself: laid over the defaults of the model that
    is asked, and not over those of the SDK's own, which another may not take."""


def sets_nothing(agent: Agent[Any]) -> bool:
    """Whether the agent's settings are those that the SDK gives it by its model's name."""
    name = agent.model if isinstance(agent.model, str) else None
    return agent.model_settings == model_defaults(name)


@cache
def model_defaults(name: str | None) -> ModelSettings:
    """The SDK's settings for the model ``name``, or for its own; not to be changed. It copies them
    deeply for each who asks, which costs as much as a row in a database."""
    return get_default_model_settings() if name is None else get_default_model_settings(name)


def _instructions(own: Any, more: str) -> Any:
    if own is None:
        return more
    if isinstance(own, str):
        return f"{own}\n\n{more}"

    async def both(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
        said = own(context, agent)
        text = said if isinstance(said, str) else await said
        return f"{text}\n\n{more}"

    return both


async def _never(context: ToolContext[Any], arguments: str) -> Any:
    raise UserError("A tool of the caller's is not carried out by the server.")


def _client_tool(tool: ClientTool) -> FunctionTool:
    made = FunctionTool(
        name=tool.name,
        description=tool.description,
        params_json_schema=dict(tool.parameters),
        on_invoke_tool=_never,
        strict_json_schema=False,
        needs_approval=True,
    )
    # After it was made: the SDK would rewrite the schema, which is the caller's.
    made.strict_json_schema = tool.strict
    setattr(made, _OURS, True)
    return made


class _GivenSchema(AgentOutputSchemaBase):
    """The caller's JSON Schema as the agent's output type: a JSON value, checked by the solver."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options

    def is_plain_text(self) -> bool:
        return False

    def name(self) -> str:
        return self._options.output_name

    def json_schema(self) -> JsonObject:
        return dict(self._options.output_schema or {})

    def is_strict_json_schema(self) -> bool:
        return self._options.output_strict

    def validate_json(self, json_str: str) -> Any:
        try:
            return json.loads(json_str)
        except ValueError as error:
            if self._options.repair:
                return json_str  # not JSON: the solver sends it back
            raise ModelBehaviorError("The answer is not JSON, which was asked for.") from error


def calls_among(pending: Iterable[Any], names: frozenset[str]) -> list[JsonObject]:
    """Those of the SDK's interruptions that are calls for the caller, as JSON."""
    return [
        {
            "call_id": item.call_id or item.name or "call",
            "name": item.name,
            "arguments": item.arguments if isinstance(item.arguments, str) else "{}",
        }
        for item in pending
        if item.name in names
    ]
