"""The ``openai`` client for Python, sync and async, as its own documentation uses it."""

import asyncio
import base64
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import EMBEDDER, KEY, MODEL
from tests.support.model_thread import ModelThread, calling, rule


class Place(BaseModel):
    city: str
    people: int


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


OSLO = {"json": {"city": "Oslo", "people": 700_000}}
WEATHER = openai.pydantic_function_tool(GetWeather, name="get_weather")
WEATHER_TOOL: Any = {"type": "function", **WEATHER["function"]}


def asked_for_weather(models: ModelThread) -> None:
    models.script(rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}))


# Responses


def test_a_response_is_read_as_the_clients_type(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(rule("capital", {"text": "Oslo.", "usage": [12, 3, 4]}))
    response = client.responses.create(
        model=MODEL, input="The capital?", instructions="Be short.", metadata={"a": "b"}
    )
    assert response.output_text == "Oslo." and response.status == "completed"
    assert response.usage is not None and response.error is None
    assert response.usage.input_tokens == 12 and response.usage.total_tokens == 15
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert response.metadata == {"a": "b"} and response._request_id
    assert client.responses.retrieve(response.id) == response


def test_a_stream_accumulates_to_the_response_it_ends_with(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("count", {"tokens": 5}))
    with client.responses.stream(model=MODEL, input="count") as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas == [f"tok{n} " for n in range(5)] and "".join(deltas) == final.output_text
    assert events[-1].type == "response.completed"
    assert client.responses.retrieve(final.id).output_text == final.output_text


@pytest.mark.parametrize("store", [True, False])
def test_a_burst_of_a_fast_model_reaches_the_client_whole(
    client: openai.OpenAI, models: ModelThread, store: bool
) -> None:
    models.script(rule("count", {"tokens": 3_000}))
    with client.responses.stream(model=MODEL, input="count", store=store) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert deltas == [f"tok{n} " for n in range(3_000)]


def test_a_response_in_the_background_is_polled_and_its_stream_resumed(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("count", {"tokens": 4, "delay_s": 0.02}))
    begun = client.responses.create(model=MODEL, input="count", background=True, stream=True)
    seen = []
    for event in begun:
        seen.append(event)
        if event.type == "response.in_progress":
            begun.close()
            break
    identity = seen[0].response.id  # type: ignore[union-attr]
    rest = list(
        client.responses.retrieve(identity, stream=True, starting_after=seen[-1].sequence_number)
    )
    numbers = [event.sequence_number for event in (*seen, *rest)]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.completed"
    again = client.responses.retrieve(identity)
    assert again.status == "completed" and again.background
    with client.responses.stream(response_id=identity, starting_after=None) as stream:
        assert stream.get_final_response().output_text == again.output_text


def test_a_response_in_the_background_is_cancelled(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("slow", {"text": "late", "latency_s": 60}))
    begun = client.responses.create(model=MODEL, input="slow", background=True)
    assert begun.status in ("queued", "in_progress")
    assert client.responses.cancel(begun.id).status == "cancelled"
    assert client.responses.retrieve(begun.id).status == "cancelled"
    assert client.responses.cancel(begun.id).status == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_parsed_into_a_model(
    client: openai.OpenAI, models: ModelThread, stream: bool
) -> None:
    models.script(rule("where", OSLO))
    if stream:
        with client.responses.stream(model=MODEL, input="where", text_format=Place) as events:
            parsed = events.get_final_response().output_parsed
    else:
        parsed = client.responses.parse(model=MODEL, input="where", text_format=Place).output_parsed
    assert parsed == Place(city="Oslo", people=700_000)
    assert models.calls[-1]["text"]["format"]["strict"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_of_the_client_is_parsed_called_and_answered(
    client: openai.OpenAI, models: ModelThread, stream: bool
) -> None:
    asked_for_weather(models)
    if stream:
        with client.responses.stream(model=MODEL, input="weather", tools=[WEATHER_TOOL]) as events:
            first = events.get_final_response()
    else:
        first = client.responses.parse(model=MODEL, input="weather", tools=[WEATHER_TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Oslo"} and call.name == "get_weather"
    second = client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
        tools=[WEATHER_TOOL],
    )
    assert second.output_text == "Sunny."
    (item,) = client.responses.input_items.list(second.id).data
    assert item.type == "function_call_output" and item.output == "sun"


@pytest.mark.parametrize("store", [True, False])
def test_a_conversation_is_carried_on_by_its_items(
    client: openai.OpenAI, models: ModelThread, store: bool
) -> None:
    asked_for_weather(models)
    items: list[Any] = [{"role": "user", "content": "weather"}]
    for _ in range(2):
        response = client.responses.create(
            model=MODEL, input=items, tools=[WEATHER_TOOL], store=store
        )
        items += response.output
        items += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
            for item in response.output
            if item.type == "function_call"
        ]
    assert response.output_text == "Sunny."


def test_a_deleted_response_is_gone(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(rule("hi", {"text": "Hello."}))
    made = client.responses.create(model=MODEL, input="hi")
    items = list(client.responses.input_items.list(made.id, order="asc", limit=1))
    assert [item.content[0].text for item in items] == ["hi"]  # type: ignore[union-attr]
    client.responses.delete(made.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)


def test_an_incomplete_answer_says_why(client: openai.OpenAI, models: ModelThread) -> None:
    cut = {"text": "Once", "ended": "incomplete"}
    models.script(rule("story", {**cut, "incomplete_details": {"reason": "max_output_tokens"}}))
    response = client.responses.create(model=MODEL, input="story", max_output_tokens=16)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Once"


def test_errors_are_of_the_clients_own_classes(
    client: openai.OpenAI, base_url: str, models: ModelThread
) -> None:
    models.script(rule("hi", {"text": "Hello."}))
    ask = client.responses.create
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="agent/nobody", input="hi")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model=MODEL, input="hi", temperature=3)
    assert refused.value.param == "temperature" and refused.value.request_id
    with pytest.raises(openai.BadRequestError) as hosted:
        ask(model=MODEL, input="hi", tools=[{"type": "web_search"}])
    assert hosted.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        ask(model=MODEL, input="hi", previous_response_id="resp_nothing")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APITimeoutError):
        models.script(rule("slow", {"text": "late", "latency_s": 60}))
        client.with_options(timeout=0.3).responses.create(model=MODEL, input="slow", store=False)


# Chat completions


def test_a_chat_is_answered_and_streamed_with_its_usage(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("count", {"tokens": 3}))
    messages: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "count"}]},
    ]
    whole = client.chat.completions.create(model=MODEL, messages=messages)
    assert whole.choices[0].message.content == "tok0 tok1 tok2 "
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model=MODEL, messages=messages, stream_options={"include_usage": True}
    ) as stream:
        said = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert [text for text in said if text] == ["tok0 ", "tok1 ", "tok2 "]
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage == whole.usage and final.usage is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_parsed_into_a_model_and_into_tool_calls(
    client: openai.OpenAI, models: ModelThread, stream: bool
) -> None:
    models.script(
        rule("where", OSLO),
        rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}),
    )

    def ask(messages: Any, **more: Any) -> Any:
        if not stream:
            return client.chat.completions.parse(model=MODEL, messages=messages, **more)
        with client.chat.completions.stream(model=MODEL, messages=messages, **more) as events:
            return events.get_final_completion()

    asked = ask([{"role": "user", "content": "where"}], response_format=Place)
    assert asked.choices[0].message.parsed == Place(city="Oslo", people=700_000)
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    first = ask(messages, tools=[WEATHER])
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Oslo")
    messages += [first.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    second = ask(messages, tools=[WEATHER])
    assert second.choices[0].message.content == "Sunny."


def test_a_chat_that_fails_is_an_error_that_is_not_tried_again(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("fail", {"status": 400, "error": {"message": "no such thing"}}))
    messages: Any = [{"role": "user", "content": "fail"}]
    patient = client.with_options(max_retries=2)
    with pytest.raises(openai.InternalServerError, match="no such thing"):
        patient.chat.completions.create(model=MODEL, messages=messages)
    assert len(models.calls) == 1
    with pytest.raises(openai.APIError, match="no such thing"):
        list(patient.chat.completions.create(model=MODEL, messages=messages, stream=True))


def test_models_are_listed_and_read(client: openai.OpenAI) -> None:
    assert {"goal", MODEL} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


# What is kept beside


def test_a_conversation_is_carried_on_by_its_id(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(rule("my name", {"text": "Hello Ada."}), rule("who", {"text": "You are Ada."}))
    talk = client.conversations.create(
        items=[{"type": "message", "role": "developer", "content": "Be kind."}],
        metadata={"topic": "names"},
    )
    client.responses.create(model=MODEL, input="my name is Ada", conversation=talk.id)
    answer = client.responses.create(model=MODEL, input="who am I?", conversation=talk.id)
    assert answer.conversation is not None and answer.conversation.id == talk.id
    assert "my name is Ada" in json.dumps(models.calls[-1]["input"])
    items = list(client.conversations.items.list(talk.id, order="asc", limit=2))
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert texts == ["Be kind.", "my name is Ada", "Hello Ada.", "who am I?", "You are Ada."]
    assert client.conversations.items.retrieve(items[1].id, conversation_id=talk.id).id  # type: ignore[arg-type, union-attr]
    assert client.conversations.update(talk.id, metadata={"topic": "done"}).metadata == {
        "topic": "done"
    }
    assert client.conversations.delete(talk.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(talk.id)


def test_a_file_is_uploaded_named_and_deleted(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(rule("read", {"text": "It says hello."}))
    made = client.files.create(file=("note.txt", b"hello"), purpose="user_data")
    assert made.bytes == 5 and client.files.content(made.id).read() == b"hello"
    part: Any = [
        {"type": "input_text", "text": "read"},
        {"type": "input_file", "file_id": made.id},
    ]
    answer = client.responses.create(model=MODEL, input=[{"role": "user", "content": part}])
    assert answer.output_text == "It says hello."
    sent = models.calls[-1]["input"][0]["content"][1]
    assert base64.b64decode(sent["file_data"].partition(",")[2]) == b"hello"
    assert made.id in {one.id for one in client.files.list()}
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_texts_are_embedded(client: openai.OpenAI) -> None:
    made = client.embeddings.create(model=EMBEDDER, input=["one", "three"])
    assert [len(one.embedding) for one in made.data] == [3, 3]
    plain = client.embeddings.create(model=EMBEDDER, input="one", encoding_format="float")
    assert made.data[0].embedding == pytest.approx(plain.data[0].embedding)


@pytest.mark.parametrize("approve", [True, False])
def test_a_call_that_needs_consent_waits_for_it(
    client: openai.OpenAI, models: ModelThread, approve: bool
) -> None:
    models.script(rule("pay", calling(("wire_money", {"amount": 7})), {"text": "Done."}))
    first = client.responses.create(model="agent/banker", input="pay")
    (asked,) = [item for item in first.output if item.type == "mcp_approval_request"]
    assert asked.name == "wire_money" and json.loads(asked.arguments) == {"amount": 7}
    second = client.responses.create(
        model="agent/banker",
        previous_response_id=first.id,
        input=[
            {
                "type": "mcp_approval_response",
                "approval_request_id": asked.id,
                "approve": approve,
            }
        ],
    )
    assert second.output_text == "Done."
    assert ("sent 7" in json.dumps(models.calls[-1])) is approve


# The asynchronous client


async def test_many_at_once_get_their_own_answers(base_url: str, models: ModelThread) -> None:
    models.script(*(rule(f"number {n}!", {"text": f"I am {n}."}) for n in range(8)))
    async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as client:

        async def responses(n: int) -> str:
            async with client.responses.stream(
                model=MODEL, input=f"number {n}!", store=n % 2 == 0
            ) as stream:
                return (await stream.get_final_response()).output_text

        async def chat(n: int) -> str:
            messages: Any = [{"role": "user", "content": f"number {n}!"}]
            chunks = await client.chat.completions.create(
                model=MODEL, messages=messages, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

        numbers = range(8)
        answers = await asyncio.gather(*map(responses, numbers), *map(chat, numbers))
    assert answers == [f"I am {n}." for n in numbers] * 2
