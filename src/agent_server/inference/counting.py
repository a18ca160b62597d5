"""How many tokens a model call would take in, for who asks before it is made.

Leans on the model, whose provider may count, and on the estimate that budgets use, where it does
not. Refuses a tokenizer: a table of one would have to be fetched, and fits one family of models.
"""

from typing import Protocol, runtime_checkable

import structlog
from agents import Model

from agent_server.domain.errors import ModelError, RunError
from agent_server.execution.ports import Estimate
from agent_server.inference.models import ModelRequest

_log = structlog.get_logger(__name__)


class InputCounted(RunError):
    """Ends a run whose first model call was to be counted and not made: its usage has the count."""

    code = "input_counted"


@runtime_checkable
class Counts(Protocol):
    """A model whose provider may count."""

    async def input_tokens(self, request: ModelRequest) -> int | None:
        """None where it does not. Raises ``ModelError``."""


async def input_tokens(model: Model, request: ModelRequest, expected: Estimate) -> int:
    """As the model's provider counts, or else as ``expected``."""
    if isinstance(model, Counts):
        try:
            found = await model.input_tokens(request)
        except ModelError as error:
            _log.info("tokens.estimated", model=expected.model, reason=error.detail)
        else:
            if found is not None:
                return found
    return expected.input_tokens
