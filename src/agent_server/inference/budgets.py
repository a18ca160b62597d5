"""The budget that a run gets: what it asks for, the defaults, and the most that is allowed.

Leans on the settings, the estimate and the price list. Refuses to count: ``execution/budget.py``
does, while the run goes on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agent_server.domain.errors import BudgetRefused, FieldError
from agent_server.domain.ids import Tenant
from agent_server.domain.runs import Budget, Limits, RunRequest
from agent_server.inference.estimate import tokens_of
from agent_server.inference.prices import Prices
from agent_server.settings import Settings

LimitsOf = Callable[[Tenant, str], Mapping[str, Limits]]
"""The limits of a tenant and of a key (the principal's name), by what sets them, the nearest
first. Field by field the nearest that says something counts; the settings' come last."""


class BudgetRules:
    """Gives each run its budget when it is submitted.

    ``models`` are the names of the models that a request is known to use; ``of_agent`` the budget
    that an agent's policy sets, if any.
    """

    def __init__(
        self,
        settings: Settings,
        models: Callable[[RunRequest], Iterable[str]],
        *,
        of_agent: Callable[[str], Budget | None] = lambda agent: None,
        limits_of: LimitsOf = lambda tenant, principal: {},
        prices: Prices | None = None,
    ) -> None:
        of_settings = Limits(default=settings.default_budget, maximum=settings.max_budget)
        self._of_settings = {"AGENT_SERVER_MAX_BUDGET": of_settings}
        self._prices = prices or Prices(settings.prices)
        self._models = models
        self._of_agent = of_agent
        self._limits_of = limits_of

    def apply(self, request: RunRequest, tenant: Tenant, principal: str) -> RunRequest:
        """``request`` with the budget that holds for it. Raises ``BudgetRefused``."""
        limits = {**self._limits_of(tenant, principal), **self._of_settings}
        of_agent = self._of_agent(request.agent) if request.agent is not None else None
        budget = _resolved(request.budget, of_agent, limits)
        if budget is None:
            return request
        models = sorted(set(self._models(request)))
        if budget.max_cost_usd is not None:
            unknown = [model for model in models if not self._prices.known(model)]
            if unknown:
                raise BudgetRefused(
                    f"max_cost_usd cannot be kept: the price of {', '.join(unknown)} is not known.",
                    hint="Set it in AGENT_SERVER_PRICES or under [prices] in agent-server.toml, use a "
                    "model with a known price, or limit tokens or calls instead.",
                    errors=[FieldError(path="/budget/max_cost_usd", message="no known price")],
                )
        self._check_first_call(request, budget, models)
        return request.model_copy(update={"budget": budget})

    def _check_first_call(self, request: RunRequest, budget: Budget, models: list[str]) -> None:
        """What is asked must fit at least: no run is begun that can only be broken off."""
        asked = tokens_of(request.goal or request.input)
        if budget.max_tokens is not None and asked >= budget.max_tokens:
            raise _too_small("max_tokens", budget.max_tokens, f"about {asked} tokens")
        if budget.max_cost_usd is None or not asked:
            return
        costs = [self._prices.of_tokens(model, asked, 0) or 0 for model in models]
        least = min(costs, default=0)
        if least >= budget.max_cost_usd:
            raise _too_small("max_cost_usd", budget.max_cost_usd, f"about {least:f} US dollars")


def _too_small(name: str, most: Any, need: str) -> BudgetRefused:
    return BudgetRefused(
        f"The budget {name}={most} is below what the first call needs: the input alone is {need}.",
        hint=f"Raise {name}, or send less.",
        errors=[FieldError(path=f"/budget/{name}", message=f"the input alone is {need}")],
    )


def _resolved(
    asked: Budget | None, of_agent: Budget | None, limits: Mapping[str, Limits]
) -> Budget | None:
    """Field by field: what is asked, else the agent's, else the default; never above the most."""
    found: dict[str, Any] = {}
    for name in Budget.model_fields:
        own = _of(asked, name)
        set_by = ((_of(limit.maximum, name), where) for where, limit in limits.items())
        most, where = next((one for one in set_by if one[0] is not None), (None, ""))
        if own is not None and most is not None and own > most:
            raise BudgetRefused(
                f"The budget {name}={own} is more than this server allows ({most}).",
                hint=f"Ask for at most {most}, or have {where} raised.",
                errors=[FieldError(path=f"/budget/{name}", message=f"at most {most}")],
            )
        for source in (of_agent, *(limit.default for limit in limits.values())):
            given = _of(source, name)
            if own is None and given is not None:
                own = given if most is None else min(given, most)
        value = most if own is None else own
        if value is not None:
            found[name] = value
    return Budget(**found) if found else None


def _of(budget: Budget | None, name: str) -> Any:
    return None if budget is None else getattr(budget, name)
