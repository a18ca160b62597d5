"""How the server asks a model: one request object, one fast door, one error mapping, one retry.

Leans on the SDK's ``Model`` and on the error tree. Refuses to know which provider answers,
how a request travels, and what the ledger does with the answer.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar, runtime_checkable

import httpx2
import openai
from agents import Handoff, Model, ModelResponse, ModelSettings, ModelTracing, Tool, Usage
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseInputItem
from openai.types.responses import Response
from openai.types.responses.response_prompt_param import ResponsePromptParam
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    ModelError,
    ModelIncomplete,
    ModelMalformed,
    ModelRateLimited,
    ModelTimeout,
    ModelUnauthorized,
)
from agent_server.domain.secrets import masked

OnText = Callable[[str], None]
"""Takes a piece of the answer's text. Must not block and must not raise."""

OnRetry = Callable[[ModelError, int, float], None]
"""Told before each repeat: the error, the number of the attempt that failed (from 1), and the
seconds until the next one. Text given out by the failed attempt is void."""

RETRY_BASE_S = 0.5
RETRY_CAP_S = 60.0


@dataclass(frozen=True)
class ModelRequest:
    """The arguments of ``Model.get_response``, in its order."""

    system_instructions: str | None
    input: str | list[TResponseInputItem]
    model_settings: ModelSettings
    tools: list[Tool]
    output_schema: AgentOutputSchemaBase | None
    handoffs: list[Handoff[Any, Any]]
    tracing: ModelTracing = ModelTracing.DISABLED
    previous_response_id: str | None = None
    conversation_id: str | None = None
    prompt: ResponsePromptParam | None = None


@runtime_checkable
class FastModel(Protocol):
    """A model that can stream text without building an event object per token."""

    async def respond(self, request: ModelRequest, on_text: OnText | None) -> ModelResponse:
        """The finished answer; with ``on_text``, streamed, each text delta handed over as it
        comes. Raises ``ModelError``. Cancellation closes the connection at once."""


async def respond(model: Model, request: ModelRequest, on_text: OnText | None) -> ModelResponse:
    """Ask any ``Model``: through its fast door if it has one, else by the SDK's own methods.

    Raises ``ModelError`` for what the provider did wrong; what is not the provider's doing
    (a ``UserError`` of the SDK, cancellation) passes unchanged.
    """
    if isinstance(model, FastModel):
        return await model.respond(request, on_text)
    try:
        if on_text is None:
            return await model.get_response(
                request.system_instructions,
                request.input,
                request.model_settings,
                request.tools,
                request.output_schema,
                request.handoffs,
                request.tracing,
                previous_response_id=request.previous_response_id,
                conversation_id=request.conversation_id,
                prompt=request.prompt,
            )
        return await _streamed(model, request, on_text)
    except Exception as error:
        mapped = as_model_error(error)
        if mapped is None or mapped is error:
            raise
        raise mapped from error


async def _streamed(model: Model, request: ModelRequest, on_text: OnText) -> ModelResponse:
    events: Any = model.stream_response(
        request.system_instructions,
        request.input,
        request.model_settings,
        request.tools,
        request.output_schema,
        request.handoffs,
        request.tracing,
        previous_response_id=request.previous_response_id,
        conversation_id=request.conversation_id,
        prompt=request.prompt,
    )
    finished: Response | None = None
    async with contextlib.aclosing(events) if hasattr(events, "aclose") else _NOTHING:
        async for event in events:
            kind = event.type
            if kind == "response.output_text.delta":
                on_text(event.delta)
            elif kind == "response.completed":
                finished = event.response
            elif kind in ("response.failed", "response.incomplete"):
                raise ended_badly(
                    kind.removeprefix("response."),
                    _attribute(event.response, "error", "message"),
                    _attribute(event.response, "incomplete_details", "reason"),
                    _attribute(event.response, "error", "code"),
                )
            elif kind == "error":
                raise ended_badly("failed", event.message, None, event.code)
    if finished is None:
        raise cut_off()
    return ModelResponse(
        output=list(finished.output),
        usage=usage_of(finished.usage),
        response_id=finished.id,
        request_id=getattr(finished, "_request_id", None),
    )


_NOTHING = contextlib.nullcontext()


def _attribute(value: object, *names: str) -> str | None:
    for name in names:
        value = getattr(value, name, None)
    return None if value is None else str(value)


def usage_of(usage: Any) -> Usage:
    """The SDK's usage of one call from a Responses usage object; None counts one request."""
    if usage is None:
        return Usage(requests=1)
    details = getattr(usage, "input_tokens_details", None)
    out = getattr(usage, "output_tokens_details", None)
    return make_usage(
        usage.input_tokens,
        usage.output_tokens,
        usage.total_tokens,
        cached=getattr(details, "cached_tokens", 0),
        cache_write=getattr(details, "cache_write_tokens", 0),
        reasoning=getattr(out, "reasoning_tokens", 0),
    )


def make_usage(
    input_tokens: int | None,
    output_tokens: int | None,
    total_tokens: int | None = None,
    *,
    cached: int | None = 0,
    cache_write: int | None = 0,
    reasoning: int | None = 0,
) -> Usage:
    """The SDK's usage of one call; None counts as 0."""
    taken, given = input_tokens or 0, output_tokens or 0
    return Usage(
        requests=1,
        input_tokens=taken,
        output_tokens=given,
        total_tokens=total_tokens or taken + given,
        input_tokens_details=InputTokensDetails(
            cached_tokens=cached or 0, cache_write_tokens=cache_write or 0
        ),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning or 0),
    )


def ended_badly(
    how: str, message: str | None, reason: str | None, code: str | None = None
) -> ModelError:
    """The error of an answer that the provider itself ended as failed or incomplete."""
    if how == "incomplete":
        hint = {
            "max_output_tokens": "Raise the model settings' `max_tokens`, or ask for less.",
            "content_filter": "The provider's content filter stopped the answer; rephrase it.",
        }.get(reason or "")
        return ModelIncomplete(
            f"The model's answer is incomplete: {reason or message or 'no reason was given'}.",
            hint=hint,
        )
    if code == "rate_limit_exceeded":
        return ModelRateLimited(f"The model gave up: {message}", retryable=True)
    return ModelError(
        f"The model's answer failed: {message or 'the provider gave no reason'}"
        + (f" ({code})" if code else ""),
        retryable=code in (None, "server_error", "vector_store_timeout"),
    )


def cut_off() -> ModelError:
    """The error of a stream that stopped before its end."""
    return ModelError("The model's answer was cut off before its end.", retryable=True)


def as_model_error(error: BaseException) -> ModelError | None:
    """``error`` as a ``ModelError`` if a model or the way to it caused it, else None.

    Knows our own models' errors, httpx2's, and those of the ``openai`` client, which LiteLLM's
    and most other adapters' errors derive from.
    """
    if isinstance(error, ModelError):
        return error
    if isinstance(error, (openai.APITimeoutError, httpx2.TimeoutException)):
        return ModelTimeout("The model did not answer in time.", hint=_TIMEOUT, retryable=True)
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {"message": error.message}
        return status_error(error.status_code, body, error.response.headers)
    if isinstance(error, openai.APIResponseValidationError):
        return ModelMalformed(f"The model's answer is malformed: {error}", retryable=True)
    if isinstance(error, (openai.APIConnectionError, httpx2.TransportError)):
        return unreachable(error.__cause__ or error)
    if isinstance(error, openai.APIError):
        return ended_badly("failed", error.message, None, error.code)
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return ModelTimeout("The model did not answer in time.", hint=_TIMEOUT, retryable=True)
    if isinstance(error, (ConnectionError, EOFError)):
        return unreachable(error)
    if isinstance(error, openai.OpenAIError) and "api_key" in str(error):
        return ModelUnauthorized(f"The model's provider has no key: {error}", hint=_KEY)
    return None


_KEY = "Set OPENAI_API_KEY (or the key that this model's provider reads) and start again."
_TIMEOUT = "AGENT_SERVER_MODEL_TIMEOUT_S sets how many seconds without a byte are borne."
_ADDRESS = "Check the model's name (AGENT_SERVER_MODEL) and the address (OPENAI_BASE_URL)."


def unreachable(cause: BaseException) -> ModelError:
    """The error of a connection that could not be made or broke."""
    text = str(cause) or type(cause).__name__
    return ModelError(
        f"The connection to the model failed: {text}",
        hint="Check OPENAI_BASE_URL and that the model server is running.",
        retryable=True,
    )


def status_error(status: int, body: Any, headers: Mapping[str, str]) -> ModelError:
    """The error of an HTTP answer with ``status``; ``body`` is the decoded JSON or text."""
    message, code = _server_message(body)
    said = f"The model answered with status {status}" + (f": {message}" if message else ".")
    if status in (401, 403):
        return ModelUnauthorized(said, hint=_KEY)
    should = headers.get("x-should-retry")
    if status == 429:
        if code == "insufficient_quota":
            return ModelRateLimited(said, hint="The account has no credit left at its provider.")
        return ModelRateLimited(
            said,
            hint="The provider limits the rate; fewer calls at once, or a higher limit, help.",
            retryable=should != "false",
            retry_after_s=retry_after_s(headers),
        )
    if 300 <= status < 400:
        place = headers.get("location", "another address")
        return ModelError(said, hint=f"It redirects to {place}; set OPENAI_BASE_URL to that.")
    if status == 404:
        return ModelError(said, hint=_ADDRESS)
    again = status >= 500 or status in (408, 409)
    if should in ("true", "false"):
        again = should == "true"
    return ModelError(said, retryable=again, retry_after_s=retry_after_s(headers))


def _server_message(body: Any) -> tuple[str, str | None]:
    """What the server says, from the shapes in use, and its code. It may repeat what it was sent: what
    looks like a key is taken out."""
    if isinstance(body, str):
        return masked(body.strip()[:500]), None
    if not isinstance(body, dict):
        return "", None
    error = body.get("error", body)
    if isinstance(error, str):
        return masked(error[:2000]), None
    if not isinstance(error, dict):
        return "", None
    text = error.get("message") or error.get("detail") or error.get("msg") or ""
    code = error.get("code") or error.get("type")
    return masked(str(text)[:2000]), None if code is None else str(code)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by ``retry-after-ms`` or ``Retry-After`` (seconds or an HTTP date)."""
    ms = headers.get("retry-after-ms")
    value = headers.get("retry-after")
    try:
        if ms is not None:
            return max(0.0, float(ms) / 1000)
        if value is None:
            return None
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when: datetime = parsedate_to_datetime(value or "")
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - utcnow()).total_seconds())


T = TypeVar("T")


async def retrying(
    call: Callable[[], Awaitable[T]],
    retries: int,
    *,
    on_retry: OnRetry | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    chance: Callable[[], float] = random.random,
) -> T:
    """``call()``'s result, repeated at most ``retries`` times while its error is retryable.

    Waits as long as the provider asks (at most ``RETRY_CAP_S``), else between nothing and
    ``RETRY_BASE_S`` doubled per attempt, so that callers who failed together do not come back
    together. Cancellation ends a call and a wait at once. Raises the last ``ModelError``.
    """
    attempt = 1
    while True:
        try:
            return await call()
        except Exception as error:
            mapped = as_model_error(error)
            if mapped is None:
                raise
            if not mapped.retryable or attempt > retries:
                if mapped is error:
                    raise
                raise mapped from error
        if mapped.retry_after_s is not None:
            delay = min(RETRY_CAP_S, mapped.retry_after_s)
        else:
            delay = chance() * min(RETRY_CAP_S, RETRY_BASE_S * 2**attempt)
        if on_retry is not None:
            on_retry(mapped, attempt, delay)
        await sleep(delay)
        attempt += 1
