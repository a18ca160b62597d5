"""``/v1/responses/input_tokens``: what an agent's model would be asked, counted and not asked."""

from typing import Any

import openai
import pytest

from tests.e2e.kit import Api
from tests.openai_api.conftest import ACMES_KEY
from tests.openai_api.schemas import check
from tests.openai_api.test_responses import WEATHER
from tests.support.model_thread import ModelThread, rule

PATH = "/v1/responses/input_tokens"


def counted(client: openai.OpenAI, said: Any = "hi", **body: Any) -> int:
    found = client.responses.input_tokens.count(model="agent/clerk", input=said, **body)
    assert found.object == "response.input_tokens"
    return found.input_tokens


def test_the_models_provider_counts_what_the_agent_would_ask_it(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("hi", {"text": "hi"}), counts=1234)
    assert counted(client, instructions="Be kind.", tools=[WEATHER]) == 1234
    client.responses.create(
        model="agent/clerk", input="hi", instructions="Be kind.", tools=[WEATHER]  # type: ignore[list-item]
    )
    [asked], [sent] = models.server.counted, models.calls
    assert asked == {name: sent[name] for name in asked}
    assert "Be kind." in asked["instructions"] and len(asked["tools"]) == 2


def test_where_nobody_counts_it_is_an_estimate_that_grows_with_all_that_is_asked(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("hi|long", {"text": "hello"}))
    bare = counted(client)
    assert bare > 10, "the agent's own instructions and tools count"
    text = "long " * 400
    form: Any = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    assert counted(client, text) == pytest.approx(bare + 500, abs=5)
    assert counted(client, instructions=text) > bare + 490
    assert counted(client, tools=[WEATHER]) > bare + 20
    assert counted(client, text={"format": form}) > bare
    assert counted(client, [{"role": "user", "content": [image]}]) > bare + 900
    said = client.responses.create(model="agent/clerk", input=text)
    assert counted(client, previous_response_id=said.id) > bare + 500
    items: Any = [{"role": "user", "content": text}]
    kept = client.conversations.create(items=items)
    assert counted(client, conversation=kept.id) > bare + 490
    stranger = {"authorization": f"Bearer {ACMES_KEY}"}
    for theirs in ({"previous_response_id": said.id}, {"conversation": kept.id}):
        body = {"model": "agent/clerk", "input": "hi", **theirs}
        assert api.http.post(PATH, json=body, headers=stranger).status_code == 404
    assert len(models.calls) == 1, "nothing but the response was asked"
    assert len(list(client.conversations.items.list(kept.id))) == 1


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "goal"}, 400, "model"),
        ({"model": "agent/nobody"}, 404, "model"),
        ({"model": "gpt-4o"}, 404, "model"),
        ({"input": None}, 400, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
        ({"conversation": "conv_" + "0" * 32}, 404, None),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"temperature": 0}, 400, "temperature"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    api: Api, change: dict[str, Any], status: int, param: str | None
) -> None:
    answer = api.http.post(PATH, json={"model": "agent/clerk", "input": "hi", **change})
    assert answer.status_code == status, answer.text
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"] == param
