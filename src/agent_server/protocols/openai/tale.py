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
from agent_server.protocols.openai.narrator import Narrator
from agent_server.protocols.openai.script import DONE, Script

_STATUSES = {RunStatus.QUEUED: "queued"}
_LAGGED = "The reader was too slow and was cut off."
_DRAINING = "The server is going down; the response goes on if it is stored."


class Tale:
    """The response of one run. It begins with the run's first event, which names the run."""

    def __init__(
        self,
        echo: JsonObject,
        *,
        events: bool,
        live: bool,
        last_only: bool = False,
        after: int = -1,
    ) -> None:
        self._echo = echo
        self._events = events
        self._live = live
        self._last_only = last_only
        self._after = after
        self.script: Script | None = None
        self.narrator: Narrator | None = None

    def feed(self, event: StoredEvent) -> None:
        if self.narrator is None or self.script is None:
            self._begin(json.loads(event.data))
            return
        if self.narrator.wants(event.type):
            value = json.loads(event.data)
            if event.type in TERMINAL:
                self.script.ended_at = moment(value["at"])
            self.narrator.feed(value)

    def _begin(self, created: JsonObject) -> None:
        script = Script(
            created["run_id"],
            moment(created["at"]),
            self._echo,
            events=self._events,
            after=self._after,
        )
        self.narrator = Narrator(script, live=self._live, last_only=self._last_only)
        script.tokens = self.narrator.tokens
        script.begin(queued=bool(self._echo.get("background")))
        self.script = script

    def take(self) -> list[bytes]:
        return self.script.take() if self.script is not None else []

    def response(self) -> JsonObject:
        assert self.script is not None
        return self.script.response


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def told(run: Run, request: RunRequest, events: Iterable[StoredEvent]) -> JsonObject:
    """The response as it stands."""
    tale = Tale(echo_of(request), events=False, live=False, last_only=in_form(request))
    for event in events:
        tale.feed(event)
    response = tale.response()
    if not run.status.ended:
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
        self, streams: Streams, follow: AbstractAsyncContextManager[Follow], tale: Tale
    ) -> None:
        super().__init__(streams, follow)
        self._tale = tale

    def frames(self, event: StoredEvent) -> Sequence[bytes]:
        self._tale.feed(event)
        return self._tale.take()

    def lagged_notice(self) -> bytes:
        return self._fault(_LAGGED)

    def draining_notice(self) -> bytes:
        return self._fault(_DRAINING)

    def _fault(self, message: str) -> bytes:
        script = self._tale.script
        return DONE if script is None else script.fault(message) + DONE
