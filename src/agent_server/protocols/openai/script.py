"""A run told as a response: its object, and its events in their order and numbers.

Leans on the narrator, which calls it. Refuses to know where events go: ``take`` gives what was
written since, one event each.
"""

import json
from datetime import datetime
from typing import Any, Final

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, ModelRateLimited
from agent_server.protocols.openai.names import consent_id, item_id, response_id
from agent_server.protocols.openai.narrator import Tokens

SERVER_LABEL: Final = "agent-server"
DONE: Final = b"data: [DONE]\n\n"


def sse(event: JsonObject) -> bytes:
    """One event in one write."""
    data = json.dumps(event, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()


class Script:
    """See ``narrator.Teller``. ``echo`` is what the response repeats of its request.

    Without ``events`` the object alone is made. Events up to number ``after`` are not given out.
    ``part`` is which part of its run it tells, ``first`` how many items were told before.
    """

    def __init__(
        self,
        run_id: str,
        created_at: datetime,
        echo: JsonObject,
        *,
        events: bool,
        after: int = -1,
        part: int = 0,
        first: int = 0,
    ) -> None:
        self.tokens = Tokens()
        self.ended_at = created_at
        self.response: JsonObject = {
            "id": response_id(run_id, part),
            "object": "response",
            "created_at": int(created_at.timestamp()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **echo,
        }
        self._run_id = run_id
        self._first = first
        self._events = events
        self._after = after
        self._number = 0
        self._written: list[JsonObject | bytes] = []
        self._item: JsonObject | None = None
        self._head = ""
        self._tail = ""

    @property
    def output(self) -> list[JsonObject]:
        found: list[JsonObject] = self.response["output"]
        return found

    def take(self) -> list[bytes]:
        """What was written since, as Server-Sent Events."""
        written, self._written = self._written, []
        return [one if isinstance(one, bytes) else sse(one) for one in written]

    def begin(self, queued: bool = False) -> None:
        """The first events; call it before the narrator."""
        if queued:
            self.response["status"] = "queued"
        self._write("response.created", response=self._copy())
        if queued:
            self._write("response.queued", response=self._copy())
            self.response["status"] = "in_progress"
        self._write("response.in_progress", response=self._copy())

    def open_text(self) -> None:
        item: JsonObject = {
            "id": self._item_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._item = item
        index = len(self.output)
        self._write("response.output_item.added", output_index=index, item=dict(item))
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        self._write("response.content_part.added", **place, part=_part(""))
        if self._events:
            head = json.dumps({"type": "response.output_text.delta", **place})[:-1]
            self._head = "event: response.output_text.delta\ndata: " + head + ', "delta": '
            self._tail = ', "logprobs": [], "sequence_number": '

    def say(self, text: str) -> None:
        number = self._number
        self._number += 1
        if self._events and number > self._after:
            line = f"{self._head}{json.dumps(text)}{self._tail}{number}}}\n\n"
            self._written.append(line.encode())

    def close_text(self, text: str, complete: bool) -> None:
        assert self._item is not None
        index = len(self.output)
        place = {"item_id": self._item["id"], "output_index": index, "content_index": 0}
        self._write("response.output_text.done", **place, text=text, logprobs=[])
        self._write("response.content_part.done", **place, part=_part(text))
        status = "completed" if complete else "incomplete"
        self._finish({**self._item, "status": status, "content": [_part(text)]})

    def think(self, text: str) -> None:
        index = len(self.output)
        identity = self._item_id("rs")
        item: JsonObject = {
            "id": identity,
            "type": "reasoning",
            "summary": [],
            "encrypted_content": None,
            "status": "in_progress",
        }
        self._write("response.output_item.added", output_index=index, item=dict(item))
        place = {"item_id": identity, "output_index": index, "summary_index": 0}
        part = {"type": "summary_text", "text": text}
        empty = {"type": "summary_text", "text": ""}
        self._write("response.reasoning_summary_part.added", **place, part=empty)
        self._write("response.reasoning_summary_text.delta", **place, delta=text)
        self._write("response.reasoning_summary_text.done", **place, text=text)
        self._write("response.reasoning_summary_part.done", **place, part=part)
        self._finish({**item, "summary": [part], "status": "completed"})

    def call(self, call_id: str, name: str, arguments: str) -> None:
        index = len(self.output)
        item: JsonObject = {
            "id": self._item_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "arguments": "",
            "call_id": call_id,
            "name": name,
        }
        self._write("response.output_item.added", output_index=index, item=dict(item))
        place = {"item_id": item["id"], "output_index": index}
        self._write("response.function_call_arguments.delta", **place, delta=arguments)
        self._write(
            "response.function_call_arguments.done", **place, name=name, arguments=arguments
        )
        self._finish({**item, "arguments": arguments, "status": "completed"})

    def consent(self, approval_id: str, name: str, arguments: Any) -> None:
        """A call of the server's that a person is asked about."""
        item: JsonObject = {
            "id": consent_id(approval_id),
            "type": "mcp_approval_request",
            "server_label": SERVER_LABEL,
            "name": name,
            "arguments": json.dumps(arguments),
        }
        self._write("response.output_item.added", output_index=len(self.output), item=item)
        self._finish(item)

    def end(self, status: str, error: ErrorInfo | None, reason: str | None) -> None:
        response, used = self.response, self.tokens
        response["status"] = status
        if status == "completed":
            response["completed_at"] = int(self.ended_at.timestamp())
        if status == "failed" and error is not None:
            response["error"] = _failure(error)
        if reason is not None:
            response["incomplete_details"] = {"reason": reason}
        response["usage"] = {
            "input_tokens": used.input,
            "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
            "output_tokens": used.output,
            "output_tokens_details": {"reasoning_tokens": used.reasoning},
            "total_tokens": used.input + used.output,
        }
        kind = _ENDS[status]
        self._write(kind, response=self._copy())

    def fault(self, message: str, code: str = "server_error") -> bytes:
        """The terminal event of a stream that ends before its response does."""
        event = {"type": "error", "code": code, "message": message, "param": None}
        return sse({**event, "sequence_number": self._number})

    def _item_id(self, prefix: str) -> str:
        return item_id(prefix, self._run_id, self._first + len(self.output))

    def _finish(self, item: JsonObject) -> None:
        index = len(self.output)
        self.output.append(item)
        self._item = None
        self._write("response.output_item.done", output_index=index, item=item)

    def _copy(self) -> JsonObject:
        return {**self.response, "output": list(self.output)} if self._events else self.response

    def _write(self, kind: str, **values: Any) -> None:
        number = self._number
        self._number += 1
        if self._events and number > self._after:
            self._written.append({"type": kind, **values, "sequence_number": number})


_ENDS: Final = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "cancelled": "response.failed",
}


def _part(text: str) -> JsonObject:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _failure(error: ErrorInfo) -> JsonObject:
    """OpenAI's codes are few and closed; ours is in the message.

    ``type`` and ``param`` are no part of OpenAI's own form: Vercel's AI SDK reads no error without.
    """
    limited = error.code == ModelRateLimited.code
    said = f"{error.message} {error.hint}" if error.hint else error.message
    code = "rate_limit_exceeded" if limited else "server_error"
    said = f"{said} ({error.code})"
    return {"code": code, "message": said, "type": code, "param": None}
