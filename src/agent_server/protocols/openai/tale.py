"""A run read as a response: from its events, into an object or a stream.

Leans on the narrator and the script, and on ``api`` for streams. Refuses to know requests.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime

from agent_server.api.ports import Follow
from agent_server.api.sse import EventStream, Streams
from agent_server.domain.base import JsonObject
from agent_server.domain.runs import Run, RunRequest, RunStatus
from agent_server.execution.events import TERMINAL, StoredEvent
from agent_server.protocols.openai.items import CONSENT, STEERED_BASE, input_items
from agent_server.protocols.openai.names import consent_id, no_response, response_id
from agent_server.protocols.openai.narrator import Narrator
from agent_server.protocols.openai.script import DONE, Script

_STATUSES = {RunStatus.QUEUED: "queued"}
_BETWEEN = frozenset(
    {"message.completed", "reasoning.completed", "step.started", "step.completed", "step.failed"}
    | {"plan.created", "plan.revised", "task.started", "task.completed", "task.failed"}
)
"""What other tasks of a run may do while one of them stands still for a consent."""
_LAGGED = "The reader was too slow and was cut off."
_DRAINING = "The server is going down; the response goes on if it is stored."


class Tale:
    """One response of a run: its ``part``, counted from 0. It begins with the run's first event,
    which names the run, and ends with the last; or where the run stands still for people's
    consent, which is asked for in the output: the next part begins with what they decide. Or where
    a ``response.steer`` was heard, which the next part begins with; with ``onward`` that is told
    at once, as what is wanted from then on, and those before are in ``earlier``.
    """

    def __init__(
        self,
        echo: JsonObject,
        *,
        events: bool,
        live: bool,
        last_only: bool = False,
        after: int = -1,
        part: int = 0,
        onward: bool = False,
    ) -> None:
        self._onward = onward
        self._left: list[bytes] = []
        self._turned = False
        self._said = STEERED_BASE
        self._echo = echo
        self._events = events
        self._live = live
        self._last_only = last_only
        self._after = after
        self._wanted = part
        self._now = -1
        self._told = 0
        self._asked: dict[str, JsonObject] = {}
        self._between: list[JsonObject] = []
        self._run_id = ""
        self._script: Script | None = None
        self.narrator: Narrator | None = None
        self.parts = 0
        """How many parts have begun."""
        self.decided: list[JsonObject] = []
        """What people decided or said in this part, as items of its input."""
        self.earlier: list[tuple[list[JsonObject], JsonObject]] = []
        """What was ``decided`` in each part before, and its response."""
        self.heard: set[str] = set()
        """The ids of what was said into the run."""
        self.ended = False

    @property
    def script(self) -> Script | None:
        """The part that is wanted, once it has begun."""
        return self._script if self._now == self._wanted else None

    def feed(self, event: StoredEvent) -> None:
        if self.ended:
            return
        if not self._run_id:
            created = json.loads(event.data)
            self._run_id = created["run_id"]
            self._begin(created)
        elif event.type == "run.steered":
            self._steered(json.loads(event.data))
        elif event.type.startswith("approval."):
            self._consent(json.loads(event.data))
        elif self.narrator is None:
            if event.type in _BETWEEN:
                self._between.append(json.loads(event.data))
        elif self.narrator.wants(event.type):
            value = json.loads(event.data)
            if event.type == "run.waiting" and value["waiting_for"]["kind"] == "approval":
                self._pause(value)
            else:
                self._tell(event.type, value)

    def _begin(self, first: JsonObject) -> None:
        self._now += 1
        self.parts += 1
        wanted = self._now == self._wanted
        echo = self._echo
        if self._now:
            echo = {**echo, "previous_response_id": response_id(self._run_id, self._now - 1)}
        script = Script(
            self._run_id,
            moment(first["at"]),
            echo,
            events=self._events and wanted,
            after=self._after,
            part=self._now,
            first=self._told,
        )
        live = self._live and wanted
        self.narrator = Narrator(script, live=live, last_only=self._last_only)
        script.tokens = self.narrator.tokens
        script.begin(queued=bool(self._echo.get("background")))
        self._script = script

    def _tell(self, kind: str, value: JsonObject) -> None:
        assert self._script is not None and self.narrator is not None
        self._turned = False
        if kind in TERMINAL:
            self._script.ended_at = moment(value["at"])
        self.narrator.feed(value)
        self.ended = self.narrator.ended and self._now == self._wanted

    def _consent(self, event: JsonObject) -> None:
        if event["type"] == "approval.requested":
            self._asked[event["approval_id"]] = event
        elif event["type"] == "approval.decided":
            self._asked.pop(event["approval_id"], None)
            if self.narrator is None:
                self._begin(event)
                between, self._between = self._between, []
                for value in between:
                    self._tell(value["type"], value)
            if self._now == self._wanted:
                self.decided.append(
                    {
                        "id": consent_id(event["approval_id"]) + "_response",
                        "type": CONSENT,
                        "approval_request_id": consent_id(event["approval_id"]),
                        "request_id": consent_id(event["approval_id"]),
                        "approve": event["decision"] == "approve",
                        "reason": None,
                    }
                )

    def _pause(self, waiting: JsonObject) -> None:
        """The end of a part, if something is asked that was not asked before."""
        if not self._asked or self._script is None:
            return
        for one in self._asked.values():
            self._script.consent(one["approval_id"], one["tool"], one["arguments"])
        self._asked.clear()
        self._script.ended_at = moment(waiting["at"])
        self._script.end("completed", None, None)
        self._told += len(self._script.output)
        self.ended = self._now == self._wanted
        self.narrator = None

    def _steered(self, event: JsonObject) -> None:
        """A part ends and the next one begins, once for all that is heard at the same turn."""
        if event.get("steer_id") is None or self._script is None:
            return
        self.heard.add(event["steer_id"])
        if not self._turned:
            self._script.ended_at = moment(event["at"])
            self._script.end("incomplete", None, "steered")
            self._told += len(self._script.output)
            self.ended = self._now == self._wanted and not self._onward
            if self.ended:
                return
            if self._now == self._wanted:
                self._left += self._script.take()
                self.earlier.append((self.decided, self._script.response))
                self.decided = []
                self._wanted += 1
            self._begin(event)
            self._turned = True
        if self._now == self._wanted:
            items = input_items(self._run_id, event["input"], self._said)
            self._said += len(items)
            self.decided += items

    def take(self) -> list[bytes]:
        left, self._left = self._left, []
        return [*left, *self.script.take()] if self.script is not None else left

    def response(self) -> JsonObject:
        """Raises ``NotFound`` for a part that has not begun."""
        if self.script is None:
            raise no_response(response_id(self._run_id, self._wanted))
        return self.script.response


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def told(run: Run, request: RunRequest, events: Iterable[StoredEvent], part: int) -> JsonObject:
    """The response as it stands. Raises ``NotFound`` for a part that has not begun."""
    form = in_form(request)
    tale = Tale(echo_of(request), events=False, live=False, last_only=form, part=part)
    for event in events:
        tale.feed(event)
    response = tale.response()
    if not tale.ended:
        response["status"] = _STATUSES.get(run.status, "in_progress")
    return response


def echo_of(request: RunRequest) -> JsonObject:
    return request.options.echo if request.options is not None else {}


def in_form(request: RunRequest) -> bool:
    """Whether the answer alone counts, since a form was asked for that earlier texts miss."""
    return request.options is not None and request.options.output_schema is not None


class TaleStream(EventStream):
    """A response as Server-Sent Events."""

    closing = DONE

    def __init__(
        self,
        streams: Streams,
        key: str,
        follow: AbstractAsyncContextManager[Follow],
        tale: Tale,
    ) -> None:
        super().__init__(streams, key, follow)
        self._tale = tale

    def frames(self, event: StoredEvent) -> Sequence[bytes]:
        self._tale.feed(event)
        return self._tale.take()

    def ended(self, event: StoredEvent) -> bool:
        return self._tale.ended or super().ended(event)

    def lagged_notice(self) -> bytes:
        return self._fault(_LAGGED)

    def draining_notice(self) -> bytes:
        return self._fault(_DRAINING)

    def _fault(self, message: str) -> bytes:
        script = self._tale.script
        return DONE if script is None else script.fault(message) + DONE
