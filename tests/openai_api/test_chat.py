"""``/v1/chat/completions`` over a real socket, by the ``openai`` client and by hand."""

import json
from typing import Any

import openai
import pytest

from tests.e2e.kit import Api
from tests.openai_api.schemas import check
from tests.openai_api.test_responses import WEATHER
from tests.support.model_thread import ModelThread, calling, rule

Json = dict[str, Any]
FUNCTION = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}


def test_a_completion_fits_the_published_schema(api: Api, models: ModelThread) -> None:
    models.script(rule("capital", {"text": "Paris."}))
    before = api.get("/api/v1/runs", agent="clerk")["data"]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "capital"}]
    answer = api.http.post(
        "/v1/chat/completions", json={"model": "agent/clerk", "messages": messages}
    )
    assert answer.status_code == 200, answer.text
    check("CreateChatCompletionResponse", answer.json())
    assert answer.json()["choices"][0]["message"]["content"] == "Paris."
    assert answer.json()["usage"]["total_tokens"] > 0
    assert api.get("/api/v1/runs", agent="clerk")["data"] == before, "it was stored"


def test_chunks_end_with_the_usage_and_done(api: Api, models: ModelThread) -> None:
    models.script(rule("count", {"tokens": 2}))
    body = {
        "model": "agent/clerk",
        "messages": [{"role": "user", "content": "count"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with api.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)
    assert [c["choices"][0]["delta"].get("content") for c in chunks[:-1]] == [
        "",
        "tok0 ",
        "tok1 ",
        None,
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_tool_of_the_client_is_called_and_answered(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}))
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    first = client.chat.completions.create(
        model="agent/clerk", messages=messages, tools=[FUNCTION]  # type: ignore[list-item]
    )
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sun"},
    ]
    second = client.chat.completions.create(
        model="agent/clerk", messages=messages, tools=[FUNCTION]  # type: ignore[list-item]
    )
    assert second.choices[0].message.content == "Sunny."


def test_a_completion_in_a_form_is_json(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(rule("where", {"text": '{"city":"Oslo"}'}))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model="agent/clerk",
        messages=[{"role": "user", "content": "where"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": schema},
        },
    )
    assert json.loads(answer.choices[0].message.content or "") == {"city": "Oslo"}


def test_a_failed_run_is_an_error_that_clients_do_not_repeat(api: Api, models: ModelThread) -> None:
    models.script(rule("fail", {"status": 400, "error": {"message": "no such thing"}}))
    client = openai.OpenAI(base_url=api.url + "/v1", api_key="key-of-the-tests", max_retries=2)
    before = len(models.calls)
    with pytest.raises(openai.InternalServerError, match="no such thing"):
        client.chat.completions.create(
            model="agent/clerk", messages=[{"role": "user", "content": "fail"}]
        )
    assert len(models.calls) - before <= 1


@pytest.mark.parametrize("name", ["stop", "seed", "logit_bias", "functions"])
def test_what_would_not_be_honoured_is_refused(api: Api, name: str) -> None:
    body = {"model": "agent/clerk", "messages": [{"role": "user", "content": "x"}], name: ["x"]}
    answer = api.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "wibble": 1}, "messages[0].wibble"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
            "messages[0].function_call",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "w": 1}]},
            "messages[0].content[0].w",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "w": 1}}]},
            "messages[0].content[0].image_url.w",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "w": 1}}]},
            "messages[0].tool_calls[0].function.w",
        ),
    ],
)
def test_what_a_message_does_not_have_is_refused_by_its_place(
    api: Api, message: Any, param: str
) -> None:
    body = {"model": "agent/clerk", "messages": [message]}
    answer = api.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"] == param


def test_an_answer_and_a_refusal_come_back_whole(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("hi", {"text": "hello"}), rule("sure", {"text": "Yes."}))
    said: list[Any] = [{"role": "user", "content": "hi", "name": "ann"}]
    answer = client.chat.completions.create(model="agent/clerk", messages=said)
    said += [answer.choices[0].message, {"role": "assistant", "refusal": "I cannot."}]
    said.append({"role": "user", "content": "sure?"})
    again = client.chat.completions.create(model="agent/clerk", messages=said)
    assert again.choices[0].message.content == "Yes."
    told = [item["content"] for item in models.calls[-1]["input"]]
    assert told == ["hi", "hello", "I cannot.", "sure?"]


def test_the_requests_of_open_webui(api: Api, models: ModelThread) -> None:
    """A chat with a tool of its own, and a title: as its server sends them on."""
    models.script(
        rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}),
        rule("title", {"text": '{"title": "Weather"}'}),
    )
    listed = api.http.get("/v1/models").json()
    assert "agent/clerk" in [model["id"] for model in listed["data"]]
    said: list[Json] = [
        {"role": "system", "content": "The date is known."},
        {"role": "user", "content": [{"type": "text", "text": "weather"}]},
    ]
    body = {
        "stream": True,
        "model": "agent/clerk",
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 1_000,
        "tools": [FUNCTION],
    }

    def told() -> tuple[str, list[Json]]:
        """The text and the calls of a stream, put together as its reader does."""
        text, calls = "", []
        answer = api.http.post("/v1/chat/completions", json={**body, "messages": said})
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        for chunk in map(json.loads, lines[:-1]):
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                calls += choice["delta"].get("tool_calls") or []
        return text, calls

    text, calls = told()
    assert text == "" and calls[0]["index"] == 0
    said += [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sun"},
    ]
    assert told() == ("Sunny.", [])
    title = {
        "model": "agent/clerk",
        "messages": [{"role": "user", "content": "Give it a title"}],
        "stream": False,
        "max_completion_tokens": 1_000,
    }
    answer = api.http.post("/v1/chat/completions", json=title).json()
    assert answer["choices"][0]["message"]["content"] == '{"title": "Weather"}'
