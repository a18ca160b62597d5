"""A definition's text: every value is JSON and knows its line; what is not JSON is refused."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from agent_server.domain.errors import InvalidWorkflow
from agent_server.workflow.source import read_source

TEXT = """\
name: w
nodes:
  - id: a
    type: tool
    retry: {on: [tool_error], max_attempts: 2}
  - {id: b, type: set,
     variables: {x: yes, day: 2026-01-01, n: 1_000, big: 1e3, none: ~}}
"""

_LOOKS_LIKE_A_NUMBER = re.compile(r"[-+.0-9][-+.0-9eE]*")
"""Perhaps a number in YAML 1.2 and a text in 1.1, which the library writes."""

scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20)
values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


def test_yaml_is_read_as_json_and_every_place_knows_its_line() -> None:
    source = read_source(TEXT)
    assert source.data["nodes"][0]["retry"] == {"on": ["tool_error"], "max_attempts": 2}
    assert source.data["nodes"][1]["variables"] == {
        "x": "yes",
        "day": "2026-01-01",
        "n": "1_000",
        "big": 1000.0,
        "none": None,
    }
    lines = {"/name": 1, "/nodes/0/retry/on/0": 5, "/nodes/1": 6, "/nodes/1/variables/x": 7}
    assert {path: source.lines[path] for path in lines} == lines


@given(st.dictionaries(st.text(max_size=8), values), st.sampled_from([None, 2, "\t"]))
def test_json_is_read_as_it_is_however_it_is_indented(data: dict[str, Any], indent: Any) -> None:
    assert read_source(json.dumps(data, indent=indent)).data == data


@given(st.dictionaries(st.text(max_size=8), values))
def test_yaml_that_a_library_wrote_is_read_as_it_was(data: dict[str, Any]) -> None:
    assume(not any(_LOOKS_LIKE_A_NUMBER.fullmatch(text) for text in _texts(data)))
    assert read_source(yaml.safe_dump(data)).data == data


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, (dict, list)):
        for part in data:
            yield from _texts(part)
            if isinstance(data, dict):
                yield from _texts(data[part])


def test_a_place_that_is_missing_has_the_line_of_what_is_around_it() -> None:
    source = read_source(TEXT)
    assert source.line_of("/nodes/1/variables/y/z") == 7
    assert source.line_of("/output") == 1


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("name: w\nnodes: [\n  }\n", 3, "neither YAML nor JSON"),
        ("name: w\nname: x\n", 2, "'name' stands there twice"),
        ("name: !!python/object:os.system x\n", 1, "tag"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("? [1]\n: 2\n", 1, "a key must be a text"),
        ("a: *nobody\n", 1, "nobody"),
        ("- a\n", 1, "list, not an object"),
        ("", 1, "empty"),
        ("a: 1e999\n", 1, "too large"),
        ('{"a": 1,\n"a": 2}', 2, "twice"),
        ('{"a": NaN, "b": [}', 1, "neither YAML nor JSON"),
        ("a: \x00\n", None, "neither YAML nor JSON"),
        ("a:\n\t- b\n", 2, "neither YAML nor JSON"),
    ],
)
def test_what_is_not_one_json_object_is_refused_with_its_line(
    text: str, line: int | None, said: str
) -> None:
    with pytest.raises(InvalidWorkflow) as refused:
        read_source(text)
    assert said in refused.value.detail
    assert refused.value.errors[0].line == line


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000,
        "a: " + "{b: " * 100_000,
        "- " * 100_000,
        "a: &a [x, x]\n"
        + "".join(
            f"b{n}: &b{n} [*{p}, *{p}]\n"
            for n, p in enumerate(["a", *(f"b{n}" for n in range(60))])
        ),
        "a: &a [*a]\n",
    ],
    ids=["flow", "objects", "blocks", "laughs", "itself"],
)
def test_a_text_that_would_explode_is_refused_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidWorkflow):
        read_source(text)
    assert time.process_time() - started < 5
