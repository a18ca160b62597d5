"""``/v1/conversations`` over a real socket: kept by the client, read and added to by responses."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.kit import Api
from tests.openai_api.schemas import check
from tests.openai_api.test_responses import WEATHER
from tests.support.model_thread import ModelThread, calling, rule

SAID = [
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "42"},
]


def test_a_conversation_is_made_read_labelled_listed_cut_and_deleted(
    api: Api, client: openai.OpenAI
) -> None:
    made = client.conversations.create(items=SAID, metadata={"a": "b"})  # type: ignore[arg-type]
    check("ConversationResource", json.loads(made.to_json()))
    assert client.conversations.retrieve(made.id).metadata == {"a": "b"}
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    path = f"/v1/conversations/{made.id}"
    whole = api.http.get(path + "/items?order=asc").json()
    check("ConversationItemList", whole)
    kinds = [item["type"] for item in whole["data"]]
    assert kinds == ["message", "message", "function_call", "function_call_output"]
    paged = [item.id for item in client.conversations.items.list(made.id, limit=3)]
    assert paged == [item["id"] for item in whole["data"]][::-1]
    more = client.conversations.items.create(
        made.id,
        items=[{"role": "user", "content": "more"}],
        include=["reasoning.encrypted_content"],
    )
    check("ConversationItemList", json.loads(more.to_json()))
    one = api.http.get(f"{path}/items/{more.data[0].id}").json()
    check("ConversationItem", one)
    assert one["content"] == [{"type": "input_text", "text": "more"}]
    client.conversations.items.delete(more.data[0].id or "", conversation_id=made.id)
    assert api.http.get(path + "/items?order=asc").json() == whole
    assert api.http.get(f"{path}/items/{more.data[0].id}").status_code == 404
    check("DeletedConversationResource", json.loads(client.conversations.delete(made.id).to_json()))
    for gone in (path, path + "/items", f"{path}/items/{whole['data'][0]['id']}"):
        assert api.http.get(gone).status_code == 404


def test_a_response_reads_its_conversation_and_adds_to_it(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("who", {"text": "You are Ada."}), rule("sure", {"text": "Yes."}))
    kept = client.conversations.create(items=SAID)  # type: ignore[arg-type]
    first = client.responses.create(model="agent/clerk", input="who am I?", conversation=kept.id)
    check("Response", json.loads(first.to_json()))
    assert first.conversation is not None and first.conversation.id == kept.id
    assert "My name is Ada." in json.dumps(models.calls[-1]["input"])
    client.responses.create(
        model="agent/clerk", input="sure?", conversation={"id": kept.id}, stream=False
    )
    texts = [
        item.content[0].text  # type: ignore[union-attr]
        for item in client.conversations.items.list(kept.id, order="asc")
        if item.type == "message"
    ]
    assert texts == ["My name is Ada.", "Hello.", "who am I?", "You are Ada.", "sure?", "Yes."]
    session = api.http.get(f"/api/v1/sessions/{kept.id}").json()
    assert session["item_count"] == 8


def test_a_call_for_the_client_waits_in_its_conversation(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(
        rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}),
    )
    kept = client.conversations.create()
    tools: Any = [WEATHER]
    asked = client.responses.create(
        model="agent/clerk", input="weather", conversation=kept.id, tools=tools
    )
    [call] = [item for item in asked.output if item.type == "function_call"]
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        client.responses.create(model="agent/clerk", input="hello", conversation=kept.id)
    told = client.responses.create(
        model="agent/clerk",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
        conversation=kept.id,
        tools=tools,
    )
    assert told.output_text == "Sunny."


def test_items_added_at_once_are_all_there_in_one_order(api: Api, client: openai.OpenAI) -> None:
    kept = client.conversations.create()

    def add(number: int) -> None:
        body = {"items": [{"role": "user", "content": f"{number}.{n}"} for n in range(3)]}
        path = f"/v1/conversations/{kept.id}/items"
        assert api.http.post(path, json=body).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    items = list(client.conversations.items.list(kept.id, order="asc", limit=7))
    said = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert sorted(said) == sorted(f"{number}.{n}" for number in range(16) for n in range(3))
    for number in range(16):
        at = said.index(f"{number}.0")
        assert said[at : at + 3] == [f"{number}.{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "", {"items": [{"role": "user", "content": "x"}] * 21}, 400, "items"),
        ("POST", "", {"items": [{"role": "robot", "content": "x"}]}, 400, "items[0].role"),
        ("POST", "", {"items": [{"type": "computer_call"}]}, 400, "items[0].type"),
        ("POST", "", {"metadata": {"a" * 65: "b"}}, 400, "metadata"),
        ("POST", "", {"wibble": 1}, 400, "wibble"),
        ("GET", "/conv_" + "0" * 32, None, 404, None),
        ("POST", "/conv_" + "0" * 32, {"metadata": {}}, 404, None),
        ("POST", "/conv_" + "0" * 32 + "/items", {"items": [SAID[0]]}, 404, None),
        ("DELETE", "/nothing", None, 404, None),
    ],
)
def test_what_is_wrong_is_refused_in_openais_form(
    api: Api, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = api.http.request(method, "/v1/conversations" + path, json=body)
    assert answer.status_code == status, answer.text
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"] == param


def test_the_history_is_one_thing(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(rule("hi", {"text": "hi"}))
    kept = client.conversations.create()
    first = client.responses.create(model="agent/clerk", input="hi", conversation=kept.id)
    with pytest.raises(openai.BadRequestError, match="not both"):
        client.responses.create(
            model="agent/clerk", input="hi", conversation=kept.id, previous_response_id=first.id
        )
    with pytest.raises(openai.BadRequestError, match="belongs to a conversation"):
        client.responses.create(model="agent/clerk", input="hi", previous_response_id=first.id)
