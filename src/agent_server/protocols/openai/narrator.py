"""A run's events as what a model's answer is made of: texts, thoughts, calls, an end.

Leans on the names of our events. Refuses to know OpenAI's wire forms: a ``Teller`` writes them.
The same events give the same tale, live or read back later, so that a stream can be resumed.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Final, Protocol

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, ModelIncomplete, RunCancelled

ROOT: Final = re.compile(r"model/\d+")
"""The model calls of a run's own agent. Others are inside a tool, an approach or a task."""
_QUIET: Final = frozenset({"run.created", "run.started", "message.delta"})


@dataclass
class Tokens:
    """What the model calls of a run used."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


class Teller(Protocol):
    """Writes one of OpenAI's forms. Texts are opened, said in pieces, and closed."""

    def open_text(self) -> None: ...
    def say(self, text: str) -> None: ...
    def close_text(self, text: str, complete: bool) -> None: ...
    def think(self, text: str) -> None: ...
    def call(self, call_id: str, name: str, arguments: str) -> None: ...
    def end(self, status: str, error: ErrorInfo | None, reason: str | None) -> None: ...


class Narrator:
    """Feeds a ``Teller``. ``ended`` is set with the run's last event.

    With ``live`` the deltas are told as they come; without, a message is told when it is whole, in
    the pieces in which it came. With ``last_only`` nothing is told but the final answer, as text
    that is asked for in a form must be.
    """

    def __init__(self, teller: Teller, *, live: bool, last_only: bool = False) -> None:
        self.tokens = Tokens()
        self.ended = False
        self.waiting: JsonObject | None = None
        self._teller = teller
        self._live = live
        self._last_only = last_only and not live
        self._open = False
        self._said: list[str] = []
        self._last: str | None = None
        self._called = False
        self._cut = False

    def wants(self, kind: str) -> bool:
        """Whether ``feed`` does anything with events of that type."""
        return kind not in _QUIET or (self._live and kind == "message.delta")

    def feed(self, event: JsonObject) -> None:
        kind = event["type"]
        if kind == "message.delta":
            if self._live and ROOT.fullmatch(event["step"]):
                self._piece(event["text"])
        elif kind == "message.completed":
            if ROOT.fullmatch(event["step"]) and not self._last_only:
                self._message(event)
        elif kind == "step.completed":
            if event["kind"] == "model":
                self._count(event)
        elif kind == "tool.requested":
            self._called = True
            self._teller.call(event["call_id"], event["tool"], event["arguments"])
        elif kind == "run.waiting":
            self.waiting = event["waiting_for"]
        elif kind == "run.resumed":
            self.waiting = None
        elif kind.startswith("run."):
            self._end(kind, event)
        else:
            thought = _thought(kind, event)
            if thought and not self._last_only:
                self._teller.think(thought)

    def _piece(self, text: str) -> None:
        if not self._open:
            self._open = True
            self._teller.open_text()
        self._said.append(text)
        self._teller.say(text)

    def _message(self, event: JsonObject) -> None:
        text = event["text"]
        if self._open:
            said = "".join(self._said)
            if text.startswith(said) and len(text) > len(said):
                self._teller.say(text[len(said) :])
        else:
            self._teller.open_text()
            start = 0
            for length in event.get("pieces") or (len(text),):
                self._teller.say(text[start : start + length])
                start += length
        self._cut = bool(event.get("incomplete"))
        self._teller.close_text(text, not self._cut)
        self._open, self._said, self._last = False, [], text

    def _count(self, event: JsonObject) -> None:
        usage, tokens = event["usage"], self.tokens
        tokens.input += usage["input_tokens"]
        tokens.output += usage["output_tokens"]
        tokens.cached += event.get("cached_tokens", 0)
        tokens.reasoning += event.get("reasoning_tokens", 0)

    def _end(self, kind: str, event: JsonObject) -> None:
        if kind not in ("run.succeeded", "run.failed", "run.cancelled", "run.budget_exceeded"):
            return
        self.ended = True
        if kind == "run.succeeded":
            output = event.get("output")
            if not self._called and not _same(self._last, output):
                text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
                self._teller.open_text()
                self._teller.say(text)
                self._teller.close_text(text, True)
            self._teller.end("completed", None, None)
            return
        if self._open:
            self._teller.close_text("".join(self._said), False)
        if kind == "run.cancelled":
            error = ErrorInfo(code=RunCancelled.code, message="The run was cancelled.")
            self._teller.end("cancelled", error, None)
            return
        error = ErrorInfo.model_validate(event["error"])
        if error.code == ModelIncomplete.code:
            filtered = "content_filter" in error.message
            self._teller.end("incomplete", error, _REASONS[filtered])
        else:
            self._teller.end("failed", error, None)


_REASONS: Final = {True: "content_filter", False: "max_output_tokens"}


def _same(text: str | None, output: Any) -> bool:
    if text is None:
        return False
    if isinstance(output, str):
        return output == text
    try:
        return bool(json.loads(text) == output)
    except ValueError:
        return False


def _thought(kind: str, event: JsonObject) -> str | None:
    """Progress, as one line of reasoning. Pieces of the work inside a tool are not told."""
    if kind == "reasoning.completed":
        return str(event["text"]) if ROOT.fullmatch(event["step"]) else None
    if kind == "step.started":
        return f"Tool {event['name']} is called." if event["kind"] == "tool" else None
    if kind == "step.failed":
        message = event["error"]["message"]
        return f"Tool {event['name']} failed: {message}" if event["kind"] == "tool" else None
    if kind in ("plan.created", "plan.revised"):
        tasks = event["plan"]["tasks"]
        lines = "\n".join(f"- {task['id']}: {task['description']}" for task in tasks)
        return ("Plan:\n" if kind == "plan.created" else "Revised plan:\n") + lines
    if kind == "task.started":
        return f"Task {event['node']} begins. {event.get('description') or ''}".strip()
    if kind == "task.completed":
        return f"Task {event['node']} is done."
    if kind == "task.failed":
        return f"Task {event['node']} failed: {event['error']['message']}"
    return None
