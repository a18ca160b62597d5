"""Prices come from the list that is installed, and are never invented."""

from decimal import Decimal

import genai_prices
import pytest

from agent_server.inference.models import make_usage
from agent_server.inference.prices import cost_usd


@pytest.mark.parametrize(
    "model", ["gpt-5.2", "gpt-4.1-mini", "claude-sonnet-4-5", "gemini-2.5-pro", "gpt-4o"]
)
@pytest.mark.parametrize(("taken", "cached"), [(1000, 0), (1000, 400), (300_000, 100)])
def test_the_price_is_the_one_of_the_list(model: str, taken: int, cached: int) -> None:
    listed = genai_prices.calc_price(
        genai_prices.Usage(input_tokens=taken, output_tokens=70, cache_read_tokens=cached or None),
        model,
    )
    assert cost_usd(model, make_usage(taken, 70, cached=cached)) == listed.total_price


def test_a_price_that_is_not_known_is_none_and_never_zero() -> None:
    for model in ("demo", "no-such-model", "", "litellm/nowhere/nothing"):
        assert cost_usd(model, make_usage(10, 10)) is None
    assert cost_usd("gpt-5.2", make_usage(0, 0)) is None


def test_an_adapters_prefix_does_not_hide_the_price() -> None:
    plain = cost_usd("claude-sonnet-4-5", make_usage(100, 10))
    assert isinstance(plain, Decimal)
    assert cost_usd("litellm/anthropic/claude-sonnet-4-5", make_usage(100, 10)) == plain
    assert cost_usd("openai/gpt-5.2", make_usage(9, 9)) == cost_usd("gpt-5.2", make_usage(9, 9))
