"""What a caller sends, read and refused: JSON bodies, query parameters, a few headers.

Leans on Pydantic and the domain's errors. Refuses to guess: an unknown field or parameter is
named, with the nearest one that exists. Sizes are held at the door, before this is called.
"""

import base64
import binascii
import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qsl

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request

from agent_server.domain.base import Frozen, UtcDatetime
from agent_server.domain.errors import FieldError, InvalidCursor, InvalidRequest, MalformedBody
from agent_server.domain.runs import RunStatus
from agent_server.execution.runs import Idempotency

TAGS = re.compile(r'\s*(?:W/)?("[^"]*")\s*(?:,|$)')
MAX_WAIT_S = 60
MAX_LIMIT = 200
DEFAULT_LIMIT = 50
MAX_SEQ = 2**53

M = TypeVar("M", bound=BaseModel)

KEY = re.compile(r"[\x21-\x7e]{1,255}")
STRING = re.compile(rb'"(?:[^"\\]+|\\.)*(?:"|\\?\Z)', re.DOTALL)
"""A text, also one that never ends: so that no quote is looked at twice."""
UNUSUAL = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}|[0-9]{309}")
"""What may be a number that is none, or is too large; a text that looks like one costs a look."""
PAIR = re.compile(rb"\[\]|\{\}")
BRACKETS = b"[]{}"
NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in BRACKETS)
MAX_REPORTED = 20


# Query parameters, one model for each shape


class NoQuery(Frozen):
    """No parameters."""


class WaitQuery(Frozen):
    wait: float | None = Field(
        default=None,
        ge=0,
        le=MAX_WAIT_S,
        allow_inf_nan=False,
        description="Seconds to wait for the run's end, at most 60.",
    )


class ListQuery(Frozen):
    limit: int = Field(default=DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="Items in one page.")
    cursor: str | None = Field(
        default=None, max_length=1000, description="`next_cursor` of the page before."
    )


class RunChoice(Frozen):
    """The filters that choose among runs, in a list's query and in the body of an order to many."""

    status: RunStatus | None = Field(default=None, description="Only runs in this status.")
    agent: str | None = Field(default=None, max_length=200, description="Only of this agent.")
    session_id: str | None = Field(
        default=None, max_length=200, description="Only of this session."
    )
    workflow: str | None = Field(default=None, max_length=200, description="Only of this workflow.")
    created_after: UtcDatetime | None = Field(
        default=None, description="Only runs created after this moment (RFC 3339)."
    )
    q: str | None = Field(
        default=None, max_length=200, description="Only runs whose goal or name has this text."
    )


class RunsQuery(RunChoice, ListQuery):
    pass


class EventsQuery(Frozen):
    after: int = Field(
        default=0, ge=0, le=MAX_SEQ, description="Only events after this sequence number."
    )
    limit: int = Field(
        default=MAX_LIMIT, ge=1, le=MAX_LIMIT, description="Events in one page of the JSON form."
    )
    cursor: str | None = Field(
        default=None,
        max_length=1000,
        description="`next_cursor` of the page before, in the JSON form.",
    )


def query(request: Request, model: type[M]) -> M:
    """The query parameters. Raises ``InvalidRequest`` for one that is unknown or not valid."""
    raw = request.scope["query_string"]
    if not raw:
        return model()
    pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True)
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name in values if sum(name == other for other, _ in pairs) > 1)
        raise InvalidRequest(f"The parameter {twice!r} is given more than once.")
    for name, value in values.items():
        if "\0" in value:
            raise InvalidRequest(f"The parameter {name!r} holds a NUL character.")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, model, "parameter") from error


# Bodies


def parse(raw: bytes, model: type[M], *, max_depth: int) -> M:
    """The JSON body as ``model``.

    Raises ``MalformedBody`` for what is not JSON or is nested too deep, ``InvalidRequest`` for
    JSON that does not fit.
    """
    if not raw.strip():
        raise MalformedBody("The body is empty.", hint="Send a JSON object.")
    if nested_deeper(raw, max_depth):
        raise MalformedBody(
            f"The body is nested deeper than {max_depth} levels.",
            hint="Send flatter JSON, or raise AGENT_SERVER_MAX_JSON_DEPTH.",
        )
    if UNUSUAL.search(raw):
        _refuse_unusual_numbers(raw)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid":
            raise MalformedBody(
                f"The body is not JSON: {_json_complaint(error)}.",
                hint="Send UTF-8 JSON with `Content-Type: application/json`.",
            ) from error
        raise _refusal(error, model, "field") from error


def refuse_nul(asked: BaseModel, raw: bytes) -> None:
    """Raise for a NUL character in a name or a goal, which databases cannot hold or find."""
    if b"\\u0000" not in raw:
        return
    for name, value in asked:
        if name in ("input", "context", "metadata", "variables"):
            continue
        if _has_nul(value):
            message = "It holds a NUL character."
            raise InvalidRequest(
                f"Field {name!r} holds a NUL character.",
                hint="Leave the character out.",
                errors=[FieldError(path=name, message=message)],
            )


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(key) or _has_nul(inner) for key, inner in value.items())
    return isinstance(value, list | tuple) and any(map(_has_nul, value))


def nested_deeper(raw: bytes, limit: int) -> bool:
    """True when the JSON in ``raw`` nests deeper than ``limit``, found without recursion.

    Texts are cut out, then everything but brackets; what is left loses its innermost pairs in
    each pass, so that it is empty after as many passes as it is deep. Brackets that do not
    match are left to the parser, which names the place.
    """
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return False
    rest = STRING.sub(b"", raw).translate(None, NOT_BRACKETS)
    for _ in range(limit):
        shorter = PAIR.sub(b"", rest)
        if len(shorter) == len(rest):
            return False
        rest = shorter
    return bool(rest)


def _refuse_unusual_numbers(raw: bytes) -> None:
    """Raise for NaN and Infinity, which Python's parsers read and JSON does not have, and for
    numbers so large that reading makes them infinite."""

    def refuse(name: str) -> None:
        raise MalformedBody(f"The body is not JSON: {name} is not a JSON number.")

    def read(number: str) -> float:
        if math.isinf(float(number)):
            raise MalformedBody(f"The number {number[:40]} in the body is too large.")
        return 0.0

    try:
        json.loads(raw, parse_constant=refuse, parse_float=read)
    except (ValueError, RecursionError):
        return  # not JSON at all: the one parser that counts says where


def _json_complaint(error: ValidationError) -> str:
    context = error.errors(include_url=False, include_input=False)[0].get("ctx") or {}
    return str(context.get("error", "it cannot be parsed"))


def _refusal(error: ValidationError, model: type[BaseModel], noun: str) -> InvalidRequest:
    """A validation error in words, each with the nearest name for one that is unknown."""
    found: list[FieldError] = []
    for entry in error.errors(include_url=False, include_input=False)[:MAX_REPORTED]:
        path = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            near = _nearest(model, entry["loc"])
            hint = f"Did you mean {near!r}?" if near else None
            found.append(FieldError(path=path, message=f"There is no such {noun}.", hint=hint))
        else:
            message = entry["msg"].removeprefix("Value error, ")
            found.append(FieldError(path=path, message=message[:1].upper() + message[1:]))
    first = found[0]
    where = f"{noun} {first.path!r}: " if first.path else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    detail = f"{where}{first.message.rstrip('.')}{more}."
    return InvalidRequest(
        detail[:1].upper() + detail[1:],
        hint=next((f.hint for f in found if f.hint), None) or "`/docs` lists what is accepted.",
        errors=found,
    )


def _nearest(model: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    owner: type[BaseModel] = model
    for part in location[:-1]:
        field = owner.model_fields.get(str(part))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return None
        owner = inner
    names = list(owner.model_fields)
    return next(iter(difflib.get_close_matches(str(location[-1]), names, n=1)), None)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


# Headers


def idempotency(
    headers: Mapping[str, str], method: str, path: str, raw: bytes
) -> Idempotency | None:
    """The caller's Idempotency-Key with the hash of method, path and canonical JSON body."""
    if "idempotency-key" not in headers:
        return None
    canonical = json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":"))
    return idempotency_of_text(headers, method, path, canonical)


def idempotency_of_text(
    headers: Mapping[str, str], method: str, path: str, text: str
) -> Idempotency | None:
    """The caller's Idempotency-Key with the hash of method, path and text."""
    key = headers.get("idempotency-key")
    if key is None:
        return None
    if not KEY.fullmatch(key):
        raise bad_header("Idempotency-Key", "It must be 1 to 255 visible ASCII characters.")
    digest = hashlib.sha256(f"{method}\n{path}\n{text}".encode("utf-8", "surrogatepass"))
    return Idempotency(key, digest.hexdigest())


def last_event_id(headers: Mapping[str, str]) -> int | None:
    """The sequence number after which a reader resumes, as browsers send it."""
    value = headers.get("last-event-id")
    if value is None or value == "":
        return None
    if not (value.isascii() and value.isdigit()) or int(value[:17]) > MAX_SEQ:
        raise bad_header("Last-Event-ID", f"{value[:40]!r} is not an event's sequence number.")
    return int(value)


def bad_header(name: str, message: str) -> InvalidRequest:
    """The refusal of a header."""
    return InvalidRequest(
        f"The header {name} is not valid: {message}",
        errors=[FieldError(path=name, message=message)],
    )


# Cursors


def encode_cursor(seq: int) -> str:
    """A place in a run's events, opaque to the caller."""
    return base64.urlsafe_b64encode(b"[%d]" % seq).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> int:
    """The place that ``encode_cursor`` packed. Raises ``InvalidCursor`` for anything else."""
    try:
        packed = base64.b64decode(
            cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True
        )
    except (ValueError, binascii.Error):
        packed = b""
    found = re.fullmatch(rb"\[([0-9]{1,15})\]", packed)
    if found is None:
        raise InvalidCursor(
            f"The cursor {cursor[:60]!r} was not made by this server.",
            hint="Pass `next_cursor` of the page before, unchanged, or leave the cursor out.",
        )
    return int(found[1])


def entity_tags(request: Request, header: str) -> frozenset[str] | None:
    """The entity tags of ``If-Match`` or ``If-None-Match``; None when it is not sent."""
    value = request.headers.get(header)
    if value is None:
        return None
    if value.strip() == "*":
        return frozenset("*")
    found = TAGS.findall(value)
    if not found or TAGS.sub("", value).strip():
        raise bad_header(header, "It must be `*`, or tags in quotes as ETag gave them.")
    return frozenset(found)
