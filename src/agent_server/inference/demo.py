"""The demo model: an ordinary ``Model`` of the SDK that needs no key and no network.

Leans on ``demo_reply`` for what it says. Deterministic, so that a run replays and a test can
compare; every free text it writes is labelled. Refuses to know the server: it sees what any
model sees, and nothing in the server knows it.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from agents import Handoff, Model, ModelResponse, ModelSettings, ModelTracing, Tool
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.tool import FunctionTool
from openai._models import construct_type
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.response_prompt_param import ResponsePromptParam

from agent_server.inference.demo_reply import Offered, Reply, identity, reply, text_of
from agent_server.inference.models import ModelRequest, OnText, make_usage
from agent_server.inference.responses_model import output_items

NAME = "demo"
_PIECES = re.compile(r"\S+\s*|\s+")
_WORDS = re.compile(r"\w+|[^\w\s]")


class DemoModel(Model):
    """Plans, calls tools and answers, the same way every time. Counts words as tokens."""

    async def respond(self, request: ModelRequest, on_text: OnText | None) -> ModelResponse:
        """See ``FastModel.respond``."""
        items, said = _think(request)
        if on_text is not None:
            for piece in _PIECES.findall(said.text):
                on_text(piece)
                await asyncio.sleep(0)
        return _response(request, items, said)

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        prompt: ResponsePromptParam | None = None,
    ) -> ModelResponse:
        request = ModelRequest(
            system_instructions, input, model_settings, tools, output_schema, handoffs
        )
        return await self.respond(request, None)

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        prompt: ResponsePromptParam | None = None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        request = ModelRequest(
            system_instructions, input, model_settings, tools, output_schema, handoffs
        )
        items, said = _think(request)
        response = _response(request, items, said)
        for number, event in enumerate(_events(response, identity(items))):
            made = construct_type(
                type_=ResponseStreamEvent, value={**event, "sequence_number": number}
            )
            yield cast(TResponseStreamEvent, made)
            await asyncio.sleep(0)


def _think(request: ModelRequest) -> tuple[list[dict[str, Any]], Reply]:
    given: Any = request.input
    items: list[dict[str, Any]] = (
        [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    )
    offered = [
        Offered(tool.name, tool.description, tool.params_json_schema)
        for tool in request.tools
        if isinstance(tool, FunctionTool)
    ]
    offered += [
        Offered(handoff.tool_name, handoff.tool_description, handoff.input_json_schema)
        for handoff in request.handoffs
    ]
    schema = request.output_schema
    choice = request.model_settings.tool_choice
    return items, reply(
        request.system_instructions,
        items,
        offered,
        None if schema is None or schema.is_plain_text() else schema.json_schema(),
        choice if isinstance(choice, str) else None,
    )


def _response(request: ModelRequest, items: list[dict[str, Any]], said: Reply) -> ModelResponse:
    heard = request.system_instructions or ""
    heard += " ".join(
        text_of(item.get("content") or item.get("output") or item.get("arguments"))
        for item in items
    )
    spoken = said.text + " ".join(call.name + call.arguments for call in said.calls)
    return ModelResponse(
        output=output_items(output_of(said, identity(items))),
        usage=make_usage(len(_WORDS.findall(heard)), len(_WORDS.findall(spoken))),
        response_id=None,
    )


def output_of(said: Reply, point: str) -> list[dict[str, Any]]:
    """The output items of a Responses answer; ``point`` makes their ids."""
    if said.calls:
        return [
            {
                "type": "function_call",
                "id": f"fc_{call.call_id.removeprefix('call_')}",
                "call_id": call.call_id,
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
            for call in said.calls
        ]
    part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
    return [
        {
            "type": "message",
            "id": f"msg_{point}",
            "role": "assistant",
            "status": "completed",
            "content": [part],
        }
    ]


def _events(response: ModelResponse, point: str) -> Iterator[dict[str, Any]]:
    """The events by which the Responses API would have streamed ``response``."""
    usage = response.usage
    output = [item.model_dump(mode="json", exclude_unset=True) for item in response.output]
    head: dict[str, Any] = {
        "id": f"resp_{point}",
        "object": "response",
        "created_at": 0,
        "model": NAME,
        "output": [],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "status": "in_progress",
    }
    yield {"type": "response.created", "response": head}
    for index, item in enumerate(output):
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            yield from _message_events(item, place, index)
        else:
            empty = {**item, "arguments": "", "status": "in_progress"}
            yield {"type": "response.output_item.added", "output_index": index, "item": empty}
            kind = "response.function_call_arguments"
            yield {"type": f"{kind}.delta", **place, "delta": item["arguments"]}
            yield {
                "type": f"{kind}.done",
                **place,
                "name": item["name"],
                "arguments": item["arguments"],
            }
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    done = {
        **head,
        "status": "completed",
        "output": output,
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }
    yield {"type": "response.completed", "response": done}


def _message_events(
    item: dict[str, Any], place: dict[str, Any], index: int
) -> Iterator[dict[str, Any]]:
    part = item["content"][0]
    place = {**place, "content_index": 0}
    empty = {**item, "content": [], "status": "in_progress"}
    yield {"type": "response.output_item.added", "output_index": index, "item": empty}
    yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
    for piece in _PIECES.findall(part["text"]):
        yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": part}
