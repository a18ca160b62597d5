"""The base of everything that crosses a wire or a table, and the clock's one format.

Leans on Pydantic. Refuses unknown fields: a misspelt field is an error, never dropped.
"""

import json
from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError, to_jsonable_python

JsonObject = dict[str, Any]
"""A JSON object. Values are JSON values, which mypy cannot say recursively without pain."""


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError as error:
        raise ValueError("must lie in the years 1 to 9999 of UTC") from error


UtcDatetime = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A moment with any offset, taken as UTC: one that is none of its years could not be read again."""


class Frozen(BaseModel):
    """An immutable value that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def json_text(
    model: BaseModel, *, indent: int | None = None, exclude: set[str] | None = None
) -> str:
    """``model`` as JSON, whatever its texts hold.

    Half a character (a lone surrogate, as a model or a tool may well say) has no bytes in UTF-8;
    it is written as its escape, and the rest of that JSON in ASCII.
    """
    try:
        return model.model_dump_json(indent=indent, exclude=exclude)
    except (PydanticSerializationError, UnicodeEncodeError):
        return json.dumps(
            model.model_dump(exclude=exclude),
            indent=indent,
            separators=None if indent else (",", ":"),
            allow_nan=False,
            default=to_jsonable_python,
        )


def utcnow() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(timezone.utc)
