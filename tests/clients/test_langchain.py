"""LangChain's ``ChatOpenAI``, over chat completions and over responses."""

import asyncio
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.conftest import KEY, MODEL
from tests.support.model_thread import ModelThread, calling, rule

chat_models = pytest.importorskip(
    "langchain_openai", reason="LangChain is not installed: make clients"
)


class Place(BaseModel):
    """A place."""

    city: str
    people: int = Field(description="How many live there.")


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sun in {city}"


@pytest.fixture(params=["chat", "responses", "responses/v1"])
def llm(request: pytest.FixtureRequest, base_url: str) -> Any:
    more: dict[str, Any] = {"stream_usage": True}
    if request.param != "chat":
        more = {"use_responses_api": True}
    if request.param == "responses/v1":
        more["output_version"] = "responses/v1"
    return chat_models.ChatOpenAI(
        base_url=base_url, api_key=KEY, model=MODEL, max_retries=0, timeout=30, **more
    )


def test_it_is_invoked_with_a_history(llm: Any, models: ModelThread) -> None:
    models.script(rule("capital", {"text": "Oslo.", "usage": [12, 3, 4]}))
    history = [("system", "Be short."), ("human", "Hi"), ("ai", "Hello."), ("human", "capital?")]
    answer = llm.invoke(history)
    assert answer.text == "Oslo."
    assert answer.usage_metadata["input_tokens"] == 12
    assert answer.usage_metadata["input_token_details"]["cache_read"] == 4


def test_it_streams(llm: Any, models: ModelThread) -> None:
    models.script(rule("count", {"tokens": 3}))
    whole = None
    texts = []
    for chunk in llm.stream("count"):
        texts.append(chunk.text)
        whole = chunk if whole is None else whole + chunk
    assert [text for text in texts if text] == ["tok0 ", "tok1 ", "tok2 "]
    assert whole is not None and whole.usage_metadata["output_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_its_tools_are_called_and_answered(llm: Any, models: ModelThread, stream: bool) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    models.script(
        rule(
            "weather",
            calling(("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})),
            {"text": "Sunny."},
        )
    )
    bound = llm.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("weather")]
    if stream:
        parts = list(bound.stream(messages))
        asked = parts[0]
        for part in parts[1:]:
            asked += part
    else:
        asked = bound.invoke(messages)
    assert [call["args"] for call in asked.tool_calls] == [{"city": "Oslo"}, {"city": "Rome"}]
    messages.append(asked)
    messages += [
        ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
        for call in asked.tool_calls
    ]
    assert bound.invoke(messages).text == "Sunny."


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_its_structured_output_is_an_object(llm: Any, models: ModelThread, method: str) -> None:
    place = {"city": "Oslo", "people": 700_000}
    reply = calling(("Place", place)) if method == "function_calling" else {"json": place}
    models.script(rule("json where", reply))
    structured = llm.with_structured_output(Place, method=method)
    assert structured.invoke("json where") == Place(**place)


def test_a_conversation_goes_on_from_the_response_before(
    base_url: str, models: ModelThread
) -> None:
    models.script(rule("my name", {"text": "Hello Ada."}), rule("who", {"text": "You are Ada."}))
    llm = chat_models.ChatOpenAI(
        base_url=base_url,
        api_key=KEY,
        model=MODEL,
        use_responses_api=True,
        use_previous_response_id=True,
    )
    first = llm.invoke("my name is Ada")
    again = llm.invoke([("human", "my name is Ada"), first, ("human", "who am I?")])
    assert again.text == "You are Ada."
    assert len(models.calls[-1]["input"]) == 3


async def test_many_at_once_get_their_own_answers(base_url: str, models: ModelThread) -> None:
    models.script(*(rule(f"number {n}!", {"text": f"I am {n}."}) for n in range(6)))
    async with openai.DefaultAsyncHttpxClient() as http:
        llms = [
            chat_models.ChatOpenAI(
                base_url=base_url,
                api_key=KEY,
                model=MODEL,
                http_async_client=http,
                use_responses_api=responses,
            )
            for responses in (True, False)
        ]
        answers = await asyncio.gather(*(llms[n % 2].ainvoke(f"number {n}!") for n in range(6)))
    assert [answer.text for answer in answers] == [f"I am {n}." for n in range(6)]


def test_its_errors_are_the_openai_clients(llm: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        llm.bind(model="agent/nobody").invoke("hi")
