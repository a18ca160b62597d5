"""The built-in tools, and what must not get through the calculator."""

import time
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_server.domain.agents import ToolEffect
from agent_server.registry.builtin_tools import BUILTIN_TOOLS, calculate, count_text, time_in

from .conftest import MakeRegistry


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3 / 2", "4.5"),
        ("2 ** 10", "1024"),
        ("2^10", "1024"),
        ("-7 // 2 + 7 % 4", "-1"),
        ("sqrt(16) + min(3, 1, 2) + max([4, 5]) + abs(-1)", "11"),
        ("round(3.14159, 2) + sum(1, 2, 3) + sum([1, 2])", "12.14"),
        ("10 / 2", "5"),
        ("round(2.6)", "3"),
        ("floor(pi) + ceil(e)", "6"),
        ("2 ** -1", "0.5"),
        ("10 ** 30", "1" + "0" * 30),
    ],
)
def test_the_calculator_computes(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("9**9**9", "too large"),
        ("9**9**9**9", "too large"),
        ("(10**900)*(10**900)", "too large"),
        ("(-2)**0.5", "not a real number"),
        ("1e999", "no finite value"),
        ("1e308*10", "no finite value"),
        ("exp(1e9)", "too large"),
        ("10**900 / 3.0", "too large"),
        ("1/0", "divides by zero"),
        ("0**-1", "divides by zero"),
        ("__import__('os').system('id')", "not arithmetic"),
        ("().__class__.__bases__", "not arithmetic"),
        ("(lambda: 1)()", "not arithmetic"),
        ("[x for x in (1,)]", "not arithmetic"),
        ("'a' * 1000000000", "not arithmetic"),
        ("True + 1", "not arithmetic"),
        ("open('x')", "not arithmetic"),
        ("max(*[1, 2])", "not arithmetic"),
        ("round(1, ndigits=2)", "not arithmetic"),
        ("1 << 1000000", "not arithmetic"),
        ("1 if 1 else 2", "not arithmetic"),
        ("1 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("sqrt(-1)", "no value"),
        ("sqrt(1, 2)", "cannot take"),
        ("round(1.5, 10**9)", "no value"),
        ("max()", "no value"),
        ("1" * 501, "at most 500"),
        ("-" * 499 + "1", ""),
        ("(" * 200 + "1" + ")" * 200, ""),
        ("1\x00", "not an arithmetic expression"),
    ],
)
def test_the_calculator_refuses_at_once_and_says_why(expression: str, says: str) -> None:
    began = time.monotonic()
    try:
        calculate(expression)
    except ValueError as error:
        assert says in str(error)
    else:
        assert says == ""
    assert time.monotonic() - began < 1


@given(st.text(alphabet="0123456789+-*/%().,e^ sqrtminax[]", max_size=60))
def test_the_calculator_answers_or_raises_value_error_for_any_text(expression: str) -> None:
    try:
        assert isinstance(calculate(expression), str)
    except ValueError as error:
        assert str(error)


def test_the_clock_answers_in_the_zone_that_was_asked_for() -> None:
    assert datetime.fromisoformat(time_in("UTC")).utcoffset() == timedelta(0)
    assert time_in("Asia/Kolkata").endswith("+05:30")


@pytest.mark.parametrize("zone", ["Mars/Phobos", "", "../etc/passwd", "/etc/localtime", "a\x00b"])
def test_the_clock_refuses_a_bad_zone_by_name(zone: str) -> None:
    with pytest.raises(ValueError, match="not a time zone"):
        time_in(zone)


def test_text_statistics_count() -> None:
    found = count_text("The cat sat. The dog didn't! Did it?")
    assert (found["words"], found["sentences"], found["characters"]) == (8, 3, 36)
    assert found["most_common_words"][0] == {"word": "the", "count": 2}
    assert found["average_word_length"] == 3.25
    assert count_text("")["average_word_length"] == 0.0


async def test_built_in_tools_only_read(make: MakeRegistry) -> None:
    catalog = await make().load()
    assert {catalog.effect(tool.name) for tool in BUILTIN_TOOLS} == {ToolEffect.NONE}
