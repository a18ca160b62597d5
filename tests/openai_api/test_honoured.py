"""What the docs call honoured is: each parameter changes what the model is asked, or the answer.

A case is a value and what shows that it counted, or the test that shows it. The tables are held to
be whole: a parameter that gets a row in the docs needs a case here.
"""

import importlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from tests.e2e.kit import Api, House
from tests.openai_api.schemas import check, check_events
from tests.openai_api.test_chat import FUNCTION
from tests.openai_api.test_parameters import ASKED, PUBLISHED, table
from tests.openai_api.test_responses import WEATHER, streamed
from tests.support.model_thread import ModelThread, calling, rule

Json = dict[str, Any]
Shows = Callable[[Json, Json], bool]
"""Whether a value counted, by what the model was asked and by the answer."""
FORM: Json = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
CHAT_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TEXTS: Any = lambda answer: answer["output"][0]["content"][0]  # noqa: E731

CASES: dict[str, dict[str, tuple[Json, Shows] | str]] = {
    "/v1/responses": {
        "background": "test_responses.test_a_response_in_the_background_is_read_followed_cancelled_"
        "and_deleted",
        "conversation": "test_conversations.test_a_response_reads_its_conversation_and_adds_to_it",
        "frequency_penalty": ({"frequency_penalty": 0}, lambda sent, got: got["temperature"] == 1),
        "generate": "test_socket.test_a_prepared_input_is_answered_later",
        "include": "test_honoured.test_reasoning_comes_with_its_encrypted_content_which_is_null",
        "input": ({"input": "hi you"}, lambda sent, got: "hi you" in str(sent["input"])),
        "instructions": (
            {"instructions": "Be kind."},
            lambda sent, got: sent["instructions"] == "You are a clerk.\n\nBe kind."
            and got["instructions"] == "Be kind.",
        ),
        "max_output_tokens": (
            {"max_output_tokens": 50},
            lambda sent, got: sent["max_output_tokens"] == got["max_output_tokens"] == 50,
        ),
        "max_tool_calls": "test_honoured.test_a_ceiling_of_tool_calls_holds",
        "metadata": ({"metadata": {"a": "b"}}, lambda sent, got: got["metadata"] == {"a": "b"}),
        "model": "test_responses.test_models_are_agents_workflows_and_goals",
        "parallel_tool_calls": (
            {"parallel_tool_calls": False},
            lambda sent, got: sent["parallel_tool_calls"] is got["parallel_tool_calls"] is False,
        ),
        "presence_penalty": ({"presence_penalty": 0}, lambda sent, got: got["temperature"] == 1),
        "previous_response_id": "test_responses.test_a_tool_of_the_client_is_asked_for_and_its_"
        "output_continues_the_answer",
        "prompt_cache_key": (
            {"prompt_cache_key": "k"},
            lambda sent, got: got["prompt_cache_key"] == "k",
        ),
        "reasoning": (
            {"reasoning": {"effort": "low", "summary": "auto"}},
            lambda sent, got: sent["reasoning"] == got["reasoning"]
            and got["reasoning"] == {"effort": "low", "summary": "auto"},
        ),
        "safety_identifier": "test_honoured.test_who_the_data_is_about_is_the_runs_subject",
        "service_tier": (
            {"service_tier": "auto"},
            lambda sent, got: got["service_tier"] == "default",
        ),
        "store": "test_responses.test_a_response_has_every_key_and_fits_the_published_schema",
        "stream": "test_responses.test_events_come_in_their_order_with_numbers_without_gaps",
        "stream_id": "test_socket.test_lanes_go_side_by_side_and_each_in_order",
        "stream_options": "test_honoured.test_nothing_obscures_the_length_of_deltas",
        "temperature": (
            {"temperature": 0.5},
            lambda sent, got: sent["temperature"] == got["temperature"] == 0.5,
        ),
        "text": (
            {"text": {"verbosity": "low", "format": FORM}},
            lambda sent, got: (sent["text"]["verbosity"], got["text"]["verbosity"])
            == ("low", "low")
            and sent["text"]["format"]["schema"] == {"type": "object"}
            and TEXTS(got)["text"] == "{}",
        ),
        "tool_choice": (
            {"tools": [WEATHER], "tool_choice": "required"},
            lambda sent, got: sent["tool_choice"] == got["tool_choice"] == "required",
        ),
        "tools": (
            {"tools": [WEATHER]},
            lambda sent, got: [tool["name"] for tool in sent["tools"]] == ["add", "get_weather"]
            and [tool["name"] for tool in got["tools"]] == ["get_weather"],
        ),
        "top_logprobs": (
            {"top_logprobs": 0},
            lambda sent, got: got["top_logprobs"] == 0 and TEXTS(got)["logprobs"] == [],
        ),
        "top_p": ({"top_p": 0.5}, lambda sent, got: sent["top_p"] == got["top_p"] == 0.5),
        "truncation": (
            {"truncation": "auto"},
            lambda sent, got: sent["truncation"] == got["truncation"] == "auto",
        ),
        "user": "test_honoured.test_who_the_data_is_about_is_the_runs_subject",
    },
    "/v1/responses/compact": {
        "input": ({"input": "hi you"}, lambda sent, got: "hi you" in str(sent["input"])),
        "instructions": (
            {"instructions": "Be kind."},
            lambda sent, got: sent["instructions"].endswith("Be kind."),
        ),
        "model": ({}, lambda sent, got: sent["model"] == "test-model"),
        "previous_response_id": "test_responses.test_a_history_is_compacted_and_goes_on",
        "prompt_cache_key": ({"prompt_cache_key": "k"}, lambda sent, got: bool(got["output"])),
        "service_tier": ({"service_tier": "default"}, lambda sent, got: bool(got["output"])),
    },
    "/v1/chat/completions": {
        "frequency_penalty": ({"frequency_penalty": 0}, lambda sent, got: bool(got["choices"])),
        "logprobs": (
            {"logprobs": False},
            lambda sent, got: got["choices"][0]["logprobs"] is None,
        ),
        "max_completion_tokens": (
            {"max_completion_tokens": 50},
            lambda sent, got: sent["max_output_tokens"] == 50,
        ),
        "max_tokens": ({"max_tokens": 50}, lambda sent, got: sent["max_output_tokens"] == 50),
        "messages": "test_chat.test_an_answer_and_a_refusal_come_back_whole",
        "metadata": "test_honoured.test_who_the_data_is_about_is_the_runs_subject",
        "modalities": ({"modalities": ["text"]}, lambda sent, got: bool(got["choices"])),
        "model": ({}, lambda sent, got: got["model"] == "agent/clerk"),
        "n": ({"n": 1}, lambda sent, got: len(got["choices"]) == 1),
        "parallel_tool_calls": (
            {"parallel_tool_calls": False},
            lambda sent, got: sent["parallel_tool_calls"] is False,
        ),
        "presence_penalty": ({"presence_penalty": 0}, lambda sent, got: bool(got["choices"])),
        "prompt_cache_key": ({"prompt_cache_key": "k"}, lambda sent, got: bool(got["choices"])),
        "reasoning_effort": (
            {"reasoning_effort": "low"},
            lambda sent, got: sent["reasoning"]["effort"] == "low",
        ),
        "response_format": (
            {"response_format": CHAT_FORM},
            lambda sent, got: sent["text"]["format"]["schema"] == {"type": "object"}
            and got["choices"][0]["message"]["content"] == "{}",
        ),
        "safety_identifier": "test_honoured.test_who_the_data_is_about_is_the_runs_subject",
        "service_tier": (
            {"service_tier": "auto"},
            lambda sent, got: got["service_tier"] == "default",
        ),
        "store": "test_honoured.test_who_the_data_is_about_is_the_runs_subject",
        "stream": "test_chat.test_chunks_end_with_the_usage_and_done",
        "stream_options": "test_chat.test_chunks_end_with_the_usage_and_done",
        "temperature": ({"temperature": 0.5}, lambda sent, got: sent["temperature"] == 0.5),
        "tool_choice": (
            {"tools": [FUNCTION], "tool_choice": "required"},
            lambda sent, got: sent["tool_choice"] == "required",
        ),
        "tools": (
            {"tools": [FUNCTION]},
            lambda sent, got: [tool["name"] for tool in sent["tools"]] == ["add", "get_weather"],
        ),
        "top_logprobs": (
            {"top_logprobs": 0},
            lambda sent, got: got["choices"][0]["logprobs"] is None,
        ),
        "top_p": ({"top_p": 0.5}, lambda sent, got: sent["top_p"] == 0.5),
        "user": "test_honoured.test_who_the_data_is_about_is_the_runs_subject",
        "verbosity": (
            {"verbosity": "low"},
            lambda sent, got: sent["text"]["verbosity"] == "low",
        ),
    },
}
COUNTED = "/v1/responses/input_tokens"
"""Shown by ``test_input_tokens``: what is sent there to be counted is what a response sends."""


@pytest.mark.parametrize("path", [path for path in PUBLISHED if path != COUNTED])
def test_whatever_the_docs_call_honoured_has_its_case(path: str) -> None:
    honoured = {name for name, kind in table(path).items() if kind != "no"}
    assert honoured == set(CASES[path])
    for case in CASES[path].values():
        if isinstance(case, str):
            module, _, name = case.partition(".")
            assert callable(getattr(importlib.import_module(f"tests.openai_api.{module}"), name))


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in CASES for name, case in CASES[path].items() if type(case) is tuple],
)
def test_it_changes_what_the_model_is_asked_or_the_answer(
    api: Api, models: ModelThread, path: str, name: str
) -> None:
    case = CASES[path][name]
    assert not isinstance(case, str)
    more, shows = case
    models.script(rule("hi|Summarise", {"text": "{}"}))
    answer = api.http.post(path, json={**ASKED[path], **more})
    assert answer.status_code == 200, answer.text
    assert shows(models.calls[0], answer.json()), (models.calls[0], answer.json())


def subjects(house: House) -> list[Json]:
    """What the newest stored runs were asked with, the newest first."""
    [path] = (house.folder / "data").glob("*.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as found:
        rows = found.execute("SELECT request FROM runs ORDER BY created_at DESC, id DESC LIMIT 4")
        return [json.loads(request) for (request,) in rows]


def test_who_the_data_is_about_is_the_runs_subject(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(rule("hi", {"text": "hi"}))
    for path, body in ASKED.items():
        if path.endswith(("responses", "completions")):
            for who in ({"user": "ann"}, {"user": "ann", "safety_identifier": "bob"}):
                stored = {**body, **who, "store": True, "metadata": {"a": "b"}}
                answer = api.http.post(path, json=stored)
                assert answer.status_code == 200, answer.text
    found = subjects(house)
    assert [one["subject"] for one in found] == ["bob", "ann", "bob", "ann"]
    assert all(one["metadata"] == {"a": "b"} for one in found)


def test_a_ceiling_of_tool_calls_holds(api: Api, models: ModelThread) -> None:
    adding = calling(("add", {"a": 1, "b": 2}))
    models.script(rule("sum", adding, adding, {"text": "3"}))
    body = {"model": "agent/clerk", "input": "sum"}
    assert api.http.post("/v1/responses", json=body).json()["status"] == "completed"
    failed = api.http.post("/v1/responses", json={**body, "max_tool_calls": 1}).json()
    check("Response", failed)
    assert failed["status"] == "failed" and "max_tool_calls" in failed["error"]["message"]


def test_reasoning_comes_with_its_encrypted_content_which_is_null(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("sum", calling(("add", {"a": 1, "b": 2})), {"text": "3"}))
    body = {
        "model": "agent/clerk",
        "input": "sum",
        "include": ["reasoning.encrypted_content", "message.input_image.image_url"],
    }
    response = api.http.post("/v1/responses", json=body).json()
    check("Response", response)
    assert response["output"][0]["type"] == "reasoning"
    assert response["output"][0]["encrypted_content"] is None
    path = f"/v1/responses/{response['id']}"
    wanted = "include[]=reasoning.encrypted_content&include=file_search_call.results"
    assert api.http.get(f"{path}?{wanted}").json() == response
    assert api.http.get(f"{path}/input_items?{wanted}").status_code == 200
    for place in (path, path + "/input_items"):
        answer = api.http.get(place + "?include=message.output_text.logprobs")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "include"


def test_nothing_obscures_the_length_of_deltas(api: Api, models: ModelThread) -> None:
    models.script(rule("hi", {"tokens": 2}))
    body = {**ASKED["/v1/responses"], "stream_options": {"include_obfuscation": False}}
    events = streamed(api, body)
    check_events(events)
    assert not any("obfuscation" in event for event in events)
    answer = api.http.post("/v1/responses", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_options"


@pytest.mark.parametrize("store", [True, False])
def test_an_answer_cut_off_is_incomplete_and_says_why(
    api: Api, models: ModelThread, store: bool
) -> None:
    for reason in ("max_output_tokens", "content_filter"):
        cut = {"text": "Once", "ended": "incomplete", "incomplete_details": {"reason": reason}}
        models.script(rule("story", cut))
        body = {"model": "agent/clerk", "input": "story", "max_output_tokens": 16, "store": store}
        whole = api.http.post("/v1/responses", json=body).json()
        events = streamed(api, body)
        check_events(events)
        assert events[-1]["type"] == "response.incomplete"
        for response in (whole, events[-1]["response"]):
            check("Response", response)
            assert response["status"] == "incomplete"
            assert response["incomplete_details"] == {"reason": reason}
            [item] = response["output"]
            assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Once")
            if store:
                assert api.http.get(f"/v1/responses/{response['id']}").json() == response
    chat = {"model": "agent/clerk", "messages": [{"role": "user", "content": "story"}]}
    models.script(rule("story", {**cut, "incomplete_details": {"reason": "max_output_tokens"}}))
    answer = api.http.post("/v1/chat/completions", json={**chat, "max_tokens": 16, "store": store})
    check("CreateChatCompletionResponse", answer.json())
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_the_input_of_a_response_is_listed_in_pages(api: Api, models: ModelThread) -> None:
    models.script(rule("7", {"text": "seven"}))
    said = [{"role": "user", "content": str(number)} for number in range(8)]
    response = api.http.post("/v1/responses", json={"model": "agent/clerk", "input": said}).json()
    path = f"/v1/responses/{response['id']}/input_items"

    def page(**query: Any) -> Json:
        found: Json = api.http.get(path, params=query).json()
        check("ResponseItemList", found)
        assert (found["first_id"], found["last_id"]) == (
            (found["data"][0]["id"], found["data"][-1]["id"]) if found["data"] else ("", "")
        )
        return found

    def texts(found: Json) -> str:
        return "".join(item["content"][0]["text"] for item in found["data"])

    assert texts(page()) == "76543210" and texts(page(order="asc")) == "01234567"
    for order in ("asc", "desc"):
        pages, after = [], {}
        while not pages or pages[-1]["has_more"]:
            pages.append(page(limit=3, order=order, **after))
            after = {"after": pages[-1]["last_id"]}
        assert [len(one["data"]) for one in pages] == [3, 3, 2]
        assert "".join(map(texts, pages)) == texts(page(order=order))
        assert page(limit=3, order=order, **after)["data"] == []
    refused = {"after": "msg_nothing", "limit": 0, "order": "up", "before": "x"}
    for name, value in refused.items():
        answer = api.http.get(path, params={name: value})
        assert answer.status_code == 400, (name, answer.text)
        check("ErrorResponse", answer.json())
        assert answer.json()["error"]["param"] == name
    assert api.http.get(path, params={"limit": 101}).status_code == 400


def test_images_and_files_are_passed_on_and_listed_as_they_were_sent(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("look", {"text": "A dot."}))
    parts = [
        {"type": "input_text", "text": "look"},
        {"type": "input_image", "image_url": "https://example.org/a.png", "detail": "high"},
        {"type": "input_file", "file_url": "https://example.org/a.pdf"},
        {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,eA=="},
    ]
    said = [{"role": "user", "content": parts}]
    response = api.http.post("/v1/responses", json={"model": "agent/clerk", "input": said}).json()
    assert TEXTS(response)["text"] == "A dot."
    assert models.calls[-1]["input"][-1]["content"] == parts
    listed = api.http.get(f"/v1/responses/{response['id']}/input_items").json()
    check("ResponseItemList", listed)
    assert listed["data"][0]["content"] == parts


def test_what_one_request_sets_brings_nothing_else_along(api: Api, models: ModelThread) -> None:
    """An agent that sets nothing has the settings of the SDK's own model, which others refuse."""
    models.script(rule("hi", {"text": "hi"}))
    api.http.post("/v1/responses", json={**ASKED["/v1/responses"], "temperature": 0.5})
    [sent] = models.calls
    assert sent["temperature"] == 0.5 and not {"reasoning", "text"} & set(sent)
