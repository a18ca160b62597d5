"""A model behind the Responses API (``POST /responses``), as the SDK's ``Model``.

Leans on the SDK's converters for tools, tool choice and output format, so that the body is the
one that the SDK's own model sends (a test compares them). Refuses to know transport and retries.
"""

from collections.abc import AsyncIterator
from typing import Any, cast

from agents import ModelResponse, Usage
from agents.items import TResponseOutputItem, TResponseStreamEvent
from agents.models.fake_id import FAKE_RESPONSES_ID
from agents.models.openai_responses import Converter
from openai import Omit
from openai._models import construct_type
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputItem,
    ResponseOutputMessage,
    ResponseReasoningItem,
    ResponseStreamEvent,
)
from pydantic import BaseModel, ValidationError

from agent_server.domain.errors import ModelError, ModelMalformed
from agent_server.inference.models import (
    ModelRequest,
    OnText,
    cut_off,
    ended_badly,
    make_usage,
)
from agent_server.inference.openai_model import (
    OpenAIModel,
    error_in,
    given,
    text_of,
    with_extra_args,
)
from agent_server.inference.wire import Reply

_COMMON: dict[str, type[BaseModel]] = {
    "message": ResponseOutputMessage,
    "function_call": ResponseFunctionToolCall,
    "reasoning": ResponseReasoningItem,
}

_COUNTED = frozenset(
    "model input instructions tools tool_choice text reasoning truncation parallel_tool_calls "
    "previous_response_id conversation".split()
)
"""What a call says that its input's tokens are counted of."""


class ResponsesModel(OpenAIModel):
    """A model that speaks the Responses API."""

    path = "/responses"

    def body(self, request: ModelRequest, *, stream: bool) -> dict[str, Any]:
        settings = request.model_settings
        prompt = request.prompt
        tool_model = Converter.resolve_computer_tool_model(
            request_model=self.model, tools=request.tools
        )
        tool_choice = Converter.convert_tool_choice(
            settings.tool_choice,
            tools=request.tools,
            handoffs=request.handoffs,
            model=tool_model,
        )
        converted = Converter.convert_tools(
            request.tools,
            request.handoffs,
            allow_opaque_tool_search_surface=prompt is not None,
            model=tool_model,
            tool_choice=settings.tool_choice,
        )
        without_tools = prompt is not None and not converted.tools
        include: set[str] = {*converted.includes, *(settings.response_include or ())}
        if settings.top_logprobs is not None:
            include.add("message.output_text.logprobs")
        body: dict[str, Any] = {
            "model": self.model,
            "input": _input(request.input),
            "include": sorted(include),
            **given(
                previous_response_id=request.previous_response_id,
                conversation=request.conversation_id,
                instructions=request.system_instructions,
                prompt=prompt,
                temperature=settings.temperature,
                top_p=settings.top_p,
                truncation=settings.truncation,
                max_output_tokens=settings.max_tokens,
                store=settings.store,
                prompt_cache_retention=settings.prompt_cache_retention,
                prompt_cache_options=settings.prompt_cache_options,
                reasoning=settings.reasoning,
                metadata=settings.metadata,
                context_management=settings.context_management,
            ),
        }
        if not without_tools:
            body["tools"] = converted.tools
        if not isinstance(tool_choice, Omit) and not (
            without_tools and isinstance(tool_choice, dict)
        ):
            body["tool_choice"] = tool_choice
        if settings.parallel_tool_calls is not None and (prompt is not None or converted.tools):
            body["parallel_tool_calls"] = settings.parallel_tool_calls
        text = Converter.get_response_format(request.output_schema)
        if not isinstance(text, Omit) or settings.verbosity is not None:
            body["text"] = {
                **({} if isinstance(text, Omit) else text),
                **given(verbosity=settings.verbosity),
            }
        if stream:
            body["stream"] = True
        body = with_extra_args(body, settings)
        if settings.top_logprobs is not None:
            body["top_logprobs"] = settings.top_logprobs
        return body

    async def input_tokens(self, request: ModelRequest) -> int | None:
        """See ``counting.Counts``."""
        body = {k: v for k, v in self.body(request, stream=False).items() if k in _COUNTED}
        reply = await self.wire.post(self.path + "/input_tokens", body, request.model_settings)
        try:
            found = (await reply.json()).get("input_tokens")
        finally:
            await reply.aclose()
        return found if isinstance(found, int) else None

    def answer(self, value: dict[str, Any], request: ModelRequest) -> ModelResponse:
        failed = _failure(value) or (None if "output" in value else error_in(value))
        if failed is not None:
            raise failed
        output = value.get("output")
        if not isinstance(output, list):
            raise ModelMalformed("The model's answer has no 'output'.", retryable=True)
        usage = value.get("usage")
        return ModelResponse(
            output=output_items(output),
            usage=_usage(usage),
            response_id=value.get("id"),
            raw_usage=usage if request.model_settings.preserve_raw_usage is True else None,
        )

    async def collect(
        self, reply: Reply, request: ModelRequest, on_text: OnText
    ) -> tuple[ModelResponse, str]:
        finished: dict[str, Any] | None = None
        items: list[Any] = []
        told = False
        async for batch in reply.batches():
            for event in batch:
                kind = event.get("type") if isinstance(event, dict) else None
                if kind == "response.output_text.delta":
                    told = True
                    on_text(event["delta"])
                elif kind == "response.output_item.done":
                    items.append(event.get("item"))
                elif kind == "response.completed":
                    finished = event["response"]
                elif kind in _ENDS or (kind is None and error_in(event) is not None):
                    raise _bad_end(event)
        if finished is None:
            raise cut_off()
        if items and not finished.get("output"):  # some gateways leave it out here
            finished = {**finished, "output": items}
        response = self.answer(finished, request)
        return response, "" if told else text_of(response)

    async def events(
        self, reply: Reply, request: ModelRequest
    ) -> AsyncIterator[TResponseStreamEvent]:
        ended = False
        async for batch in reply.batches():
            for event in batch:
                kind = event.get("type") if isinstance(event, dict) else None
                if kind is None:
                    raise error_in(event) or ModelMalformed(
                        "An event of the model's answer has no 'type'.", retryable=True
                    )
                made = cast(
                    TResponseStreamEvent,
                    construct_type(type_=ResponseStreamEvent, value=event),
                )
                response = getattr(made, "response", None)
                if response is not None:
                    response._request_id = reply.request_id
                ended = ended or kind == "response.completed"
                yield made
                if kind in _ENDS:
                    raise _bad_end(event)
        if not ended:
            raise cut_off()


_ENDS = frozenset({"response.failed", "response.incomplete", "response.error", "error"})


def _input(given_input: Any) -> list[Any]:
    """The input items, without what only other providers or the SDK itself put into them."""
    if isinstance(given_input, str):
        return [{"content": given_input, "role": "user"}]
    items = list(given_input)
    if not any(
        isinstance(item, dict)
        and (item.get("provider_data") or item.get("id") == FAKE_RESPONSES_ID)
        for item in items
    ):
        return items
    clean: list[Any] = []
    for item in items:
        if isinstance(item, dict):
            if item.get("type") == "reasoning" and item.get("provider_data"):
                continue
            fake = item.get("id") == FAKE_RESPONSES_ID
            if fake or "provider_data" in item:
                item = {
                    name: value
                    for name, value in item.items()
                    if name != "provider_data" and not (fake and name == "id")
                }
        clean.append(item)
    return clean


def output_items(output: list[Any]) -> list[TResponseOutputItem]:
    """The SDK's output items. What does not match its type exactly is built leniently, as the
    ``openai`` client does, since compatible servers leave fields out."""
    items: list[Any] = []
    for raw in output:
        known = _COMMON.get(raw.get("type", "")) if isinstance(raw, dict) else None
        if known is not None:
            try:
                items.append(known.model_validate(raw))
                continue
            except ValidationError:
                pass
        items.append(construct_type(type_=ResponseOutputItem, value=raw))
    return items


def _usage(usage: Any) -> Usage:
    if not isinstance(usage, dict):
        return Usage(requests=1)
    details = usage.get("input_tokens_details") or {}
    out = usage.get("output_tokens_details") or {}
    return make_usage(
        usage.get("input_tokens"),
        usage.get("output_tokens"),
        usage.get("total_tokens"),
        cached=details.get("cached_tokens"),
        cache_write=details.get("cache_write_tokens"),
        reasoning=out.get("reasoning_tokens"),
    )


def _failure(response: dict[str, Any]) -> ModelError | None:
    status = response.get("status")
    if status not in ("failed", "incomplete"):
        return None
    error = response.get("error") or {}
    details = response.get("incomplete_details") or {}
    return ended_badly(status, error.get("message"), details.get("reason"), error.get("code"))


def _bad_end(event: dict[str, Any]) -> ModelError:
    response = event.get("response")
    if isinstance(response, dict):
        status = "incomplete" if event.get("type") == "response.incomplete" else "failed"
        found = _failure({**response, "status": status})
        assert found is not None
        return found
    return error_in(event) or ended_badly("failed", event.get("message"), None, event.get("code"))
