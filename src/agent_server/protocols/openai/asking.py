"""What a request asks for, as a run: the options of its agent, and what its response repeats.

Leans on the bodies, the items and the catalogue. Refuses by name whatever would not be honoured.
"""

import json
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.json_schema import schema_fault
from agent_server.domain.options import ClientTool, RunOptions
from agent_server.domain.runs import Budget, RunRequest
from agent_server.protocols.openai.bodies import CreateResponse
from agent_server.protocols.openai.deps import check_include
from agent_server.protocols.openai.errors import refuse, refuse_unknown, unsupported
from agent_server.protocols.openai.items import last_text, media
from agent_server.protocols.openai.names import Target

CACHING: Final = ("prompt_cache_options", "prompt_cache_retention")
REFUSED: Final = (
    "access_programs", "background_options", "context_management", "image", "moderation",
    "multi_agent", "prompt", *CACHING,
)  # fmt: skip
UNSAID: Final = {
    "responses": ("frequency_penalty", "presence_penalty"),
    "chat_completions": ("truncation",),
}
"""What has no place in the requests to a model, by their API."""
TIERS: Final = ("auto", "default")
ON_SERVER: Final = "Give the agent that tool on the server; the answer then uses it."


def check(body: CreateResponse) -> None:
    """Raise for each parameter that would not be honoured."""
    refuse_given(body, *REFUSED)
    check_include(body.include or ())
    if body.top_logprobs:
        raise unsupported("top_logprobs", "'top_logprobs'")
    check_tier(body.service_tier)
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation", "obfuscation of deltas")
    if body.stream_options is not None and body.stream_options.include_usage is not None:
        raise unsupported("stream_options.include_usage", "'include_usage' of a response")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options", "'stream_options' needs 'stream': true.")
    if body.background and body.store is False:
        raise refuse("background", "A background response must be stored.", "Leave out 'store'.")
    if body.previous_response_id and body.conversation:
        raise refuse(
            "previous_response_id",
            "Give 'previous_response_id' or 'conversation', not both: each is a history.",
        )
    check_metadata(body.metadata)


def refuse_given(body: BaseModel, *names: str) -> None:
    """Raise for the first of ``names`` that is given."""
    for name in names:
        if getattr(body, name) is not None:
            raise unsupported(name, f"'{name}'")


def check_tier(tier: str | None) -> None:
    if tier is not None and tier not in TIERS:
        raise unsupported("service_tier", f"the service tier {tier!r}", "Leave it out.")


def check_metadata(metadata: dict[str, str] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > 16:
        raise refuse("metadata", "'metadata' may have at most 16 entries.")
    for name, value in metadata.items():
        if len(name) > 64 or len(value) > 512:
            raise refuse("metadata", f"'metadata' {name[:64]!r}: at most 64 and 512 characters.")


def client_tools(given: list[JsonObject] | None) -> tuple[ClientTool, ...]:
    found = []
    for number, tool in enumerate(given or ()):
        place = f"tools[{number}]"
        kind = tool.get("type")
        if kind != "function":
            raise unsupported(f"{place}.type", f"a tool of type {kind!r}", ON_SERVER)
        refuse_unknown(place, tool, "name", "description", "parameters", "strict")
        parameters = tool.get("parameters")
        if parameters is not None:
            if not isinstance(parameters, dict):
                raise refuse(f"{place}.parameters", "The parameters must be a JSON Schema.")
            check_schema(f"{place}.parameters", parameters)
        try:
            found.append(
                ClientTool(
                    name=tool.get("name", ""),
                    description=tool.get("description") or "",
                    strict=bool(tool.get("strict")),
                    **({} if parameters is None else {"parameters": parameters}),
                )
            )
        except ValueError as error:
            raise refuse(
                f"{place}.name", "A function needs a 'name' of letters, digits, '_' and '-'."
            ) from error
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        raise refuse("tools", "Two functions have the same name.")
    return tuple(found)


def check_schema(place: str, schema: JsonObject) -> None:
    fault = schema_fault(schema)
    if fault is not None:
        raise refuse(place, f"'{place}' is not a valid JSON Schema: {fault}")


def chosen(choice: Any, tools: tuple[ClientTool, ...]) -> tuple[str | None, tuple[ClientTool, ...]]:
    """The tool choice in the agent's words, and the tools it leaves."""
    if choice is None or choice == "auto":
        return None, tools
    if isinstance(choice, str):
        if choice in ("none", "required"):
            return choice, tools
        raise refuse("tool_choice", f"There is no tool choice {choice!r}.")
    names = [tool.name for tool in tools]
    if choice.get("type") == "function" and choice.get("name") in names:
        return str(choice["name"]), tools
    if choice.get("type") == "allowed_tools":
        wanted = choice.get("tools")
        if not (isinstance(wanted, list) and all(isinstance(tool, dict) for tool in wanted)):
            raise refuse("tool_choice", "'allowed_tools' needs 'tools', a list of functions.")
        allowed = [tool.get("name") for tool in wanted]
        for name in allowed:
            if name not in names:
                raise refuse("tool_choice", f"The allowed tool {name!r} is not among 'tools'.")
        mode = "required" if choice.get("mode") == "required" else None
        return mode, tuple(tool for tool in tools if tool.name in allowed)
    raise refuse("tool_choice", "'tool_choice' must name a function that is among 'tools'.")


def output_format(place: str, given: JsonObject | None) -> dict[str, Any]:
    """The options that say which form the answer has."""
    kind = (given or {}).get("type", "text")
    if given is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"output_schema": {"type": "object"}, "output_name": "json"}
    if kind != "json_schema":
        raise unsupported(place, f"an answer of form {kind!r}")
    schema = given.get("schema")
    if not isinstance(schema, dict):
        raise refuse(f"{place}.schema", "A JSON Schema is missing.")
    check_schema(f"{place}.schema", schema)
    refuse_unknown(place, given, "name", "description", "schema", "strict")
    if given.get("description"):
        schema = {"description": given["description"], **schema}
    return {
        "output_schema": schema,
        "output_name": str(given.get("name") or "answer"),
        "output_strict": bool(given.get("strict")),
    }


def options(body: CreateResponse, api: str, **more: Any) -> RunOptions:
    """What ``body`` changes of its agent, whose model is asked by ``api``, which has no words for
    some of it. Raises ``InvalidRequest``."""
    for name in UNSAID[api]:
        if getattr(body, name) not in (None, 0, "disabled"):
            other = next(one for one in UNSAID if one != api)
            hint = f"Models are asked by it where AGENT_SERVER_OPENAI_API={other}."
            raise unsupported(name, f"{name!r}", hint)
    tools = client_tools(body.tools)
    choice, left = chosen(body.tool_choice, tools)
    reasoning = body.reasoning.model_dump(exclude_none=True) if body.reasoning else None
    return RunOptions(
        instructions=body.instructions,
        tools=left,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        reasoning=reasoning,
        verbosity=body.text.verbosity if body.text else None,
        truncation=body.truncation if body.truncation == "auto" else None,
        repair=not body.stream,
        **output_format("text.format", body.text.format if body.text else None),
        **more,
    )


def echo(body: CreateResponse, conversation: str | None) -> JsonObject:
    """What the response repeats of its request; every key that OpenAI's clients look for."""
    text = body.text
    reasoning = body.reasoning or None
    shown: JsonObject = {
        "background": bool(body.background),
        "frequency_penalty": body.frequency_penalty or 0.0,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": _format(text.format if text else None),
            **({"verbosity": text.verbosity} if text and text.verbosity else {}),
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
    }
    if body.user is not None:
        shown["user"] = body.user
    if conversation is not None:
        shown["conversation"] = {"id": conversation}
    return shown


def _format(given: JsonObject | None) -> JsonObject:
    if given is None:
        return {"type": "text"}
    if given.get("type") != "json_schema":
        return {"type": given.get("type", "text")}
    return {
        "type": "json_schema",
        "name": given.get("name") or "answer",
        **({"description": given["description"]} if given.get("description") else {}),
        "schema": given.get("schema"),
        "strict": bool(given.get("strict")),
    }


def _tool(tool: JsonObject) -> JsonObject:
    return {
        "type": "function",
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": bool(tool.get("strict")),
    }


def run_request(
    target: Target,
    asked: list[JsonObject],
    before: list[JsonObject],
    options: RunOptions,
    *,
    store: bool,
    session_id: str | None = None,
    max_tool_calls: int | None = None,
    subject: str | None = None,
    metadata: dict[str, str] | None = None,
) -> RunRequest:
    """The run that answers. ``before`` is the conversation so far, for who cannot be given it as
    such. Raises ``InvalidRequest`` for what a goal or a workflow cannot honour."""
    common: dict[str, Any] = {
        "approach": target.approach,
        "budget": Budget(max_tool_calls=max_tool_calls) if max_tool_calls else None,
        "subject": subject,
        "metadata": metadata or {},
        "store": store,
        "options": options,
    }
    try:
        return _run_request(target, asked, before, options, store, session_id, common)
    except ValidationError as error:
        raise refuse("input", f"The run is refused: {error.errors()[0]['msg']}.") from error


def _run_request(
    target: Target,
    asked: list[JsonObject],
    before: list[JsonObject],
    options: RunOptions,
    store: bool,
    session_id: str | None,
    common: dict[str, Any],
) -> RunRequest:
    if target.kind == "agent":
        return RunRequest(agent=target.name, input=asked, session_id=session_id, **common)
    if not store:
        raise refuse("store", f"A {target.kind} is always stored.", "Leave out 'store'.")
    if options.tools:
        raise refuse("tools", f"A {target.kind} cannot use the caller's tools; an agent can.")
    for name in ("temperature", "top_p", "max_output_tokens", "tool_choice", "reasoning"):
        if getattr(options, name) is not None:
            raise refuse(name, f"'{name}' is an agent's; a {target.kind} has several.")
    for place, part in media(asked, "input"):
        raise unsupported(place, f"{part['type']!r} for a {target.kind}", "An agent can read it.")
    text = last_text(asked)
    if not text:
        raise refuse("input", f"A {target.kind} needs a text from the user.")
    if target.kind == "goal":
        said = [*before, *asked][:-1]
        return RunRequest(
            goal=text,
            role=options.instructions,
            expected_output=options.output_schema,
            context={"conversation": said} if said else {},
            session_id=session_id,
            **common,
        )
    if session_id is not None or before or options.instructions or options.output_schema:
        raise InvalidRequest(
            "A workflow takes one input alone: no history, instructions or form of the answer.",
            hint="Put them into the workflow, or send what it needs as its input.",
        )
    return RunRequest(workflow=target.name, variables=_variables(text), **common)


def _variables(text: str) -> JsonObject:
    """A JSON object as it is; any other text as the input ``input``."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"input": text}
