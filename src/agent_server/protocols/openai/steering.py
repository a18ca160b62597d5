"""``response.steer``: what a client says, on its WebSocket, into a response that is under way.

Leans on the tale, which ends a response where the run heard something and goes on with the next.
Refuses to deliver it: the socket does, and keeps what was not heard.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Final

from agent_server.domain.base import JsonObject
from agent_server.protocols.openai.errors import refuse
from agent_server.protocols.openai.items import items_of
from agent_server.protocols.openai.responses import Asked

MAX_PENDING: Final = 16
"""Steers of one response that nothing heard yet."""
_KEYS: Final = frozenset({"type", "previous_response_id", "input"})
_MESSAGE: Final = frozenset({"type", "role", "content"})
_PARTS: Final = frozenset({"input_text", "input_image", "input_file"})


class SteerRefused(Exception):
    """Why something cannot be said into a response, with OpenAI's code for it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Steer:
    """What was accepted: ``given`` as the client sent it, ``items`` as the agent reads it."""

    id: str
    given: Any
    items: list[JsonObject]


@dataclass
class Live:
    """A response of a connection, under way in its ``lane``, and those that it goes on as."""

    asked: Asked
    lane: str | None
    steers: list[Steer]
    inbox: list[Any] = field(default_factory=list)
    """Where a run that is not stored finds what was said; see ``EphemeralContext``."""

    def __post_init__(self) -> None:
        self.tale = self.asked.told(onward=True)
        self._number = 0
        self._shifted = False

    @property
    def response_id(self) -> str | None:
        script = self.tale.script
        return None if script is None else str(script.response["id"])

    @property
    def ids(self) -> list[str]:
        """Of the response, and of those that it was before."""
        now = [self.response_id] if self.response_id is not None else []
        return [*now, *(told["id"] for _, told in self.tale.earlier)]

    def left(self) -> list[Steer]:
        """What the run did not hear."""
        return [steer for steer in self.steers if steer.id not in self.tale.heard]

    def check(self, target: str) -> None:
        """Raise ``SteerRefused`` where nothing can be said into the response ``target`` (any more)."""
        if self.response_id != target or self.tale.ended:
            raise SteerRefused(
                "response_already_completed", "The response has ended. Send it as the next one."
            )
        request = self.asked.request
        if request.agent is None or request.session_id is not None:
            what = "of a conversation" if request.agent else "of a goal or a workflow"
            raise SteerRefused(
                "steering_not_supported",
                f"A response {what} cannot be steered. Send it when it has ended.",
            )
        if len(self.left()) >= MAX_PENDING:
            raise SteerRefused(
                "too_many_pending_steers",
                f"{MAX_PENDING} steers wait to be heard already. Send it later.",
            )

    def event(self, kind: str, **values: Any) -> JsonObject:
        """An event of steering, with the next number of its response on this connection."""
        self._shifted = True
        self._number += 1
        return {"type": kind, **values, "sequence_number": self._number - 1}

    def told(self, frame: bytes) -> str:
        """An event as it stands in a stream, as a message: numbered with those of steering."""
        if frame.startswith(b"event: response.created\n"):
            self._number, self._shifted = 0, False
        text = message_of(frame)
        if self._shifted:
            text = json.dumps({**json.loads(text), "sequence_number": self._number})
        self._number += 1
        return text


def message_of(frame: bytes) -> str:
    """An event of a stream as a message."""
    return frame.partition(b"data: ")[2].strip().decode()


def check_form(event: JsonObject) -> None:
    """Raises ``InvalidRequest`` for what is no ``response.steer``: a text, or user's messages."""
    for name in sorted(set(event) - _KEYS):
        raise refuse(name, f"A response.steer has no {name!r}: the response names the lane.")
    given = event.get("input")
    if isinstance(given, str) and given:
        return
    if not isinstance(given, list) or not given:
        raise refuse("input", "'input' is a text, or a list of the user's messages; not empty.")
    for number, item in enumerate(given):
        place = f"input[{number}]"
        if not isinstance(item, dict) or item.get("role") != "user":
            raise refuse(place, f"{place!r} must be a message of the role 'user'.")
        if set(item) - _MESSAGE or item.get("type", "message") != "message":
            raise refuse(place, f"{place!r} has more than 'type', 'role' and 'content'.")
        content = item.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in _PARTS:
                raise refuse(f"{place}.content", f"{place!r}: texts, images and files alone.")


def failed(steer: JsonObject, code: str, message: str) -> JsonObject:
    """What a ``response.steer.failed`` says; ``steer`` is what is given back."""
    error = {"type": "invalid_request_error", "code": code, "message": message}
    return {"error": error, "steer": steer}


def required(response: JsonObject) -> list[JsonObject]:
    """What the client must send before its response goes on: stubs, without the results."""
    found: list[JsonObject] = []
    for item in response["output"]:
        if item["type"] == "function_call":
            name, call_id = item["name"], item["call_id"]
            found.append({"type": "function_call_output", "call_id": call_id, "name": name})
        elif item["type"] == "mcp_approval_request":
            found.append({"type": "mcp_approval_response", "approval_request_id": item["id"]})
    return found


def joined(steers: list[Steer], given: str | list[JsonObject] | None) -> list[JsonObject]:
    """``given`` with what was said before it in front; but for the outputs of calls, which a model
    wants right behind these."""
    items = items_of(given)
    first = next(
        (n for n, item in enumerate(items) if item.get("type") != "function_call_output"),
        len(items),
    )
    said = [item for steer in steers for item in items_of(steer.given)]
    return [*items[:first], *said, *items[first:]]
