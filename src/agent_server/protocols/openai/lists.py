"""Answers and lists in OpenAI's form.

Leans on ``api`` for answers as bytes and for routes. Refuses to know what is in them.
"""

import json
from collections.abc import Sequence

from pydantic import BaseModel, Field

from agent_server.api.answers import Json
from agent_server.api.inputs import NoQuery
from agent_server.api.openapi import Handler, Route
from agent_server.domain.base import Frozen, JsonObject
from agent_server.protocols.openai.errors import refuse


class ItemsQuery(Frozen):
    after: str | None = None
    include: str | None = None
    limit: int = Field(default=20, ge=1, le=100)
    order: str = Field(default="desc", pattern="^(asc|desc)$")


def answer(value: JsonObject) -> Json:
    return Json(json.dumps(value, separators=(",", ":")).encode())


def envelope(found: Sequence[JsonObject], has_more: bool) -> JsonObject:
    """One page of a list."""
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else "",
        "last_id": found[-1]["id"] if found else "",
        "has_more": has_more,
    }


def page(items: Sequence[JsonObject], wanted: ItemsQuery) -> JsonObject:
    """The part of a list, oldest first, that is ``wanted``."""
    ordered = items if wanted.order == "asc" else items[::-1]
    start = 0
    if wanted.after is not None:
        start = next((n + 1 for n, item in enumerate(ordered) if item["id"] == wanted.after), -1)
        if start < 0:
            raise refuse("after", f"There is no item {wanted.after[:100]!r} in this list.")
    end = start + wanted.limit
    return envelope(ordered[start:end], end < len(ordered))


def route(
    method: str,
    path: str,
    handler: Handler,
    summary: str,
    name: str,
    *,
    query: type[BaseModel] = NoQuery,
    body: type[BaseModel] | None = None,
    media: str = "application/json",
    answer: str = "application/json",
    errors: tuple[int, ...] = (),
    stream: bool = False,
) -> Route:
    """One of OpenAI's routes, as our document has it."""
    return Route(
        method,
        path,
        handler,
        summary=summary,
        tag="openai",
        name="openai_" + name,
        description="As OpenAI's API has it; see docs/openai.md.",
        query=query,
        body=body,
        body_media=media,
        answers={200: answer},
        stream=stream,
        errors=(400, 404, 409, 413, 415, 429, *errors),
    )
