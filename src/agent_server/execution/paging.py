"""Pages of a list: what one holds, and the opaque place where the next one starts.

Leans on nothing but the standard library. Refuses to know what is listed.
"""

import base64
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Generic, TypeVar

from agent_server.domain.errors import InvalidCursor

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """A page of a list and where the next one starts; None at the end."""

    data: list[T]
    next_cursor: str | None


def encode_cursor(at: datetime, identity: str) -> str:
    """An opaque place in a list."""
    raw = json.dumps([at.isoformat(), identity]).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """The place ``cursor`` names; raises ``InvalidCursor``."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        at, identity = json.loads(base64.urlsafe_b64decode(padded.encode("ascii")))
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None or not isinstance(identity, str) or not identity.isprintable():
            raise ValueError("not a cursor of this server")
        moment = moment.astimezone(timezone.utc)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise unknown_cursor(cursor) from error
    return moment, identity


def unknown_cursor(cursor: str) -> InvalidCursor:
    """The error for what no list gave."""
    return InvalidCursor(
        f"The cursor {cursor[:100]!r} is not one this server gave.",
        hint="Take next_cursor from the page before, unchanged.",
    )
