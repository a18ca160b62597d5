"""What models do when the provider fails: which error, with which remedy, repeated or not."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import openai
import pytest
from agents import Model, ModelResponse, ModelSettings, OpenAIResponsesModel, UserError
from openai import AsyncOpenAI

from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    ConfigurationError,
    ModelError,
    ModelMalformed,
    ModelRateLimited,
    ModelTimeout,
    ModelUnauthorized,
)
from agent_server.inference.chat_model import ChatModel
from agent_server.inference.models import (
    ModelRequest,
    as_model_error,
    respond,
    retry_after_s,
    retrying,
)
from agent_server.inference.openai_model import text_of
from agent_server.inference.responses_model import ResponsesModel
from agent_server.inference.wire import Wire
from tests.support.model_server import ModelServer
from tests.support.until import until

Json = dict[str, Any]
MODELS = {"responses": ResponsesModel, "chat": ChatModel}
APIS = pytest.mark.parametrize("api", MODELS)
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
ASKED = ModelRequest(None, "Hello", ModelSettings(), [], None, [])


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with ModelServer() as running:
        yield running


def model(api: str, server: ModelServer, timeout_s: float = 20) -> Model:
    return MODELS[api]("mock", Wire(server.base_url, "k", timeout_s=timeout_s))  # type: ignore[abstract]


class Patience:
    """Takes the place of the pauses between attempts and notes them."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.delays.append(seconds)


async def ask(model: Model, streamed: bool, retries: int = 0, **more: Any) -> ModelResponse:
    listener = (lambda text: None) if streamed else None
    return await retrying(lambda: respond(model, ASKED, listener), retries, **more)


ERRORS: dict[str, tuple[Json, type[ModelError], bool, str]] = {
    "no key": (
        {"status": 401, "error": {"message": "bad key"}}, ModelUnauthorized, False, "OPENAI_API_KEY",
    ),
    "not allowed": ({"status": 403}, ModelUnauthorized, False, "OPENAI_API_KEY"),
    "no such model": (
        {"status": 404, "error": {"message": "no model x"}}, ModelError, False, "AGENT_SERVER_MODEL",
    ),
    "bad request": ({"status": 400, "error": {"message": "bad tool"}}, ModelError, False, ""),
    "rate limit": ({"status": 429}, ModelRateLimited, True, "rate"),
    "no credit": (
        {"status": 429, "error": {"message": "x", "code": "insufficient_quota"}},
        ModelRateLimited, False, "credit",
    ),
    "busy": ({"status": 409}, ModelError, True, ""),
    "server error": ({"status": 500}, ModelError, True, ""),
    "overloaded": ({"status": 529}, ModelError, True, ""),
    "not to be repeated": (
        {"status": 500, "headers": {"x-should-retry": "false"}}, ModelError, False, "",
    ),
    "reset": ({"fault": "reset", "text": "a b c"}, ModelError, True, "OPENAI_BASE_URL"),
    "half an answer": ({"fault": "half", "text": "a b c d e"}, ModelError, True, ""),
    "malformed": ({"fault": "malformed"}, ModelMalformed, True, ""),
    "empty": ({"fault": "empty"}, ModelError, True, ""),
}  # fmt: skip


@APIS
@STREAMED
@pytest.mark.parametrize("name", ERRORS)
async def test_a_fault_becomes_a_clear_error_and_is_repeated_only_where_that_helps(
    server: ModelServer, api: str, streamed: bool, name: str
) -> None:
    fault, error_type, again, hint = ERRORS[name]
    server.default = fault
    patience = Patience()
    with pytest.raises(error_type) as caught:
        await ask(model(api, server), streamed, retries=2, sleep=patience)
    error = caught.value
    assert error.retryable is again
    assert hint in (error.hint or "")
    assert len(server.calls) == (3 if again else 1)
    assert len(patience.delays) == (2 if again else 0)
    said = (fault.get("error") or {}).get("message")
    if said:
        assert said in error.detail


@APIS
@STREAMED
async def test_a_call_that_fails_in_passing_is_repeated_and_succeeds(
    server: ModelServer, api: str, streamed: bool
) -> None:
    server.queue = [{"status": 503}, {"fault": "half", "text": "a b c d"}, {"text": "There."}]
    told: list[tuple[str, int, float]] = []
    response = await ask(
        model(api, server),
        streamed,
        retries=3,
        sleep=Patience(),
        on_retry=lambda error, attempt, delay: told.append((error.code, attempt, delay)),
        chance=lambda: 0.5,
    )
    assert text_of(response) == "There."
    assert told == [("model_error", 1, 0.5), ("model_error", 2, 1.0)]
    assert len(server.calls) == 3


@APIS
async def test_a_stream_that_lacks_its_end_is_not_taken_for_an_answer(
    server: ModelServer, api: str
) -> None:
    server.default = {"fault": "cut", "text": "a b c d e f"}
    with pytest.raises(ModelError, match="cut off"):
        await ask(model(api, server), streamed=True)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "86400"}, 60.0),
    ],
)
async def test_the_pause_that_the_provider_asks_for_is_kept_up_to_a_minute(
    server: ModelServer, headers: Json, wait: float
) -> None:
    server.queue = [{"status": 429, "headers": headers}]
    patience = Patience()
    await ask(model("responses", server), False, retries=1, sleep=patience)
    assert patience.delays == [wait]


def test_retry_after_may_be_a_date() -> None:
    when = format_datetime(utcnow() + timedelta(seconds=30), usegmt=True)
    found = retry_after_s({"retry-after": when})
    assert found is not None and 25 < found <= 30
    assert retry_after_s({"retry-after": "soon"}) is None
    assert retry_after_s({"retry-after": "-5"}) == 0


async def test_pauses_grow_and_are_spread_by_chance(server: ModelServer) -> None:
    server.default = {"status": 500}
    patience = Patience()
    with pytest.raises(ModelError):
        await ask(model("chat", server), False, retries=9, sleep=patience, chance=lambda: 1.0)
    assert patience.delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@APIS
@STREAMED
async def test_silence_ends_a_call_after_the_time_allowed(
    server: ModelServer, api: str, streamed: bool
) -> None:
    server.default = {"fault": "silent"}
    with pytest.raises(ModelTimeout, match="nothing for 0.05 seconds") as caught:
        await ask(model(api, server, timeout_s=0.05), streamed)
    assert caught.value.retryable and "AGENT_SERVER_MODEL_TIMEOUT_S" in (caught.value.hint or "")


@APIS
async def test_a_cancelled_call_closes_its_connection_at_once(
    server: ModelServer, api: str
) -> None:
    server.default = {"fault": "silent"}
    call = asyncio.ensure_future(ask(model(api, server), True))
    await until(lambda: len(server.raw_calls) == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: not server.open)


async def test_a_cancelled_pause_ends_at_once() -> None:
    async def failing() -> None:
        raise ModelRateLimited("busy", retryable=True, retry_after_s=60)

    pausing = asyncio.Event()

    async def pause(seconds: float) -> None:
        pausing.set()
        await asyncio.Event().wait()

    call = asyncio.ensure_future(retrying(failing, 3, sleep=pause))
    await asyncio.wait_for(pausing.wait(), 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_server_that_is_not_there_is_named_with_a_remedy() -> None:
    async with ModelServer() as gone:
        pass
    with pytest.raises(ModelError, match="connection to the model failed") as caught:
        await ask(model("responses", gone), False)
    assert caught.value.retryable and "OPENAI_BASE_URL" in (caught.value.hint or "")


async def test_without_a_key_the_official_provider_is_not_even_asked() -> None:
    with pytest.raises(ModelUnauthorized) as caught:
        await respond(ResponsesModel("gpt-5.2", Wire()), ASKED, None)
    assert "OPENAI_API_KEY" in (caught.value.hint or "")


def test_a_base_url_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_BASE_URL"):
        Wire("localhost:11434/v1")
    for address in ("http://", "http://host:99999/v1", "http://[::1/v1", "ftp://host/v1"):
        with pytest.raises(ConfigurationError, match="no address"):
            Wire(address)


@STREAMED
async def test_an_answer_that_ran_out_of_tokens_says_what_to_raise(
    server: ModelServer, streamed: bool
) -> None:
    server.default = {
        "text": "half a sen",
        "ended": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
    }
    with pytest.raises(ModelError, match="max_output_tokens") as caught:
        await ask(model("responses", server), streamed)
    assert not caught.value.retryable and "max_tokens" in (caught.value.hint or "")


@STREAMED
async def test_an_answer_that_the_provider_gave_up_is_repeated(
    server: ModelServer, streamed: bool
) -> None:
    broken = {"ended": "failed", "ended_error": {"code": "server_error", "message": "oops"}}
    server.queue = [{"text": "x", **broken}]
    response = await ask(model("responses", server), streamed, retries=1, sleep=Patience())
    assert text_of(response)


@STREAMED
async def test_the_sdks_own_model_fails_with_the_same_errors(
    server: ModelServer, streamed: bool
) -> None:
    async with AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0) as client:
        theirs = OpenAIResponsesModel("mock", client)
        for fault, error_type, again, _ in (ERRORS["no key"], ERRORS["rate limit"]):
            server.default = fault
            with pytest.raises(error_type) as caught:
                await ask(theirs, streamed)
            assert caught.value.retryable is again
            assert isinstance(caught.value.__cause__, openai.APIStatusError)


def test_what_no_model_caused_is_no_model_error() -> None:
    assert as_model_error(ValueError("x")) is None
    assert as_model_error(UserError("x")) is None
    assert as_model_error(asyncio.CancelledError()) is None
