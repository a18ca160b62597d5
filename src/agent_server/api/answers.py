"""Answers as bytes: JSON that is already written, with no second look at it.

Leans on Starlette's ``Response``. Refuses to know what the JSON says.
"""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent_server.domain.base import json_text


class Json(Response):
    """A JSON answer from bytes. Skips the header work of the general class, which costs more
    than everything else an answer of ours does."""

    media_type = "application/json"

    def __init__(
        self, body: bytes, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = status_code
        self.background = None
        self.body = body
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        if headers:
            self.raw_headers += [
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in headers.items()
            ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await send({"type": "http.response.body", "body": self.body})


def dump(model: BaseModel) -> bytes:
    return json_text(model).encode()


def dump_page(items: Iterable[bytes], next_cursor: str | None) -> bytes:
    """A list answer of items that are JSON already."""
    cursor = b"null" if next_cursor is None else b'"' + next_cursor.encode("ascii") + b'"'
    return b'{"data":[' + b",".join(items) + b'],"next_cursor":' + cursor + b"}"
