"""One HTTP exchange with the server, and its problems turned back into our errors.

Leans on httpx2 and the domain's error tree. Refuses to know which calls exist.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from agent_server.domain.errors import (
    AgentServerError,
    FieldError,
    InvalidRequest,
    ModelError,
    Unavailable,
    error_codes,
)

START_HINT = (
    "Start one with `agent-server serve`, or give its address with `--server` or AGENT_SERVER_URL."
)


M = TypeVar("M", bound=BaseModel)


class UnexpectedAnswer(AgentServerError):
    """Something answered that does not speak our contract, or speaks a newer one."""

    def __init__(self, detail: str, *, status: int, code: str, hint: str | None = None) -> None:
        super().__init__(detail, hint=hint)
        self.answered_status = status
        self.answered_code = code


def problem_error(status: int, body: Any) -> AgentServerError:
    """The error of our tree that the problem document ``body`` was rendered from."""
    problem = body if isinstance(body, dict) else {}
    code = str(problem.get("code") or "")
    detail = str(problem.get("detail") or problem.get("title") or f"The server answered {status}.")
    hint = problem.get("hint")
    if code == "internal" and problem.get("request_id"):
        hint = hint or f"The server's log has more, under request {problem['request_id']}."
    errors: list[FieldError] = []
    for entry in problem.get("errors") or []:
        try:
            errors.append(FieldError.model_validate(entry))
        except ValidationError:
            errors.append(FieldError(path="", message=str(entry)))
    known = error_codes().get(code)
    if known is None:
        return UnexpectedAnswer(detail, status=status, code=code, hint=hint)
    if issubclass(known, ModelError):
        return known(detail, hint=hint)
    return known(detail, hint=hint, errors=errors)


GOES_ON = "The run goes on without it: look again with `agent-server runs list`."


def transport_error(
    url: httpx2.URL | str, error: httpx2.HTTPError, hint: str = GOES_ON
) -> Unavailable:
    """What to say when no answer came: who was asked, what went wrong, what to do. ``hint`` is for
    a connection that broke."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Unavailable(f"No server answers at {str(url)!r}: {_reason(error)}.", hint=START_HINT)
    return Unavailable(
        f"The connection to {str(url)!r} broke: {_reason(error)}.",
        hint=hint,
    )


def _reason(error: httpx2.HTTPError) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def checked(model: type[M], fields: Mapping[str, Any], what: str) -> M:
    """``fields`` as a ``model``, before they are sent. Raises ``InvalidRequest``, which calls it
    ``what``."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = [
            FieldError(
                path="/".join(str(p) for p in e["loc"]),
                message=e["msg"].removeprefix("Value error, "),
            )
            for e in error.errors()
        ]
        told = "; ".join(f"{e.path}: {e.message}" if e.path else e.message for e in errors)
        raise InvalidRequest(f"The {what} is not valid: {told}.", errors=errors) from error


async def failed(response: httpx2.Response) -> AgentServerError:
    """The error that ``response``, whose status is 400 or more, tells of."""
    await response.aread()
    try:
        body = response.json()
    except ValueError:
        return UnexpectedAnswer(
            f"{str(response.url)!r} answered {response.status_code} with something that is not "
            f"JSON: {response.text[:200]!r}.",
            status=response.status_code,
            code="",
            hint="Is it an Agent Server? Its address is what `agent-server serve` printed.",
        )
    return problem_error(response.status_code, body)


async def exchange(
    http: httpx2.AsyncClient,
    method: str,
    path: str,
    *,
    params: Mapping[str, Any] | None = None,
    json: Any = None,
    content: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    broken: str = GOES_ON,
) -> Any:
    """The JSON that the server answers. ``content`` is a body that says in ``headers`` what it is.
    Raises the error its problem document names; ``broken`` is the hint where the connection broke.
    """
    try:
        response = await http.request(
            method,
            path,
            params={k: v for k, v in (params or {}).items() if v is not None},
            json=json,
            content=content,
            headers=dict(headers or {}),
            timeout=http.timeout if timeout_s is None else timeout_s,
        )
    except httpx2.HTTPError as error:
        raise transport_error(http.base_url, error, broken) from error
    if response.status_code >= 400:
        raise await failed(response)
    if response.status_code == 204 or not response.content:
        return None
    try:
        return response.json()
    except ValueError as error:
        raise UnexpectedAnswer(
            f"{str(response.url)!r} answered {response.status_code} with something that is not "
            f"JSON: {response.text[:200]!r}.",
            status=response.status_code,
            code="",
            hint="Is it an Agent Server? Its address is what `agent-server serve` printed.",
        ) from error
