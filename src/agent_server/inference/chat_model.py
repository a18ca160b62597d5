"""A model behind the Chat Completions API (``POST /chat/completions``), as the SDK's ``Model``.

Leans on the SDK's converters in both directions, so that history, reasoning, refusals and tool
calls survive as they do with the SDK's own model. Refuses to know transport and retries.
"""

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

from agents import ModelResponse, Usage
from agents.items import TResponseStreamEvent
from agents.models.chatcmpl_converter import Converter
from agents.models.chatcmpl_helpers import ChatCmplHelpers
from agents.models.chatcmpl_stream_handler import ChatCmplStreamHandler, StreamingState
from agents.models.fake_id import FAKE_RESPONSES_ID
from openai import Omit
from openai._models import construct_type
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from openai.types.responses import Response, ResponseOutputMessage, ResponseOutputText
from pydantic import ValidationError

from agent_server.domain.errors import ModelError, ModelMalformed
from agent_server.inference.models import ModelRequest, OnText, cut_off, make_usage
from agent_server.inference.openai_model import OpenAIModel, error_in, given, with_extra_args
from agent_server.inference.wire import Reply

logger = logging.getLogger(__name__)

_FILTERED = "Response withheld by the provider's content filter."


class ChatModel(OpenAIModel):
    """A model that speaks Chat Completions.

    Streams ask for the usage unless ``include_usage`` is False: without it nothing is counted.
    """

    path = "/chat/completions"
    _warned = False

    def body(self, request: ModelRequest, *, stream: bool) -> dict[str, Any]:
        settings = request.model_settings
        self._warn_of_what_is_ignored(request)
        messages: list[Any] = list(
            Converter.items_to_messages(
                request.input, model=self.model, base_url=self.wire.base_url
            )
        )
        if request.system_instructions:
            messages.insert(0, {"content": request.system_instructions, "role": "system"})
        tools: list[Any] = [Converter.tool_to_openai(tool) for tool in request.tools]
        tools += [Converter.convert_handoff_tool(handoff) for handoff in request.handoffs]
        store = settings.store
        if store is None and self.wire.official:
            store = True
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            **given(
                temperature=settings.temperature,
                top_p=settings.top_p,
                frequency_penalty=settings.frequency_penalty,
                presence_penalty=settings.presence_penalty,
                max_tokens=settings.max_tokens,
                store=store,
                reasoning_effort=settings.reasoning.effort if settings.reasoning else None,
                verbosity=settings.verbosity,
                top_logprobs=settings.top_logprobs,
                prompt_cache_retention=settings.prompt_cache_retention,
                prompt_cache_options=settings.prompt_cache_options,
                metadata=settings.metadata,
            ),
        }
        if tools:
            body["tools"] = tools
            if settings.parallel_tool_calls is not None:
                body["parallel_tool_calls"] = settings.parallel_tool_calls
        choice = Converter.convert_tool_choice(settings.tool_choice)
        if not isinstance(choice, Omit):
            body["tool_choice"] = choice
        response_format = Converter.convert_response_format(request.output_schema)
        if not isinstance(response_format, Omit):
            body["response_format"] = response_format
        if settings.top_logprobs is not None and "logprobs" not in (settings.extra_args or {}):
            body["logprobs"] = True
        if stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": settings.include_usage is not False}
        return with_extra_args(body, settings)

    def _warn_of_what_is_ignored(self, request: ModelRequest) -> None:
        if self._warned:
            return
        ignored = [
            name
            for name in ("previous_response_id", "conversation_id", "prompt")
            if getattr(request, name) is not None
        ]
        reasoning = request.model_settings.reasoning
        ignored += [
            f"reasoning.{name}"
            for name in ("mode", "context")
            if getattr(reasoning, name, None) is not None
        ]
        if ignored:
            self._warned = True
            logger.warning(
                "Chat Completions has no %s: ignored for model %r. AGENT_SERVER_OPENAI_API="
                "responses speaks the API that has.",
                ", ".join(ignored),
                self.model,
            )

    def answer(self, value: dict[str, Any], request: ModelRequest) -> ModelResponse:
        choices = value.get("choices")
        if not choices:
            raise error_in(value) or ModelMalformed(
                "The model's answer has no 'choices'.", retryable=True
            )
        choice = choices[0]
        message = choice.get("message")
        if not isinstance(message, dict):
            raise ModelMalformed("The model's answer has no 'message'.", retryable=True)
        return self._finished(
            message,
            choice.get("finish_reason"),
            (choice.get("logprobs") or {}).get("content"),
            value.get("usage"),
            value.get("id"),
            request,
        )

    def _finished(
        self,
        message: dict[str, Any],
        finish_reason: str | None,
        logprobs: list[Any] | None,
        usage: Any,
        response_id: str | None,
        request: ModelRequest,
    ) -> ModelResponse:
        if not (message.get("content") or message.get("refusal") or message.get("tool_calls")):
            if finish_reason == "content_filter":
                message = {**message, "refusal": _FILTERED}
            elif finish_reason == "length":
                raise ModelError(
                    "The model used up its tokens before it said anything.",
                    hint="Raise the model settings' `max_tokens`, or lower the reasoning effort.",
                )
        message.setdefault("role", "assistant")
        try:
            typed = ChatCompletionMessage.model_validate(message)
        except ValidationError:
            typed = cast(
                ChatCompletionMessage, construct_type(type_=ChatCompletionMessage, value=message)
            )
        provider_data: dict[str, Any] = {"model": self.model}
        if response_id is not None:
            provider_data["response_id"] = response_id
        output = Converter.message_to_output_items(typed, provider_data=provider_data)
        if logprobs:
            found = ChatCmplHelpers.convert_logprobs_for_output_text(
                [ChatCompletionTokenLogprob.model_validate(entry) for entry in logprobs]
            )
            parts = [
                part
                for item in output
                if isinstance(item, ResponseOutputMessage)
                for part in item.content
                if isinstance(part, ResponseOutputText)
            ]
            if parts and found:
                parts[0].logprobs = found
        return ModelResponse(
            output=output,
            usage=_usage(usage),
            response_id=None,
            raw_usage=usage if request.model_settings.preserve_raw_usage is True else None,
        )

    async def collect(
        self, reply: Reply, request: ModelRequest, on_text: OnText
    ) -> tuple[ModelResponse, str]:
        gathered = _Gathered()
        async for batch in reply.batches():
            for chunk in batch:
                text = gathered.take(chunk)
                if text:
                    on_text(text)
        if gathered.finish_reason is None and not reply.done:
            raise cut_off()
        response = self._finished(
            gathered.message(),
            gathered.finish_reason,
            gathered.logprobs,
            gathered.usage,
            gathered.response_id,
            request,
        )
        return response, ""

    async def events(
        self, reply: Reply, request: ModelRequest
    ) -> AsyncIterator[TResponseStreamEvent]:
        settings = request.model_settings
        response = Response(
            id=FAKE_RESPONSES_ID,
            created_at=time.time(),
            model=self.model,
            object="response",
            output=[],
            tool_choice="auto",
            top_p=settings.top_p,
            temperature=settings.temperature,
            tools=[],
            parallel_tool_calls=bool(settings.parallel_tool_calls),
            reasoning=settings.reasoning,
        )
        response._request_id = reply.request_id
        stream: Any = _chunks(reply)
        async for event in ChatCmplStreamHandler.handle_stream(
            response,
            stream,
            model=self.model,
            preserve_raw_usage=settings.preserve_raw_usage is True,
            raise_on_length_truncation=True,
        ):
            yield event


async def _chunks(reply: Reply) -> AsyncIterator[ChatCompletionChunk]:
    finished = False
    async for batch in reply.batches():
        for chunk in batch:
            error = error_in(chunk)
            if error is not None:
                raise error
            finished = finished or any(
                choice.get("finish_reason") for choice in chunk.get("choices") or ()
            )
            yield cast(ChatCompletionChunk, construct_type(type_=ChatCompletionChunk, value=chunk))
    if not finished and not reply.done:
        raise cut_off()


@dataclass
class _Gathered:
    """A streamed message, put together from its deltas."""

    content: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    reasoning_content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    thinking: StreamingState | None = None
    annotations: list[Any] = field(default_factory=list)
    calls: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Any = None
    response_id: str | None = None

    def take(self, chunk: Any) -> str | None:
        """Add one chunk; the text in it. Raises ``ModelError`` for an error chunk."""
        if not isinstance(chunk, dict):
            raise ModelMalformed("A chunk of the model's answer is not an object.", retryable=True)
        if chunk.get("usage") is not None:
            self.usage = chunk["usage"]
        choices = chunk.get("choices")
        if not choices:
            error = error_in(chunk)
            if error is not None:
                raise error
            return None
        choice = choices[0]
        if choice.get("index", 0) != 0:
            return None
        if choice.get("finish_reason") is not None:
            self.finish_reason = choice["finish_reason"]
        if self.response_id is None:
            self.response_id = chunk.get("id")
        delta = choice.get("delta")
        if not delta:
            return None
        if choice.get("logprobs"):
            self.logprobs += choice["logprobs"].get("content") or ()
        text: str | None = delta.get("content")
        if text:
            self.content.append(text)
        if len(delta) > 1 or not text:
            self._take_the_rest(delta)
        return text

    def _take_the_rest(self, delta: dict[str, Any]) -> None:
        for name in ("refusal", "reasoning_content", "reasoning"):
            value = delta.get(name)
            if isinstance(value, str) and value:
                getattr(self, name).append(value)
        for block in delta.get("thinking_blocks") or ():
            self.thinking = self.thinking or StreamingState()
            self.thinking.accumulate_thinking_block(block)
        self.annotations += delta.get("annotations") or ()
        for call in delta.get("tool_calls") or ():
            self._take_call(call)

    def _take_call(self, call: dict[str, Any]) -> None:
        index = call.get("index") or 0
        turn = max((t for i, t in self.calls if i == index), default=0)
        known = self.calls.get((index, turn))
        call_id = call.get("id")
        if known is not None and call_id and known["id"] and known["id"] != call_id:
            # Some servers number every parallel call 0: another id is another call.
            turn, known = turn + 1, None
        if known is None:
            known = {
                "id": "",
                "type": call.get("type") or "function",
                "function": {"name": "", "arguments": ""},
            }
            self.calls[(index, turn)] = known
        if call_id:
            known["id"] = call_id
        function = call.get("function") or {}
        if function.get("name"):
            known["function"]["name"] = function["name"]
        if function.get("arguments"):
            known["function"]["arguments"] += function["arguments"]
        if call.get("extra_content"):
            known["extra_content"] = call["extra_content"]

    def message(self) -> dict[str, Any]:
        """The message as a call without streaming would have answered it."""
        return {
            "role": "assistant",
            "content": "".join(self.content) or None,
            **given(
                refusal="".join(self.refusal) or None,
                reasoning_content="".join(self.reasoning_content) or None,
                reasoning="".join(self.reasoning) or None,
                thinking_blocks=self.thinking.thinking_blocks if self.thinking else None,
                annotations=self.annotations or None,
                tool_calls=list(self.calls.values()) or None,
            ),
        }


def _usage(usage: Any) -> Usage:
    if not isinstance(usage, dict):
        return Usage(requests=1)
    details = usage.get("prompt_tokens_details") or {}
    out = usage.get("completion_tokens_details") or {}
    return make_usage(
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        usage.get("total_tokens"),
        cached=details.get("cached_tokens"),
        cache_write=details.get("cache_write_tokens"),
        reasoning=out.get("reasoning_tokens"),
    )
