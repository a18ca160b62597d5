"""Bodies of odd shapes are refused in OpenAI's form, and never an error of the server's."""

import itertools
from typing import Any

import pytest

from tests.e2e.kit import Api
from tests.openai_api.schemas import check

ODD: list[Any] = [None, True, -1, 1.5, "", "x", [], [None], ["x"], [[]], [{}], {}, {"type": "x"}]
"""Values that nearly nothing is."""
ODDER: list[Any] = [
    [{"type": 1}],
    [{"role": "user"}],
    [{"role": "user", "content": [None]}],
    [{"role": "user", "content": [{"type": "input_text", "text": 1}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    [{"role": "user", "content": [{"type": "input_image", "file_id": 1}]}],
    [{"role": "assistant", "tool_calls": [1]}],
    [{"role": "assistant", "tool_calls": 1}],
    [{"role": "tool", "content": [1]}],
    [{"type": "function_call", "call_id": 1}],
    [{"type": "function_call_output", "call_id": "c", "output": [1]}],
    [{"type": "function", "name": 1}],
    [{"type": "function", "function": 1}],
    [{"type": "function", "name": "f", "parameters": {"type": 1}}],
    [{"type": "compaction", "encrypted_content": 1}],
    [{"type": "mcp_approval_response", "approval_request_id": 1, "approve": True}],
    [{"type": "item_reference", "id": "msg_" + "0" * 40}],
    {"type": "function", "name": ["x"]},
    {"type": "function", "function": 1},
    {"type": "allowed_tools", "tools": 1},
    {"type": "allowed_tools", "tools": [1]},
    {"type": "json_schema", "json_schema": 1},
    {"type": "json_schema", "schema": 1},
    {"format": {"type": "json_schema", "name": 1, "schema": {}}},
    {"id": 1},
]
CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/responses": (
        {"model": "agent/nobody", "input": "x"},
        (
            "input model tools tool_choice text reasoning metadata include conversation "
            "previous_response_id stream_options user instructions"
        ).split(),
    ),
    "/v1/chat/completions": (
        {"model": "agent/nobody", "messages": [{"role": "user", "content": "x"}]},
        "messages model tools tool_choice response_format metadata stream_options user".split(),
    ),
    "/v1/responses/compact": ({"model": "agent/nobody", "input": "x"}, ("input", "model")),
    "/v1/conversations": ({}, ("items", "metadata")),
    "/v1/embeddings": ({"model": "x", "input": "x"}, ("input", "model", "dimensions")),
}  # type: ignore[assignment]  # lists are sequences of names as well


@pytest.mark.parametrize("path", CALLS)
def test_no_odd_value_is_an_error_of_the_servers(api: Api, path: str) -> None:
    body, names = CALLS[path]
    for name, value in itertools.product(names, ODD + ODDER):
        answer = api.http.post(path, json={**body, name: value})
        assert answer.status_code < 500, (name, value, answer.text)
        if answer.status_code >= 400:
            check("ErrorResponse", answer.json())
    for odd in ODD:
        answer = api.http.post(path, json=odd)
        assert answer.status_code < 500, (odd, answer.text)
