"""``/v1/responses`` over a real socket, by the ``openai`` client and by hand."""

import json
from typing import Any

import openai
import pytest

from tests.e2e.kit import Api
from tests.openai_api.schemas import check, check_events
from tests.support.model_thread import ModelThread, calling, rule

Json = dict[str, Any]
WEATHER: Json = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def streamed(api: Api, body: Json | None = None, path: str = "/v1/responses") -> list[Json]:
    """The events of a stream, held against their schemas."""
    method = "POST" if body is not None else "GET"
    sent = {**body, "stream": True} if body is not None else None
    with api.http.stream(method, path, json=sent) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    pairs = list(zip(lines[:-1:2], lines[1:-1:2], strict=True))
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    return events


@pytest.mark.parametrize("store", [True, False])
def test_a_response_has_every_key_and_fits_the_published_schema(
    api: Api, models: ModelThread, store: bool
) -> None:
    models.script(rule("capital", {"text": "Paris."}))
    answer = api.http.post(
        "/v1/responses",
        json={
            "model": "agent/clerk",
            "input": "The capital?",
            "store": store,
            "metadata": {"a": "b"},
        },
    )
    assert answer.status_code == 200, answer.text
    response = answer.json()
    check("Response", response)
    assert response["status"] == "completed" and response["metadata"] == {"a": "b"}
    assert response["output"][0]["content"][0]["text"] == "Paris."
    assert response["usage"]["input_tokens"] > 0
    again = api.http.get(f"/v1/responses/{response['id']}")
    if store:
        assert again.json() == response
    else:
        assert again.status_code == 404
        check("ErrorResponse", again.json())


@pytest.mark.parametrize("store", [True, False])
def test_events_come_in_their_order_with_numbers_without_gaps(
    api: Api, models: ModelThread, store: bool
) -> None:
    models.script(rule("count", {"tokens": 3}))
    body = {"model": "agent/clerk", "input": "count", "store": store}
    events = streamed(api, body)
    check_events(events)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1]["response"]
    check("Response", final)
    if not store:
        return
    path = f"/v1/responses/{final['id']}"
    assert api.http.get(path).json() == final
    assert streamed(api, path=path + "?stream=true") == events
    for after in (0, 4, 5, 9):
        rest = streamed(api, path=f"{path}?stream=true&starting_after={after}")
        assert rest == events[after + 1 :]


def test_a_tool_of_the_client_is_asked_for_and_its_output_continues_the_answer(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(
        rule(
            "weather",
            calling(("add", {"a": 1, "b": 2}), ("get_weather", {"city": "Oslo"})),
            {"text": "Sunny, and 3."},
        )
    )
    first = client.responses.create(model="agent/clerk", input="weather", tools=[WEATHER])  # type: ignore[list-item]
    check("Response", json.loads(first.to_json()))
    calls = [item for item in first.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["get_weather"]
    assert json.loads(calls[0].arguments) == {"city": "Oslo"}
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        client.responses.create(model="agent/clerk", input="hello?", previous_response_id=first.id)
    second = client.responses.create(
        model="agent/clerk",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": calls[0].call_id, "output": "sun"}],
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert second.output_text == "Sunny, and 3."
    asked = models.calls[-1]["input"]
    outputs = {i["call_id"]: i["output"] for i in asked if i.get("type") == "function_call_output"}
    assert outputs[calls[0].call_id] == "sun" and "3.0" in outputs.values()
    items = client.responses.input_items.list(second.id)
    assert [item.type for item in items.data] == ["function_call_output"]


def test_a_streamed_call_of_the_clients_tool_fits_its_schemas(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("weather", calling(("get_weather", {"city": "Oslo"}))))
    events = streamed(api, {"model": "agent/clerk", "input": "weather", "tools": [WEATHER]})
    check_events(events)
    kinds = [event["type"] for event in events]
    assert "response.function_call_arguments.delta" in kinds
    assert events[-1]["response"]["output"][0]["type"] == "function_call"


def test_progress_of_the_servers_own_tools_is_reasoning(api: Api, models: ModelThread) -> None:
    models.script(rule("sum", calling(("add", {"a": 1, "b": 2})), {"text": "It is 3."}))
    events = streamed(api, {"model": "agent/clerk", "input": "sum"})
    check_events(events)
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]


def test_an_answer_in_a_form_is_held_to_its_schema(
    client: openai.OpenAI, models: ModelThread
) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    models.script(
        rule("where", {"text": '{"town": 1}'}),
        rule("not have the form", {"text": '{"city":"Oslo"}'}),
    )
    response = client.responses.create(
        model="agent/clerk", input="where", text={"format": form}  # type: ignore[arg-type, typeddict-item]
    )
    assert json.loads(response.output_text) == {"city": "Oslo"}
    sent = models.calls[0]["text"]["format"]
    assert sent["schema"] == schema


def test_a_response_in_the_background_is_read_followed_cancelled_and_deleted(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("slow", {"text": "done", "latency_s": 60}))
    body = {"model": "agent/clerk", "input": "slow", "background": True}
    begun = api.http.post("/v1/responses", json=body).json()
    check("Response", begun)
    assert begun["status"] in ("queued", "in_progress")
    assert client.responses.cancel(begun["id"]).status == "cancelled"
    models.script(rule("quick", {"text": "done"}))
    made = client.responses.create(model="agent/clerk", input="quick", background=True)
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[-1].type == "response.completed"
    assert client.responses.retrieve(made.id).output_text == "done"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_failed_run_is_a_failed_response_and_is_not_repeated(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("fail", {"status": 400, "error": {"message": "no such thing"}}))
    response = client.responses.create(model="agent/clerk", input="fail")
    assert response.status == "failed" and response.error is not None
    assert "no such thing" in response.error.message
    events = streamed(api, {"model": "agent/clerk", "input": "fail"})
    check_events(events)
    assert events[-1]["type"] == "response.failed"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "agent/nobody"}, 404, "model"),
        ({"model": "gpt-4o"}, 404, "model"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "add"}]}, 200, None),
        ({"previous_response_id": "resp_" + "0" * 32}, 404, None),
        ({"service_tier": "flex"}, 400, "service_tier"),
        ({"prompt": {"id": "x"}}, 400, "prompt"),
        ({"wibble": 1}, 400, "wibble"),
        ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
        ({"include": ["message.output_text.logprobs"]}, 400, "include"),
        ({"temperature": 3}, 400, "temperature"),
    ],
)
def test_what_is_not_supported_is_refused_in_openais_form(
    api: Api, models: ModelThread, change: Json, status: int, param: str | None
) -> None:
    models.script(rule("hi", {"text": "hi"}))
    answer = api.http.post("/v1/responses", json={"model": "agent/clerk", "input": "hi", **change})
    assert answer.status_code == status, answer.text
    if status != 200:
        check("ErrorResponse", answer.json())
        assert answer.json()["error"]["param"] == param


def test_errors_of_the_door_have_openais_form_too(api: Api) -> None:
    big = b'{"input": "' + b"x" * 2_000_000 + b'"}'
    answers = [
        api.http.post("/v1/responses", content=b"{", headers={"content-type": "application/json"}),
        api.http.get("/v1/models", headers={"authorization": "Bearer wrong"}),
        api.http.get("/v1/nothing"),
        api.http.put("/v1/models"),
        api.http.post("/v1/responses", content=big, headers={"content-type": "application/json"}),
        api.http.post("/v1/responses", content=b"x", headers={"content-type": "text/plain"}),
    ]
    assert [answer.status_code for answer in answers] == [400, 401, 404, 405, 413, 415]
    for answer in answers:
        check("ErrorResponse", answer.json())


def test_models_are_agents_workflows_and_goals(api: Api, client: openai.OpenAI) -> None:
    listed = api.http.get("/v1/models").json()
    check("ListModelsResponse", listed)
    assert {"goal", "agent/clerk"} <= {model["id"] for model in listed["data"]}
    assert client.models.retrieve("agent/clerk").id == "agent/clerk"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("agent/nobody")


def test_a_history_is_compacted_and_goes_on(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(
        rule("my name", {"text": "Hello Ada."}),
        rule("Summarise", {"text": "The user is Ada."}),
        rule("who", {"text": "You are Ada."}),
    )
    first = client.responses.create(model="agent/clerk", input="my name is Ada")
    compacted = api.http.post(
        "/v1/responses/compact", json={"model": "agent/clerk", "previous_response_id": first.id}
    ).json()
    check("CompactResource", compacted)
    more = {"role": "user", "content": "who am I?"}
    after = client.responses.create(model="agent/clerk", input=[*compacted["output"], more])
    assert after.output_text == "You are Ada."
    assert "The user is Ada." in json.dumps(models.calls[-1]["input"])


def test_every_answer_may_come_back_whole_as_input(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    """``input += response.output``, which is how clients keep a history themselves."""
    models.script(
        rule(
            "weather",
            calling(("add", {"a": 1, "b": 2}), ("get_weather", {"city": "Oslo"})),
            {"text": "Sunny."},
        ),
        rule("sure", {"text": "Yes."}),
    )
    said: list[Any] = [{"role": "user", "content": "weather"}]
    tools: Any = [WEATHER]
    for store in (True, False):
        kept = list(said)
        first = client.responses.create(model="agent/clerk", input=kept, tools=tools, store=store)
        kept += first.output
        [call] = [item for item in first.output if item.type == "function_call"]
        assert call.id and call.status == "completed"
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        kept.append({**output, "id": "fco_1", "status": "completed"})
        second = client.responses.create(model="agent/clerk", input=kept, tools=tools, store=store)
        assert second.output_text == "Sunny."
        kept += [*second.output, {"role": "user", "content": "sure?"}]
        third = client.responses.create(model="agent/clerk", input=kept, tools=tools, store=store)
        assert third.output_text == "Yes."
        sent = models.calls[-1]["input"]
        assert [item.get("type", item.get("role")) for item in sent] == [
            "user", "function_call", "function_call_output", "assistant", "user",
        ]  # fmt: skip
        assert not any("id" in item or "status" in item for item in sent)


READ = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({**READ, "wibble": 1}, "input[0].wibble"),
        ({**READ, "status": "fine"}, "input[0].status"),
        (
            {**READ, "content": [{"type": "input_text", "text": "x", "w": 1}]},
            "input[0].content[0].w",
        ),
        (
            {**READ, "content": [{"type": "input_file", "file_url": "http://x/y", "w": 1}]},
            "input[0].content[0].w",
        ),
        ({**CALL, "namespace": "crm"}, "input[0].namespace"),
        ({**CALL, "caller": {"type": "direct"}}, "input[0].caller"),
        (
            {"type": "function_call_output", "call_id": "c", "output": "x", "w": 1},
            "input[0].w",
        ),
        ({"type": "reasoning", "id": "rs_1", "summary": [], "w": 1}, "input[0].w"),
        ({"type": "item_reference", "id": "msg_1", "w": 1}, "input[0].w"),
        ({"type": "web_search_call", "id": "ws_1", "status": "completed"}, "input[0].type"),
        ({"type": ["message"]}, "input[0].type"),
    ],
)
def test_what_an_item_does_not_have_is_refused_by_its_place(
    api: Api, item: Any, param: str
) -> None:
    answer = api.http.post("/v1/responses", json={"model": "agent/clerk", "input": [item]})
    assert answer.status_code == 400, answer.text
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"] == param
