"""The base of everything that crosses a wire or a table, and the clock's one format.

Leans on Pydantic. Refuses unknown fields: a misspelt field is an error, never dropped.
"""

from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel, ConfigDict

JsonObject = dict[str, Any]
"""A JSON object. Values are JSON values, which mypy cannot say recursively without pain."""


class Frozen(BaseModel):
    """An immutable value that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def utcnow() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(timezone.utc)
