"""What budget a run gets, what is refused at the door, and what a call is guessed to use."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from agents import Agent, ModelSettings
from pydantic import ValidationError

from agent_server.domain.errors import BudgetExceeded, BudgetRefused
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Budget, Limits, ModelPrice, RunRequest
from agent_server.inference.budgets import BudgetRules
from agent_server.inference.estimate import tokens_of
from agent_server.inference.models import make_usage
from agent_server.inference.prices import Prices
from agent_server.testing.journal import memory_context
from tests.support.durable import loop_for, say, settings

PRICED = {"rule": {"input_per_mtok": 1, "output_per_mtok": 2}}


def applied(
    budget: dict[str, Any] | None, models: Sequence[str] = ("rule",), text: str = "hi", **knobs: Any
) -> Budget | None:
    rules = BudgetRules(settings(**knobs), lambda request: models)
    request = RunRequest(agent="a", input=text, budget=None if budget is None else Budget(**budget))
    return rules.apply(request, DEFAULT_TENANT, "me").budget


def test_each_field_comes_from_the_request_the_agent_or_the_default_below_the_most() -> None:
    knobs = settings(
        default_budget={"max_tokens": 500, "max_tool_calls": 9}, max_budget={"max_model_calls": 30}
    )
    rules = BudgetRules(knobs, lambda request: (), of_agent=lambda agent: Budget(max_tool_calls=7))
    request = RunRequest(agent="a", input="x", budget=Budget(max_tokens=100))
    found = rules.apply(request, DEFAULT_TENANT, "me").budget
    assert found == Budget(max_tokens=100, max_tool_calls=7, max_model_calls=30)
    with pytest.raises(BudgetRefused, match="max_model_calls=31 is more than .* allows"):
        asked = RunRequest(agent="a", input="x", budget=Budget(max_model_calls=31))
        rules.apply(asked, DEFAULT_TENANT, "me")


def test_limits_can_differ_by_tenant_and_key_and_the_nearest_says_each_field() -> None:
    of_key = Limits(default=Budget(max_tokens=99), maximum=Budget(max_tokens=500))
    of_tenant = Limits(default=Budget(max_tokens=1, max_tool_calls=3))

    def limits_of(tenant: str, key: str) -> dict[str, Limits]:
        return {"key": of_key, "tenant": of_tenant} if key == "big" else {}

    knobs = settings(max_budget={"max_tokens": 10, "max_model_calls": 7})
    rules = BudgetRules(knobs, lambda request: (), limits_of=limits_of)
    request = RunRequest(agent="a", input="x")
    big = Budget(max_tokens=99, max_tool_calls=3, max_model_calls=7)
    assert rules.apply(request, DEFAULT_TENANT, "big").budget == big
    small = Budget(max_tokens=10, max_model_calls=7)
    assert rules.apply(request, DEFAULT_TENANT, "small").budget == small
    for key, most, where in (("big", 500, "key"), ("small", 10, "AGENT_SERVER_MAX_BUDGET")):
        asked = RunRequest(agent="a", input="x", budget=Budget(max_tokens=most + 1))
        with pytest.raises(
            BudgetRefused, match=f"more than this server allows .{most}."
        ) as refused:
            rules.apply(asked, DEFAULT_TENANT, key)
        assert refused.value.hint == f"Ask for at most {most}, or have {where} raised."


def test_a_money_budget_needs_a_price_which_may_be_configured() -> None:
    with pytest.raises(BudgetRefused, match="the price of rule is not known") as refused:
        applied({"max_cost_usd": "1"})
    assert "AGENT_SERVER_PRICES" in (refused.value.hint or "")
    assert applied({"max_cost_usd": "1"}, prices=PRICED) is not None
    assert applied({"max_cost_usd": "1"}, models=["gpt-5.2"]) is not None


def test_a_budget_below_the_first_call_is_refused_at_the_door() -> None:
    with pytest.raises(BudgetRefused, match="max_tokens=100 is below what the first call needs"):
        applied({"max_tokens": 100}, text="word " * 200)
    with pytest.raises(BudgetRefused, match="max_cost_usd"):
        applied({"max_cost_usd": "0.0001"}, text="word " * 200, prices=PRICED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_model_calls": 10**30},
        {"max_cost_usd": "-0.01"},
        {"max_cost_usd": "NaN"},
        {"max_cost_usd": "Infinity"},
        {"deadline_s": float("inf")},
        {"deadline_s": -3},
        {"max_dollars": 3},
    ],
)
def test_absurd_numbers_are_no_budget(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Budget(**wrong)


def test_configured_prices_go_before_the_list_and_may_be_nothing() -> None:
    usage = make_usage(1_000_000, 500_000, cached=400_000)
    given = ModelPrice(input_per_mtok=1, output_per_mtok=4, cached_input_per_mtok="0.5")
    prices = Prices({"gpt-5.2": given, "free": ModelPrice(input_per_mtok=0, output_per_mtok=0)})
    assert prices.cost_usd("gpt-5.2", usage) == Decimal("2.8")
    assert prices.cost_usd("free", usage) == 0 and prices.known("free")
    assert prices.cost_usd("nobody-knows", usage) is None and not prices.known("nobody-knows")


def test_prices_of_the_policy_file_hold_as_they_now_are_and_the_settings_go_before() -> None:
    held: dict[str, ModelPrice] = {}
    prices = Prices({"mine": ModelPrice(input_per_mtok=1, output_per_mtok=2)}, lambda: held)
    assert not prices.known("local")
    held["local"] = held["mine"] = ModelPrice(input_per_mtok=10, output_per_mtok=20)
    assert prices.of_tokens("local", 1_000_000, 1_000_000) == 30
    assert prices.of_tokens("mine", 1_000_000, 1_000_000) == 3


@pytest.mark.parametrize("wrong", ["-1", "NaN", "Infinity", "1e9"])
def test_an_absurd_price_is_none(wrong: str) -> None:
    with pytest.raises(ValidationError):
        ModelPrice(input_per_mtok=Decimal(wrong), output_per_mtok=Decimal(1))


def test_an_image_is_not_counted_by_its_bytes() -> None:
    picture = {"image_url": "data:image/png;base64," + "A" * 400_000}
    assert 1_000 <= tokens_of(picture) < 1_100


async def test_an_agents_maximum_is_reserved_and_the_question_with_its_instructions() -> None:
    loop, model = loop_for(lambda instructions, items: [say("x")])
    agent = Agent(
        name="a", instructions="be brief " * 50, model_settings=ModelSettings(max_tokens=900)
    )
    ctx, _ = memory_context(budget=Budget(max_tokens=1_000))
    with pytest.raises(BudgetExceeded, match="no room for the next model call"):
        await loop.run(ctx, agent, "hello")
    assert not model.asked
    ctx, journal = memory_context(budget=Budget(max_tokens=1_100))
    assert (await loop.run(ctx, agent, "hello")).text == "x"
    assert journal.usage.model_calls == 1
