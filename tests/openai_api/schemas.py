"""OpenAI's published schemas, to hold answers and events against.

``fixtures/openai_schemas.json`` says where they are from and under which licence.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

_DOCUMENT = json.loads((Path(__file__).parent / "fixtures" / "openai_schemas.json").read_text())
_SCHEMAS: dict[str, Any] = _DOCUMENT["components"]["schemas"]
KEYS = frozenset(
    "id object created_at completed_at status incomplete_details model previous_response_id "
    "instructions output error tools tool_choice truncation parallel_tool_calls text top_p "
    "presence_penalty frequency_penalty top_logprobs temperature reasoning usage "
    "max_output_tokens max_tool_calls store background service_tier metadata safety_identifier "
    "prompt_cache_key".split()
)
"""What Open Responses wants on each response, but for ``user``."""


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({**_DOCUMENT, "$ref": f"#/components/schemas/{name}"})


def check(name: str, value: Any) -> None:
    """Fail unless ``value`` is what OpenAI says a ``name`` is."""
    faults = [f"{e.json_path}: {e.message[:300]}" for e in _validator(name).iter_errors(value)]
    assert not faults, (name, faults[:5], value)
    if name == "Response":
        assert set(value) >= KEYS, KEYS - set(value)


@cache
def _event_names() -> dict[str, str]:
    found = {}
    for branch in _SCHEMAS["ResponseStreamEvent"]["anyOf"]:
        name = branch["$ref"].rpartition("/")[2]
        for kind in _SCHEMAS[name]["properties"]["type"]["enum"]:
            found[kind] = name
    return found


def check_events(events: list[dict[str, Any]]) -> None:
    """Each is what OpenAI says, they are numbered from 0 without a gap, and the last ends all."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        check(_event_names()[event["type"]], event)
        if "response" in event:
            assert set(event["response"]) >= KEYS
    ends = {"response.completed", "response.failed", "response.incomplete"}
    assert [e["type"] in ends for e in events] == [False] * (len(events) - 1) + [True]
