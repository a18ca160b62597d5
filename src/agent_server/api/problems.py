"""Every error that a caller sees over HTTP, as RFC 9457 ``application/problem+json``.

The only module that renders errors. Leans on the domain's error tree; refuses to know routes.
What is not one of ours becomes a 500 that says nothing but its request id.
"""

import html
import json
from http import HTTPStatus

from pydantic import Field

from agent_server.domain.base import Frozen
from agent_server.domain.errors import (
    AgentServerError,
    FieldError,
    MethodNotAllowed,
    NotFound,
    RunError,
    error_codes,
)

MEDIA_TYPE = "application/problem+json"
ERRORS_PAGE = "/docs/errors"


class Problem(Frozen):
    """An error answer (RFC 9457)."""

    type: str = Field(description="Where the error is explained; stable.")
    title: str = Field(description="The kind of error, in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened, with which value.")
    instance: str = Field(description="The path that was called.")
    code: str = Field(description="The kind of error, for programs; stable.")
    request_id: str = Field(description="Find this call in the server's log by it.")
    hint: str | None = Field(default=None, description="What to do next.")
    errors: tuple[FieldError, ...] = Field(default=(), description="What is wrong, field by field.")


def render(error: AgentServerError, *, instance: str, request_id: str) -> bytes:
    """The problem document of ``error``."""
    body: dict[str, object] = {
        "type": f"{ERRORS_PAGE}#{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "code": error.code,
        "request_id": request_id,
        "hint": error.hint,
        "errors": [field.model_dump(exclude_none=True) for field in error.errors],
    }
    return json.dumps(body, separators=(",", ":")).encode()


def unexpected(request_id: str) -> AgentServerError:
    """What a caller is told of an error that nobody foresaw."""
    return AgentServerError(
        "The server met an error it did not expect.",
        hint=f"Look for request id {request_id!r} in the server's log.",
    )


def from_http(status: int, *, method: str, path: str, headers: dict[str, str]) -> AgentServerError:
    """The framework's own refusals in our words: no such path, no such method."""
    if status == 404:
        return NotFound(f"There is nothing at {path!r}.", hint="`/docs` lists every path.")
    if status == 405:
        allow = headers.get("Allow") or headers.get("allow") or "another method"
        return MethodNotAllowed(
            f"{method} is not allowed at {path!r}.",
            hint=f"Use {allow} there.",
            headers={"Allow": allow},
        )
    return _with_status(status)


def _with_status(status: int) -> AgentServerError:
    for known in error_codes().values():
        if known.status == status and not issubclass(known, RunError):
            return known(f"{HTTPStatus(status).phrase}.")
    return AgentServerError("The server could not answer.")


def errors_page() -> str:
    """Every stable code on one page, as HTML that needs nothing else."""
    rows = "".join(
        f"<tr id='{code}'><td><code>{code}</code></td>"
        f"<td>{'in a run' if issubclass(error, RunError) else error.status}</td>"
        f"<td>{html.escape(error.title)}.</td>"
        f"<td>{html.escape(' '.join((error.__dict__.get('__doc__') or '').split()))}</td></tr>"
        for code, error in sorted(error_codes().items())
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Errors · Agent Server</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
        "padding:0 1rem;color-scheme:light dark}td,th{padding:.35rem .8rem .35rem 0;"
        "text-align:left;vertical-align:top}tr:target{outline:2px solid}</style>"
        "<h1>Errors</h1><p>Every error answer is <code>application/problem+json</code> and names "
        "one of these codes. Codes do not change.</p>"
        f"<table><tr><th>code</th><th>status</th><th>meaning</th><th></th></tr>{rows}</table></html>"
    )
