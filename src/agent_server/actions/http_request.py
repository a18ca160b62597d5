"""The action ``http_request``: one request to a service outside, behind the SSRF guard.

Leans on the guarded HTTP door and on the ledger. Refuses to know what the service is.

Twice or not at all? Each request carries ``Idempotency-Key: <run id>:<step key>``, the same after
every crash and on every try, so a receiver that honours the key acts once. For one that does not,
the method decides. GET, HEAD, OPTIONS, TRACE, PUT and DELETE may be repeated (RFC 9110, section
9.2.2). POST and PATCH may not: found unfinished after a crash they wait for a decision, and
within one attempt they are tried again only where nothing happened (no connection, 429). With
``effect: idempotent`` the writer says that the receiver honours the key, and they may be repeated
as well.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from agent_server.actions.handler import ActionServices
from agent_server.actions.ssrf import AddressUnreachable, AnswerTimeout, HttpAnswer, shown
from agent_server.domain.agents import ToolEffect
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, RunError, ToolError
from agent_server.domain.runs import WaitingFor
from agent_server.execution.ports import StepRecord, Suspend, TaskContext

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
TRIES = 3
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
_RECORDED_HEADERS = frozenset(
    {"content-type", "content-length", "content-encoding", "date", "etag", "last-modified"}
    | {"location", "retry-after", "x-request-id"}
)
_OWN_HEADERS = frozenset(
    {"connection", "content-length", "host", "idempotency-key", "transfer-encoding", "upgrade"}
)
_SECRET_MARKS = ("auth", "cookie", "key", "secret", "token", "password", "signature")


class HttpRequest:
    """Its output: ``status``, ``headers`` (a few), ``body`` (JSON where it is JSON, else text,
    at most 64 KiB) and ``truncated``. An answer outside 2xx is a failure."""

    name = "http_request"
    description = "Send an HTTP request to a public address."
    parameters: JsonObject = {
        "type": "object",
        "properties": {
            "method": {"type": "string", "enum": list(METHODS), "default": "POST"},
            "url": {"type": "string", "minLength": 1, "maxLength": 8192},
            "headers": {"type": "object", "additionalProperties": {"type": "string"}},
            "json": {"description": "A JSON value to send; not together with body."},
            "body": {"type": "string", "description": "A text to send."},
            "timeout_s": {"type": "number", "exclusiveMinimum": 0},
            "effect": {
                "type": "string",
                "enum": [effect.value for effect in ToolEffect],
                "description": "What sending it twice would do; default: by the method.",
            },
        },
        "required": ["url"],
        "additionalProperties": False,
    }

    def __init__(self, services: ActionServices) -> None:
        self._http = services.http
        self._sleep = services.sleep

    async def handle(self, ctx: TaskContext, parameters: JsonObject, event: JsonObject) -> Any:
        key = ctx.journal.key("http", "1")
        method: str = parameters.get("method", "POST")
        repeatable = _effect(parameters, method).repeatable
        headers, content = _message(parameters)
        headers["Idempotency-Key"] = f"{ctx.run.id}:{key}"
        step = StepRecord(
            key=key,
            kind="tool",
            name=self.name,
            input=_for_the_record(parameters),
            input_hash=hashlib.sha256(
                json.dumps(parameters, sort_keys=True, default=str).encode()
            ).hexdigest(),
        )
        earlier = ctx.journal.recorded().get(key)
        if earlier is not None and earlier.status == "done":
            return earlier.output
        if earlier is not None and earlier.status == "failed":
            info = earlier.error or ErrorInfo(code=ToolError.code, message="The request failed.")
            raise ToolError(info.message, hint=info.hint)
        if earlier is not None and not repeatable:
            detail = f"{method} {shown(parameters['url'])} was under way when the process died."
            await ctx.journal.in_doubt(earlier, detail)
            raise Suspend(WaitingFor(kind="reconciliation", detail=detail, step=key))
        await ctx.journal.begin(step, commit=not repeatable)
        try:
            answer = await self._send(parameters, method, headers, content, repeatable)
            output = _output(answer, method)
            if not 200 <= answer.status < 300:
                raise ToolError(
                    f"{method} {shown(parameters['url'])} answered {answer.status}.",
                    hint=_excerpt(answer),
                )
        except RunError as error:
            await ctx.journal.finish(step.failed(error.info()))
            raise
        await ctx.journal.finish(step.done(output))
        return output

    async def _send(
        self,
        parameters: JsonObject,
        method: str,
        headers: Mapping[str, str],
        content: bytes | None,
        repeatable: bool,
    ) -> HttpAnswer:
        pause_s = FIRST_PAUSE_S
        for last in (*(False,) * (TRIES - 1), True):
            wait_s = pause_s
            try:
                answer = await self._http.request(
                    method,
                    parameters["url"],
                    headers=headers,
                    content=content,
                    timeout_s=parameters.get("timeout_s"),
                )
                passing = answer.status == 429 or (answer.status >= 500 and repeatable)
                if last or not passing:
                    return answer
                wait_s = _retry_after(answer) or pause_s
            except (AddressUnreachable, AnswerTimeout) as error:
                if last or (isinstance(error, AnswerTimeout) and not repeatable):
                    raise
            await self._sleep(min(wait_s, LONGEST_PAUSE_S))
            pause_s *= 2
        raise AssertionError("the last try returns or raises")


def _effect(parameters: JsonObject, method: str) -> ToolEffect:
    stated = parameters.get("effect")
    if stated is not None:
        return ToolEffect(stated)
    return ToolEffect.ONCE if method in ("POST", "PATCH") else ToolEffect.IDEMPOTENT


def _message(parameters: JsonObject) -> tuple[dict[str, str], bytes | None]:
    headers: dict[str, str] = dict(parameters.get("headers", {}))
    taken = sorted(name for name in headers if name.lower() in _OWN_HEADERS)
    if taken:
        raise ToolError(
            f"The header {taken[0]!r} is set by the server.", hint="Leave it out of the headers."
        )
    if "json" in parameters and "body" in parameters:
        raise ToolError("Both 'json' and 'body' are given.", hint="Give one of them.")
    if "json" in parameters:
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"
        return headers, json.dumps(parameters["json"], ensure_ascii=False).encode()
    return headers, parameters["body"].encode() if "body" in parameters else None


def _for_the_record(parameters: JsonObject) -> JsonObject:
    """The parameters without what looks secret among the headers."""
    headers = {
        name: "***" if any(mark in name.lower() for mark in _SECRET_MARKS) else value
        for name, value in parameters.get("headers", {}).items()
    }
    return {**parameters, **({"headers": headers} if headers else {})}


def _output(answer: HttpAnswer, method: str) -> JsonObject:
    body: Any = None
    if method != "HEAD" and "content-encoding" not in answer.headers:
        body = answer.body.decode("utf-8", errors="replace").replace("\x00", "\ufffd")
        if "json" in answer.headers.get("content-type", "") and not answer.truncated:
            try:
                body = json.loads(body)
            except ValueError:
                pass  # it says JSON and is not: the text is the record
    return {
        "status": answer.status,
        "headers": {k: v for k, v in answer.headers.items() if k in _RECORDED_HEADERS},
        "body": body,
        "truncated": answer.truncated,
    }


def _excerpt(answer: HttpAnswer) -> str | None:
    text = answer.body[:300].decode("utf-8", errors="replace").strip()
    return f"It said: {text}" if text else None


def _retry_after(answer: HttpAnswer) -> float | None:
    value = answer.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None
