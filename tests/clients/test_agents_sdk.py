"""``openai-agents`` for Python, with an agent of ours as the model of an agent of the caller's."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    OpenAIConversationsSession,
    OpenAIProvider,
    RunConfig,
    Runner,
    function_tool,
)
from pydantic import BaseModel

from tests.clients.conftest import KEY, MODEL
from tests.support.model_thread import ModelThread, calling, rule


class Place(BaseModel):
    city: str


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sun in {city}"


@pytest.fixture
async def near(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as near:
        yield near


@pytest.fixture(params=["responses", "chat", "websocket"])
async def config(
    request: pytest.FixtureRequest, near: openai.AsyncOpenAI
) -> AsyncIterator[RunConfig]:
    provider = OpenAIProvider(
        openai_client=near,
        use_responses=request.param != "chat",
        use_responses_websocket=request.param == "websocket",
    )
    yield RunConfig(model_provider=provider, tracing_disabled=True)
    await provider.aclose()


async def test_an_agent_calls_its_own_tools_through_ours(
    config: RunConfig, models: ModelThread
) -> None:
    models.script(
        rule(
            "weather",
            calling(("get_weather", {"city": "Oslo"}), ("add", {"a": 1, "b": 2})),
            calling(("get_weather", {"city": "Rome"})),
            {"text": "Sunny."},
        )
    )
    agent = Agent(name="traveller", instructions="Travel.", model=MODEL, tools=[get_weather])
    result = await Runner.run(agent, "weather", run_config=config)
    assert result.final_output == "Sunny."
    outputs = [i.output for i in result.new_items if i.type == "tool_call_output_item"]
    assert outputs == ["sun in Oslo", "sun in Rome"]
    assert "You are a clerk." in json.dumps(models.calls[-1])
    assert "Travel." in json.dumps(models.calls[-1])


async def test_a_streamed_run_has_its_deltas_and_its_calls(
    config: RunConfig, models: ModelThread
) -> None:
    models.script(rule("weather", calling(("get_weather", {"city": "Oslo"})), {"tokens": 3}))
    agent = Agent(name="traveller", instructions="Travel.", model=MODEL, tools=[get_weather])
    result = Runner.run_streamed(agent, "weather", run_config=config)
    events: list[Any] = [event async for event in result.stream_events()]
    deltas = [
        event.data.delta
        for event in events
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert [delta for delta in deltas if delta] == ["tok0 ", "tok1 ", "tok2 "]
    names = [event.name for event in events if event.type == "run_item_stream_event"]
    assert [name for name in names if name != "reasoning_item_created"] == [
        "tool_called",
        "tool_output",
        "message_output_created",
    ]
    assert result.final_output == "tok0 tok1 tok2 "


@pytest.mark.parametrize("stream", [False, True])
async def test_an_output_type_is_answered_in_its_form(
    config: RunConfig, models: ModelThread, stream: bool
) -> None:
    models.script(rule("where", {"json": {"city": "Oslo"}}))
    agent = Agent(name="atlas", model=MODEL, output_type=Place)
    if stream:
        streamed = Runner.run_streamed(agent, "where", run_config=config)
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == Place(city="Oslo")
    else:
        assert (await Runner.run(agent, "where", run_config=config)).final_output == Place(
            city="Oslo"
        )


async def test_a_handoff_goes_to_another_agent_of_the_callers(
    config: RunConfig, models: ModelThread
) -> None:
    models.script(rule("hola", calling(("transfer_to_spaniard", {})), {"text": "Buenos dias."}))
    spaniard = Agent(name="spaniard", instructions="Speak Spanish.", model=MODEL)
    greeter = Agent(name="greeter", instructions="Greet.", model=MODEL, handoffs=[spaniard])
    result = await Runner.run(greeter, "hola", run_config=config)
    assert result.final_output == "Buenos dias." and result.last_agent is spaniard
    assert "Speak Spanish." in json.dumps(models.calls[-1])


async def test_a_run_goes_on_from_the_response_before(
    near: openai.AsyncOpenAI, models: ModelThread
) -> None:
    models.script(
        rule("my name", {"text": "Hello Ada."}),
        rule("who", calling(("get_weather", {"city": "Oslo"})), {"text": "You are Ada."}),
    )
    config = RunConfig(model_provider=OpenAIProvider(openai_client=near), tracing_disabled=True)
    agent = Agent(name="friend", model=MODEL, tools=[get_weather])
    first = await Runner.run(agent, "my name is Ada", run_config=config)
    second = await Runner.run(
        agent,
        "who am I?",
        run_config=config,
        previous_response_id=first.last_response_id,
        auto_previous_response_id=True,
    )
    assert second.final_output == "You are Ada."
    assert "my name is Ada" in json.dumps(models.calls[-1])


async def test_a_session_is_a_conversation_of_ours(
    near: openai.AsyncOpenAI, models: ModelThread
) -> None:
    models.script(
        rule("my name", {"text": "Hello Ada."}),
        rule("who", calling(("get_weather", {"city": "Oslo"})), {"text": "You are Ada."}),
    )
    config = RunConfig(model_provider=OpenAIProvider(openai_client=near), tracing_disabled=True)
    agent = Agent(name="friend", model=MODEL, tools=[get_weather])
    session = OpenAIConversationsSession(openai_client=near)
    await Runner.run(agent, "my name is Ada", session=session, run_config=config)
    result = await Runner.run(agent, "who am I?", session=session, run_config=config)
    assert result.final_output == "You are Ada."
    assert "my name is Ada" in json.dumps(models.calls[-1])
    items = await session.get_items()
    kinds = [item.get("type") for item in items]
    assert kinds.count("message") == 4 and "function_call_output" in kinds
    last = await session.pop_item()
    assert last is not None and len(await session.get_items()) == len(items) - 1
    assert len(await session.get_items(limit=2)) == 2
    await session.clear_session()


async def test_a_run_within_a_conversation_sends_only_what_is_new(
    near: openai.AsyncOpenAI, models: ModelThread
) -> None:
    models.script(
        rule("my name", {"text": "Hello Ada."}),
        rule("who", calling(("get_weather", {"city": "Oslo"})), {"text": "You are Ada."}),
    )
    config = RunConfig(model_provider=OpenAIProvider(openai_client=near), tracing_disabled=True)
    agent = Agent(name="friend", model=MODEL, tools=[get_weather])
    talk = (await near.conversations.create()).id
    await Runner.run(agent, "my name is Ada", conversation_id=talk, run_config=config)
    result = await Runner.run(agent, "who am I?", conversation_id=talk, run_config=config)
    assert result.final_output == "You are Ada."
    assert "my name is Ada" in json.dumps(models.calls[-1])


async def test_a_failed_run_raises_what_the_sdk_raises_for_a_model(
    near: openai.AsyncOpenAI, models: ModelThread
) -> None:
    models.script(rule("fail", {"status": 400, "error": {"message": "no such thing"}}))
    agent = Agent(name="friend", model=MODEL)
    for responses in (True, False):
        provider = OpenAIProvider(openai_client=near, use_responses=responses)
        config = RunConfig(model_provider=provider, tracing_disabled=True)
        with pytest.raises(Exception, match="no such thing"):
            await Runner.run(agent, "fail", run_config=config)
