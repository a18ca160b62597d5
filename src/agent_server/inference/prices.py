"""What a model call costs, by the operator's prices and the list that comes with genai-prices.

Leans on genai-prices' bundled list, which is never updated over the network here. Refuses to
guess: a model without a price has none, and what has no price is never called free.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from agents import Usage
from genai_prices import Usage as PricedUsage
from genai_prices import calc_price

from agent_server.domain.runs import ModelPrice

_MTOK = Decimal(1_000_000)
_PREFIXES = ("litellm/", "any-llm/", "openai/")


@dataclass(frozen=True)
class _Rates:
    """US dollars per million tokens."""

    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write: Decimal


@dataclass(frozen=True)
class _Price:
    reference: str
    provider_id: str | None
    rates: _Rates | None
    """None where the price depends on more than the number of tokens: then it is looked up
    for each call."""


class Prices:
    """The ``configured`` prices by model name, those of the policy file as it now is
    (``of_file``), and the built-in list for all others."""

    def __init__(
        self,
        configured: Mapping[str, ModelPrice] | None = None,
        of_file: Callable[[], Mapping[str, ModelPrice]] = dict,
    ) -> None:
        self._configured = configured or {}
        self._of_file = of_file

    def _set(self, model: str) -> ModelPrice | None:
        return self._configured.get(model) or self._of_file().get(model)

    def known(self, model: str) -> bool:
        """Whether calls of ``model`` have a price."""
        return self._set(model) is not None or _price(model) is not None

    def cost_usd(self, model: str, usage: Usage) -> Decimal | None:
        """See ``cost_usd``. A configured price may be 0, and then the call costs 0."""
        rates = self._set(model)
        if rates is None:
            return cost_usd(model, usage)
        taken, given = usage.input_tokens, usage.output_tokens
        if taken + given <= 0:
            return None
        read = min(usage.input_tokens_details.cached_tokens or 0, taken)
        cached = rates.cached_input_per_mtok
        total = (
            rates.input_per_mtok * (taken - read)
            + (rates.input_per_mtok if cached is None else cached) * read
            + rates.output_per_mtok * given
        )
        return total / _MTOK

    def of_tokens(self, model: str, taken: int, given: int) -> Decimal | None:
        """What that many input and output tokens cost; None where no price is known."""
        if not self.known(model):
            return None
        used = Usage(input_tokens=taken, output_tokens=given, total_tokens=taken + given)
        return self.cost_usd(model, used) or Decimal(0)


def cost_usd(model: str, usage: Usage) -> Decimal | None:
    """The price in US dollars of ``usage`` (one call or a sum of calls without tiers).

    None where the model or its price is not known, and where no token was counted.
    """
    taken, given = usage.input_tokens, usage.output_tokens
    if taken + given <= 0:
        return None
    price = _price(model)
    if price is None:
        return None
    details = usage.input_tokens_details
    read = min(details.cached_tokens or 0, taken)
    written = min(getattr(details, "cache_write_tokens", 0) or 0, taken - read)
    rates = price.rates
    if rates is None:
        return _looked_up(price, taken, given, read, written)
    total = (
        rates.input * (taken - read - written)
        + rates.cache_read * read
        + rates.cache_write * written
        + rates.output * given
    )
    return total / _MTOK or None


@lru_cache(maxsize=1024)
def _price(model: str) -> _Price | None:
    reference, provider_id = model, None
    for prefix in _PREFIXES:
        reference = reference.removeprefix(prefix)
    if reference != model and "/" in reference:
        provider_id, reference = reference.split("/", 1)
    for provider in dict.fromkeys((provider_id, None)):
        try:
            found = calc_price(
                PricedUsage(input_tokens=1, output_tokens=1), reference, provider_id=provider
            )
        except (LookupError, ValueError):
            continue
        return _Price(reference, provider, _rates(found.model.prices))
    return None


def _rates(prices: object) -> _Rates | None:
    by_token = (
        {name: value for name, value in vars(prices).items() if value is not None}
        if hasattr(prices, "__dict__")
        else {}
    )
    given = by_token.get("input_mtok"), by_token.get("output_mtok")
    flat = all(isinstance(value, Decimal) for value in by_token.values())
    if not flat or any(name.startswith("request") for name in by_token):
        return None
    if not isinstance(given[0], Decimal) or not isinstance(given[1], Decimal):
        return None
    return _Rates(
        input=given[0],
        output=given[1],
        cache_read=by_token.get("cache_read_mtok", given[0]),
        cache_write=by_token.get("cache_write_mtok", given[0]),
    )


def _looked_up(price: _Price, taken: int, given: int, read: int, written: int) -> Decimal | None:
    usage = PricedUsage(
        input_tokens=taken,
        output_tokens=given,
        cache_read_tokens=read or None,
        cache_write_tokens=written or None,
    )
    try:
        found = calc_price(usage, price.reference, provider_id=price.provider_id)
    except (LookupError, ValueError):
        return None
    return found.total_price or None
