"""Each parameter of the published requests is honoured or refused, and the docs say which."""

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai.types import embedding_create_params, file_create_params, file_list_params
from openai.types.chat import completion_create_params
from openai.types.conversations import (
    conversation_create_params,
    conversation_update_params,
    item_create_params,
    item_list_params,
)
from openai.types.responses import (
    input_item_list_params,
    input_token_count_params,
    response_compact_params,
    response_create_params,
    response_retrieve_params,
    responses_client_event_param,
)

from tests.e2e.kit import Api, House
from tests.openai_api.schemas import check
from tests.openai_api.test_socket import ask, connected, events_of
from tests.support.model_thread import ModelThread, calling, rule

DOCS = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
ASKED: dict[str, dict[str, Any]] = {
    "/v1/responses": {"model": "agent/clerk", "input": "hi"},
    "/v1/responses/compact": {"model": "agent/clerk", "input": "hi"},
    "/v1/responses/input_tokens": {"model": "agent/clerk", "input": "hi"},
    "/v1/chat/completions": {
        "model": "agent/clerk",
        "messages": [{"role": "user", "content": "hi"}],
    },
}
PUBLISHED = {
    "/v1/responses": (
        response_create_params.ResponseCreateParamsBase,
        responses_client_event_param.ResponseCreate,
    ),
    "/v1/responses/compact": (response_compact_params.ResponseCompactParams,),
    "/v1/responses/input_tokens": (input_token_count_params.InputTokenCountParams,),
    "/v1/chat/completions": (completion_create_params.CompletionCreateParamsBase,),
}
ROW = re.compile(r"^\| `(\w+)` \| (yes|some|hint|no) \|", re.MULTILINE)
SOCKET_ALONE = {"generate", "stream_id"}
REFUSED_VALUES: dict[str, Any] = {
    "include": ["message.output_text.logprobs"],
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "truncation": "sometimes",
    "service_tier": "flex",
    "stream_options": {"include_obfuscation": True},
    "tool_choice": {"type": "web_search_preview"},
    "tools": [{"type": "web_search"}],
    "top_logprobs": 3,
    "logprobs": True,
    "modalities": ["text", "audio"],
    "n": 2,
}
"""A value that is refused, of each parameter of which only some values are honoured."""


def table(path: str) -> dict[str, str]:
    """What the docs say of each parameter of ``path``."""
    for section in DOCS.split("\n### "):
        if section.startswith(f"`POST {path}`"):
            return dict(ROW.findall(section))
    raise AssertionError(path)


@pytest.mark.parametrize("path", PUBLISHED)
def test_the_docs_account_for_every_published_parameter(path: str) -> None:
    published = {key for params in PUBLISHED[path] for key in params.__annotations__}
    published -= {"type"}
    told = set(table(path))
    assert published - told == set()
    beyond = {"multi_agent", "frequency_penalty", "presence_penalty", "stream"}
    assert told - published <= beyond


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in PUBLISHED for name, kind in table(path).items() if kind == "no"],
)
def test_what_the_docs_call_refused_is_refused_by_its_name(api: Api, path: str, name: str) -> None:
    for value in ({"type": "x"}, "x", ["x"], 1):
        answer = api.http.post(path, json={**ASKED[path], name: value})
        assert answer.status_code == 400, (value, answer.text)
        check("ErrorResponse", answer.json())
        assert answer.json()["error"]["param"] == name
        assert "not supported" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in PUBLISHED for name, kind in table(path).items() if kind == "some"],
)
def test_of_what_is_honoured_in_part_the_rest_is_refused(api: Api, path: str, name: str) -> None:
    body = {**ASKED[path], "stream": True} if name == "stream_options" else ASKED[path]
    answer = api.http.post(path, json={**body, name: REFUSED_VALUES[name]})
    assert answer.status_code == 400, answer.text
    check("ErrorResponse", answer.json())
    assert answer.json()["error"]["param"].startswith(name)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (
            {"tools": [{"type": "function", "name": "f", "defer_loading": True}]},
            "tools[0].defer_loading",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}, "grammar": "x"}}},
            "text.format.grammar",
        ),
        ({"reasoning": {"depth": 1}}, "reasoning.depth"),
        ({"stream_options": {"wibble": 1}}, "stream_options.wibble"),
    ],
)
def test_what_is_unknown_within_a_parameter_is_refused_too(
    api: Api, change: dict[str, Any], param: str
) -> None:
    answer = api.http.post("/v1/responses", json={**ASKED["/v1/responses"], **change})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_smaller_calls_take_what_is_published() -> None:
    section = DOCS.split("### The rest")[1]
    for params in (
        response_retrieve_params.ResponseRetrieveParamsBase,
        input_item_list_params.InputItemListParams,
        item_list_params.ItemListParams,
        conversation_create_params.ConversationCreateParams,
        conversation_update_params.ConversationUpdateParams,
        item_create_params.ItemCreateParams,
        file_create_params.FileCreateParams,
        file_list_params.FileListParams,
        embedding_create_params.EmbeddingCreateParams,
    ):
        for name in params.__annotations__:
            assert f"`{name}`" in section, (params.__name__, name)


def rows(house: House) -> dict[str, int]:
    """How many rows each table of the server has."""
    path = next((house.folder / "data").glob("*.db"))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as found:
        tables = [
            name
            for (name,) in found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if name not in ("nodes", "sqlite_sequence") and not name.startswith("memory_")
        ]
        return {
            name: found.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables
        }


def test_what_is_not_stored_leaves_no_row_in_any_table(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(rule("hi", {"text": "hi"}), rule("Summarise", {"text": "hi was said"}))
    api.http.post("/v1/responses", json=ASKED["/v1/responses"])
    before = rows(house)
    assert before["runs"] > 0
    unstored = {**ASKED["/v1/responses"], "store": False}
    for body in (unstored, {**unstored, "stream": True}):
        answer = api.http.post("/v1/responses", json=body)
        assert answer.status_code == 200 and "hi" in answer.text
    for stream in (False, True):
        body = {**ASKED["/v1/chat/completions"], "stream": stream}
        assert api.http.post("/v1/chat/completions", json=body).status_code == 200
    compacted = api.http.post("/v1/responses/compact", json=ASKED["/v1/responses/compact"])
    assert compacted.status_code == 200, compacted.text
    with connected(api) as socket:
        ask(socket, input="hi", store=False)
        assert json.dumps(events_of(socket)[-1]).count("hi")
    assert rows(house) == before


def test_the_examples_of_the_page_work(api: Api, models: ModelThread) -> None:
    task = {"id": "a", "description": "compare", "agent": "clerk", "depends_on": []}
    plan = json.dumps({"tasks": [task], "actions": []})
    models.script(
        rule("Weather in", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}),
        rule("databases", {"text": plan}),
        rule("Count", {"tokens": 3}),
        rule("Who", {"text": "Ada."}),
    )
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.+?)```", DOCS, re.S):
        example = example.replace("http://localhost:8000", api.url)
        example = example.replace("the server's key", "key-of-the-tests")
        exec(example.replace("agent/assistant", "agent/clerk"), names)
    assert names["told"].output_text == "Sunny." and names["again"].output_text == "Ada."
    assert api.ended("run_" + names["long"].id.removeprefix("resp_"))["ended_at"]
