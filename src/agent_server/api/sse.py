"""Event streams: one event in one write, a ping where it is quiet, an end that says why.

Leans on ASGI and anyio directly, because a general streaming response costs more per event than
all of this. Refuses to know where events come from (``Follow``), and never touches the run: a
reader that goes away takes nothing with it.
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, get_args

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent_server.api.door import LATER
from agent_server.api.ports import Follow
from agent_server.domain.errors import RateLimited
from agent_server.domain.events import Event
from agent_server.execution.events import StoredEvent

TICKS = 15
"""Parts of a ping's interval: how finely quiet is measured."""
STALLED_TICKS = 4 * TICKS
"""A write that took this long has no reader; the stream is given up."""
RETRY_MS: Final = 1_000
PING: Final = b": ping\n\n"
ENDING: Final = frozenset(
    kind.model_fields["type"].default for kind in get_args(get_args(Event)[0]) if kind.ends_run
)
"""The types of event after which a run says nothing more."""

_heads: dict[str, bytes] = {}


def encode(event: StoredEvent) -> bytes:
    """``event`` as Server-Sent Events frame it; deltas have no ``id``."""
    head = _heads.get(event.type)
    if head is None:
        head = _heads[event.type] = f"event: {event.type}\ndata: ".encode()
    if event.seq is None:
        return head + event.data + b"\n\n"
    return b"id: %d\n" % event.seq + head + event.data + b"\n\n"


def notice(kind: str, detail: str) -> bytes:
    """An event about the stream itself: no ``id``, so that a resumed stream misses nothing."""
    data = json.dumps({"type": kind, "detail": detail}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\nretry: {RETRY_MS}\n\n".encode()


LAGGED: Final = notice(
    "stream.lagged",
    "The reader was too slow and was cut off. Resume after the last event id that arrived.",
)
DRAINING: Final = notice(
    "server.draining",
    "The server is going down. The run goes on: resume after the last event id that arrived.",
)


def _nothing(*_: object) -> None:
    """Told of streams where nobody counts them."""


class Streams:
    """The streams that are open in this process: their number, their pings, their end.

    ``drain()`` ends all of them, and every long poll, with word of why. ``on_close`` is told
    whether the stream was cut because its reader was too slow.
    """

    def __init__(
        self,
        *,
        limit: int,
        ping_s: float,
        per_key: int | None = None,
        on_open: Callable[[], None] = _nothing,
        on_close: Callable[[bool], None] = _nothing,
    ) -> None:
        self.limit = limit
        self.per_key = per_key or limit
        self._of_key: Counter[str] = Counter()
        self._on_open = on_open
        self._on_close = on_close
        self.draining = False
        self.tick = 0
        self._tick_s = ping_s / TICKS
        self._open: set[EventStream] = set()
        self._polls: set[anyio.CancelScope] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        return len(self._open)

    def drain(self) -> None:
        """End every stream and long poll now, and every later one at once."""
        self.draining = True
        for stream in self._open:
            stream.stop()
        for poll in self._polls:
            poll.cancel()

    def poll(self, timeout_s: float = math.inf) -> "Poll":
        """Around a wait: it ends early, without an error, after ``timeout_s`` or on a drain."""
        return Poll(self._polls, self.draining, timeout_s)

    def check_room(self, key: str) -> None:
        """Raise ``RateLimited`` when no further stream may open for the principal ``key``."""
        for open_now, limit, whose, knob in (
            (self._of_key[key], self.per_key, f" of the key {key!r}", "MAX_STREAMS_PER_KEY"),
            (len(self._open), self.limit, "", "MAX_STREAMS"),
        ):
            if open_now >= limit:
                raise RateLimited(
                    f"{limit} event streams{whose} are open, which is the limit.",
                    hint=f"Close one, or raise AGENT_SERVER_{knob}.",
                    headers={"Retry-After": "5"},
                )

    def add(self, stream: "EventStream") -> None:
        self._open.add(stream)
        self._of_key[stream.key] += 1
        self._on_open()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._on_tick)

    def discard(self, stream: "EventStream") -> None:
        self._open.discard(stream)
        self._of_key[stream.key] -= 1
        self._on_close(stream.lagged)
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_tick(self) -> None:
        self.tick += 1
        for stream in tuple(self._open):
            stream.on_tick(self.tick)
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._on_tick)


class Poll:
    """A wait that ends early, without an error, when the server drains or time is over."""

    def __init__(self, polls: set[anyio.CancelScope], draining: bool, timeout_s: float) -> None:
        self._polls = polls
        self._scope = anyio.CancelScope(deadline=anyio.current_time() + timeout_s)
        if draining:
            self._scope.cancel()

    def __enter__(self) -> "Poll":
        self._scope.__enter__()
        self._polls.add(self._scope)
        return self

    def __exit__(self, *error: object) -> bool | None:
        self._polls.discard(self._scope)
        return self._scope.__exit__(*error)  # type: ignore[arg-type]


class EventStream(Response):
    """A run's events as an answer. Errors of ``follow`` before the first byte become problems."""

    media_type = "text/event-stream"

    def __init__(
        self,
        streams: Streams,
        key: str,
        follow: AbstractAsyncContextManager[Follow],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``key`` is the name of the principal that reads."""
        streams.check_room(key)
        self.key = key
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        for name, value in (headers or {}).items():
            self.raw_headers.append((name.lower().encode(), value.encode("latin-1")))
        self._streams = streams
        self._follow = follow
        self._scope: anyio.CancelScope | None = None
        self._send: Send | None = None
        self._writing = False
        self._pinging: asyncio.Task[None] | None = None
        self.lagged = False
        self._gone = False
        self._stopped = False
        self._mark = 0

    closing = b""
    """What is written behind the run's last event."""

    def frames(self, event: StoredEvent) -> Sequence[bytes]:
        """What is written of ``event``, each in one write."""
        return (encode(event),)

    def ended(self, event: StoredEvent) -> bool:
        """Whether nothing is to come behind ``event``."""
        return event.type in ENDING

    def lagged_notice(self) -> bytes:
        return LAGGED

    def draining_notice(self) -> bytes:
        return DRAINING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Step aside until the framework has unwound: the door then calls ``serve``.

        A stream may stay open for hours, and what the framework holds for a request is several
        times what a stream needs.
        """
        scope[LATER].append(self.serve)

    async def serve(self, receive: Receive, start: Send, send: Send) -> None:
        async with self._follow as follow:
            await start(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            self._send = send
            self._mark = self._streams.tick
            last = b""
            self._streams.add(self)
            watch = asyncio.get_running_loop().create_task(self._watch(receive))
            try:
                with anyio.CancelScope() as self._scope:
                    if self._streams.draining:
                        self.stop()
                    last = await self._pump(follow, send)
            finally:
                watch.cancel()
                if self._pinging is not None:
                    self._pinging.cancel()
                self._scope = None
                self._send = None
                self._streams.discard(self)
        if self._stopped:
            last = self.draining_notice()
        if not self._gone:
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pump(self, follow: Follow, send: Send) -> bytes:
        """Write events until the run's last one; return what to write at the very end."""
        async for batch in follow.batches():
            self._writing = True
            if await self._write(batch, send):
                return self.closing
            self._writing = False
            self._mark = self._streams.tick
            del batch  # It would live until the next event, which may be hours.
        if not follow.lagged:
            return b""
        self.lagged = True
        return self.lagged_notice()

    async def _write(self, batch: Sequence[StoredEvent], send: Send) -> bool:
        """Write these events; whether the run's last one was among them."""
        for event in batch:
            if self._pinging is not None:
                await self._pinging
            for frame in self.frames(event):
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            if self.ended(event):
                return True
        return False

    async def _watch(self, receive: Receive) -> None:
        """Wait for the reader to go away, then stop."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._scope is not None:
            self._scope.cancel()

    def stop(self) -> None:
        """End with word that the server drains. A write that nobody reads is not waited for."""
        self._stopped = True
        if self._writing or self._pinging:
            self._gone = True
        if self._scope is not None:
            self._scope.cancel()

    def on_tick(self, tick: int) -> None:
        quiet = tick - self._mark
        if self._scope is None or quiet < TICKS - 1:
            return
        if not (self._writing or self._pinging):
            self._pinging = asyncio.get_running_loop().create_task(self._ping())
        elif quiet >= STALLED_TICKS:
            self._gone = True
            self._scope.cancel()

    async def _ping(self) -> None:
        """A comment into the quiet. Its task belongs to this stream, which ends it."""
        try:
            if self._send is not None:
                await self._send({"type": "http.response.body", "body": PING, "more_body": True})
                self._mark = self._streams.tick
        finally:
            self._pinging = None
