"""What our two OpenAI-compatible models share: the doors, the span, the settings' small print.

Leans on ``wire`` for the request and on the SDK's ``Model``. The SDK's own models give the
request to the ``openai`` client, which walks it through its type annotations; these build the
same body as plain values. Refuses to know either API's fields.
"""

import abc
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from agents import (
    Handoff,
    Model,
    ModelResponse,
    ModelSettings,
    ModelTracing,
    Tool,
    UserError,
    generation_span,
)
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.retry import ModelRetryAdvice, ModelRetryAdviceRequest
from openai.types.responses.response_prompt_param import ResponsePromptParam

from agent_server.domain.errors import ModelError
from agent_server.inference.models import (
    ModelRequest,
    OnText,
    as_model_error,
    ended_badly,
    status_error,
)
from agent_server.inference.wire import Reply, Wire


class OpenAIModel(Model):
    """One model of one provider. Cheap to make; connections belong to the ``Wire``."""

    path: str
    """The API's path below the base URL."""

    def __init__(self, model: str, wire: Wire) -> None:
        self.model = model
        self.wire = wire

    @abc.abstractmethod
    def body(self, request: ModelRequest, *, stream: bool) -> dict[str, Any]:
        """The request's JSON body, without ``extra_body``."""

    @abc.abstractmethod
    def answer(self, value: dict[str, Any], request: ModelRequest) -> ModelResponse:
        """The finished answer from the JSON of a call that did not stream."""

    @abc.abstractmethod
    async def collect(
        self, reply: Reply, request: ModelRequest, on_text: OnText
    ) -> tuple[ModelResponse, str]:
        """Read a stream to its end; the answer, and what of its text was not handed over."""

    @abc.abstractmethod
    def events(self, reply: Reply, request: ModelRequest) -> AsyncIterator[TResponseStreamEvent]:
        """A stream's events as the SDK's objects."""

    async def respond(self, request: ModelRequest, on_text: OnText | None) -> ModelResponse:
        """See ``FastModel.respond``."""
        body = self.body(request, stream=on_text is not None)
        tracing = request.tracing
        with generation_span(model=self.model, disabled=tracing.is_disabled()) as span:
            reply = await self.wire.post(self.path, body, request.model_settings)
            try:
                if on_text is not None and reply.streams:
                    response, rest = await self.collect(reply, request, on_text)
                    if rest:
                        on_text(rest)
                else:
                    response = self.answer(await reply.json(), request)
                    if on_text is not None and (text := text_of(response)):
                        on_text(text)
            finally:
                await reply.aclose()
            response.request_id = reply.request_id
            if not tracing.is_disabled():
                usage = response.usage
                span.span_data.usage = {
                    "input_tokens": usage.input_tokens,
                    "output_tokens": usage.output_tokens,
                }
                if tracing.include_data():
                    span.span_data.input = body.get("input") or body.get("messages")
                    span.span_data.output = [item.model_dump() for item in response.output]
            return response

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
            system_instructions,
            input,
            model_settings,
            tools,
            output_schema,
            handoffs,
            tracing,
            previous_response_id,
            conversation_id,
            prompt,
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
            system_instructions,
            input,
            model_settings,
            tools,
            output_schema,
            handoffs,
            tracing,
            previous_response_id,
            conversation_id,
            prompt,
        )
        body = self.body(request, stream=True)
        with generation_span(model=self.model, disabled=tracing.is_disabled()):
            reply = await self.wire.post(self.path, body, model_settings)
            try:
                events: Any = self.events(reply, request)
                async with aclosing(events):
                    async for event in events:
                        yield event
            finally:
                await reply.aclose()

    def get_retry_advice(self, request: ModelRetryAdviceRequest) -> ModelRetryAdvice | None:
        error = as_model_error(request.error)
        if error is None:
            return None
        return ModelRetryAdvice(suggested=error.retryable, retry_after=error.retry_after_s)

    def _supports_default_prompt_cache_key(self) -> bool:
        return self.wire.official


def with_extra_args(body: dict[str, Any], settings: ModelSettings) -> dict[str, Any]:
    """``body`` and the settings' ``extra_args``, which may not say a field twice."""
    extra = settings.extra_args
    if not extra:
        return body
    twice = sorted(name for name in extra if name in body)
    if twice:
        raise UserError(
            f"The model settings give {', '.join(map(repr, twice))} twice: as a setting and in "
            "`extra_args`. Keep one of them."
        )
    return {**body, **extra}


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def text_of(response: ModelResponse) -> str:
    """All text of an answer."""
    parts = []
    for item in response.output:
        if item.type == "message":
            parts += [part.text for part in item.content if part.type == "output_text"]
    return "".join(parts)


def error_in(value: Any) -> ModelError | None:
    """The error that a server put into an answer with status 200, if it did."""
    error = value.get("error") if isinstance(value, Mapping) else None
    if not error:
        return None
    if isinstance(error, Mapping):
        code = error.get("code")
        if isinstance(code, int) and 400 <= code < 600:
            return status_error(code, value, {})
        name = code or error.get("type")
        return ended_badly(
            "failed", str(error.get("message")), None, None if name is None else str(name)
        )
    return ended_badly("failed", str(error), None)
