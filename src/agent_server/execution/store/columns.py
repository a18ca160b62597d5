"""What the statements of several tables share: usage as columns, and upserts of both dialects.

Leans on the domain, the columns' types and SQLAlchemy's dialects. Refuses to know a table.
"""

from decimal import Decimal
from typing import Any

from sqlalchemy import Row
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.domain.errors import ErrorInfo, InternalError, error_info
from agent_server.domain.runs import RunStatus, Usage
from agent_server.storage.tables import Unreadable

PICO = Decimal(10) ** 12
LIVE = ("queued", "running", "waiting")
ENDED = tuple(status.value for status in RunStatus if status.ended)
INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""``INSERT`` with ``ON CONFLICT``, which the two databases spell in their own dialects."""


def pico(usd: Decimal | None) -> int:
    """US dollars as the database sums them; nothing for an unknown price."""
    return int((usd or 0) * PICO)


def usage_columns(usage: Usage) -> dict[str, int]:
    """A step's usage as the columns of ``steps`` and the increments of ``runs``."""
    return {
        "model_calls": usage.model_calls,
        "tool_calls": usage.tool_calls,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_pico": pico(usage.cost_usd),
        "unpriced_calls": usage.model_calls if usage.cost_usd is None else 0,
    }


def error_of(value: Any) -> ErrorInfo | None:
    """The stored error of a run, a task or a step."""
    if isinstance(value, Unreadable):
        return error_info(InternalError(f"The stored error cannot be read: {value}."))
    return ErrorInfo.model_validate(value) if value else None


def usage_of(row: Row[Any]) -> Usage:
    """The usage in a row; ``cost_usd`` is None when any call had no price, or none was made."""
    priced = row.model_calls > 0 and row.unpriced_calls == 0
    return Usage(
        model_calls=row.model_calls,
        tool_calls=row.tool_calls,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        cost_usd=(Decimal(row.cost_pico) / PICO).normalize() if priced else None,
    )


NO_USAGE = usage_columns(Usage(cost_usd=Decimal(0)))
