"""What the models make of answers: text, deltas, tool calls, structured output, usage."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agents import (
    Agent,
    Model,
    ModelProvider,
    ModelSettings,
    ModelTracing,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from agents.testing import ModelStep, ScriptedModel
from openai import AsyncOpenAI
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from pydantic import BaseModel

from agent_server.inference.chat_model import ChatModel
from agent_server.inference.models import FastModel, ModelRequest, respond
from agent_server.inference.openai_model import text_of
from agent_server.inference.responses_model import ResponsesModel
from agent_server.inference.wire import EventStream, Wire
from tests.support.model_server import ModelServer

MODELS = {"responses": ResponsesModel, "chat": ChatModel}
APIS = pytest.mark.parametrize("api", MODELS)


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with ModelServer() as running:
        yield running


def request(text: Any = "Hello", **settings: Any) -> ModelRequest:
    return ModelRequest(None, text, ModelSettings(**settings), [], None, [])


def model(api: str, server: ModelServer) -> Model:
    return MODELS[api]("mock", Wire(server.base_url, "k", timeout_s=10))  # type: ignore[abstract]


class Provider(ModelProvider):
    def __init__(self, model: Model) -> None:
        self._model = model

    def get_model(self, model_name: str | None) -> Model:
        return self._model


@APIS
async def test_the_fast_door_hands_over_each_delta_and_returns_the_whole(
    api: str, server: ModelServer
) -> None:
    server.default = {"text": "one two three", "usage": [100, 7, 40]}
    heard: list[str] = []
    response = await respond(model(api, server), request(), heard.append)
    assert heard == ["one ", "two ", "three"]
    assert text_of(response) == "one two three"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (100, 7)
    assert response.usage.input_tokens_details.cached_tokens == 40
    assert server.calls[0]["stream"] is True


@APIS
async def test_without_a_listener_the_answer_comes_in_one_piece(
    api: str, server: ModelServer
) -> None:
    server.default = {"text": "one two", "usage": [100, 7, 40]}
    response = await respond(model(api, server), request(preserve_raw_usage=True), None)
    assert text_of(response) == "one two"
    assert response.usage.total_tokens == 107
    assert response.request_id == "req_1"
    assert response.raw_usage is not None
    assert "stream" not in server.calls[0]


@APIS
@pytest.mark.parametrize("streamed", [False, True])
async def test_parallel_tool_calls_arrive_with_their_arguments(
    api: str, server: ModelServer, streamed: bool
) -> None:
    server.default = {
        "tool_calls": [
            {"name": "add", "arguments": {"a": 1, "b": 2}},
            {"name": "add", "arguments": {"a": 3, "b": 4}},
        ]
    }
    response = await respond(
        model(api, server), request(), (lambda text: None) if streamed else None
    )
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert len({call.call_id for call in calls}) == 2


@APIS
@pytest.mark.parametrize("streamed", [False, True])
async def test_our_answer_equals_the_one_of_the_sdks_own_model(
    api: str, server: ModelServer, streamed: bool
) -> None:
    server.default = {
        "text": "Let me see.",
        "reasoning": "They ask for a sum.",
        "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
    }
    client = AsyncOpenAI(api_key="k", base_url=server.base_url)
    theirs: Model = (
        OpenAIResponsesModel("mock", client)
        if api == "responses"
        else OpenAIChatCompletionsModel("mock", client)
    )
    asked = request(include_usage=True)
    listener = (lambda text: None) if streamed else None
    expected = await respond(theirs, asked, listener)
    found = await respond(model(api, server), asked, listener)
    await client.close()
    assert found.to_input_items() == expected.to_input_items()
    assert found.usage == expected.usage
    assert found.response_id == expected.response_id or api == "chat"


@APIS
async def test_a_runner_loop_calls_tools_and_answers_through_our_model(
    api: str, server: ModelServer
) -> None:
    server.script(
        {
            "rules": [
                {
                    "match": "sum",
                    "steps": [
                        {"tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}]},
                        {"text": "It is 5."},
                    ],
                }
            ]
        }
    )
    seen: list[tuple[int, int]] = []

    @function_tool
    def add(a: int, b: int) -> int:
        """Add."""
        seen.append((a, b))
        return a + b

    config = RunConfig(model_provider=Provider(model(api, server)), tracing_disabled=True)
    result = await Runner.run(Agent(name="A", tools=[add]), "The sum?", run_config=config)
    assert result.final_output == "It is 5."
    assert seen == [(2, 3)]
    streamed = Runner.run_streamed(Agent(name="A", tools=[add]), "The sum?", run_config=config)
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == "It is 5."
    assert streamed.final_output == "It is 5."


@APIS
async def test_structured_output_is_parsed_into_its_type(api: str, server: ModelServer) -> None:
    class City(BaseModel):
        name: str
        people: int

    server.default = {"json": {"name": "Oslo", "people": 717710}}
    config = RunConfig(model_provider=Provider(model(api, server)), tracing_disabled=True)
    result = await Runner.run(Agent(name="A", output_type=City), "A city?", run_config=config)
    assert result.final_output == City(name="Oslo", people=717710)


@APIS
async def test_a_refusal_survives(api: str, server: ModelServer) -> None:
    server.default = {"refusal": "I will not."}
    for listener in (None, lambda text: None):
        response = await respond(model(api, server), request(), listener)
        message = response.output[0]
        assert isinstance(message, ResponseOutputMessage)
        assert message.content[0].type == "refusal"


@APIS
async def test_a_connection_is_used_again_and_replaced_when_the_server_closed_it(
    api: str, server: ModelServer
) -> None:
    ours = model(api, server)
    await respond(ours, request(), None)
    await respond(ours, request(), lambda text: None)
    assert len(server.open) == 1
    for peer in list(server.open):
        peer.transport.close()
    await respond(ours, request(), None)
    assert len(server.calls) == 3


async def test_a_server_that_ignores_stream_is_still_understood() -> None:
    async with ModelServer() as server:
        whole = model("responses", server)
        heard: list[str] = []
        plain = request(extra_body={"stream": False})
        response = await respond(whole, plain, heard.append)
        assert "".join(heard) == text_of(response) == "Hello from the model server."


async def test_a_third_party_model_is_read_through_its_events() -> None:
    part = ResponseOutputText(type="output_text", text="hi there", annotations=[])
    message = ResponseOutputMessage(
        id="m", type="message", role="assistant", status="completed", content=[part]
    )
    scripted = ScriptedModel([ModelStep(output=[message]), ModelStep(output=[message])])
    assert not isinstance(scripted, FastModel)
    heard: list[str] = []
    response = await respond(scripted, request(), heard.append)
    assert "".join(heard) == text_of(response) == "hi there"
    assert text_of(await respond(scripted, request(), None)) == "hi there"


def test_an_event_stream_is_read_the_same_however_it_is_cut() -> None:
    text = b': hi\r\nevent: x\r\ndata: {"a":\r\ndata: 1}\r\n\r\ndata:{"b":"\xc3\xa4"}\n\ndata: [DONE]\n\n'
    for size in range(1, len(text) + 1):
        stream = EventStream()
        found: list[Any] = []
        for start in range(0, len(text), size):
            found += stream.feed(text[start : start + size])
        found += stream.end()
        assert found == [{"a": 1}, {"b": "ä"}]
        assert stream.done


async def test_the_sdks_own_door_answers_too(server: ModelServer) -> None:
    response = await model("chat", server).get_response(
        None, "x", ModelSettings(), [], None, [], ModelTracing.ENABLED,
        previous_response_id=None, conversation_id=None, prompt=None,
    )  # fmt: skip
    assert text_of(response)
