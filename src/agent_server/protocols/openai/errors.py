"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``.

Leans on the domain's error tree. Refuses to know routes.
"""

import json
from typing import Final

from agent_server.api.door import Rendered
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import (
    AgentServerError,
    ErrorInfo,
    FieldError,
    InvalidRequest,
    UnknownAgent,
)

FILES: Final = "/v1/files"
FORM_BYTES: Final = 65_536
"""What a form may have beside its file."""
MODEL_NOT_FOUND: Final = "model_not_found"
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_RETRY_NOT: Final = {"x-should-retry": "false"}


class RunFailed(AgentServerError):
    """A run that failed where an object cannot say so. Clients must not repeat it by themselves:
    its tools may have acted."""

    title = "The run failed"

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message, hint=info.hint, headers=_RETRY_NOT)
        self.info_code = info.code


def refuse(param: str | None, message: str, hint: str | None = None) -> InvalidRequest:
    """The refusal of one parameter."""
    errors = [FieldError(path=param, message=message)] if param else []
    return InvalidRequest(message, hint=hint, errors=errors)


def unsupported(param: str, what: str, hint: str | None = None) -> InvalidRequest:
    """The refusal of what this server does not do."""
    return refuse(param, f"Unsupported parameter: {what} is not supported here.", hint)


def refuse_unknown(place: str, given: JsonObject, *names: str) -> None:
    """Raise for a key of an object, beside its ``type``, that nothing here reads."""
    for name in sorted(set(given) - {"type", *names}):
        if given[name] is not None:
            raise unsupported(f"{place}.{name}", f"'{name}'")


def error_object(error: AgentServerError) -> tuple[int, JsonObject]:
    """The status and the ``error`` object."""
    status, code = error.status, error.code
    if isinstance(error, RunFailed):
        code = error.info_code
    elif isinstance(error, UnknownAgent):
        status, code = 404, MODEL_NOT_FOUND
    elif status == 422:
        status = 400
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = error.detail if error.hint is None else f"{error.detail} {error.hint}"
    param = next((field.path for field in error.errors if field.path), None)
    if param is None and code == MODEL_NOT_FOUND:
        param = "model"
    return status, {"message": message, "type": kind, "param": param, "code": code}


class OpenAIManners:
    """See ``api.door.Manners``."""

    def __init__(self, max_file_bytes: int) -> None:
        self._uploads = {FILES: max_file_bytes + FORM_BYTES}

    def upload_bytes(self, path: str) -> int | None:
        return self._uploads.get(path)

    def render(self, error: AgentServerError, request_id: str) -> Rendered:
        status, body = error_object(error)
        return Rendered(status, "application/json", json.dumps({"error": body}).encode())
