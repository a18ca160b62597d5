"""What happens on other nodes, heard here: events and deltas of runs that are followed, new work,
ends of tasks, orders to stop.

Leans on the wire between the nodes, and on the store where the wire is not enough. Refuses to
decide anything: it wakes those who look for themselves.

A node says which runs its readers follow; only events of those are sent. Whatever the wire
loses is found by looking: every ``LOOK_S``, or every ``LOOK_UNWIRED_S`` while the wire is down,
one statement asks how far all followed runs have come.
"""

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog

from agent_server.domain.errors import AgentServerError
from agent_server.execution import store
from agent_server.execution.events import DELTA, EventHub, StoredEvent
from agent_server.execution.pause import wait_nudged
from agent_server.storage.database import Database
from agent_server.storage.wire import MAX_TEXT, Wire

log = structlog.get_logger(__name__)

WINDOW_S = 0.01
"""How long messages wait for others, to travel together."""
LOOK_S = 5.0
LOOK_UNWIRED_S = 0.5
WANTED_S = 3 * LOOK_S
"""How long another node's word that it follows a run is good for; it is given every look."""
MAX_PENDING = 10_000
"""Messages held for a wire that cannot keep up; then readers look for themselves."""
AT_ONCE = 500
"""Runs asked about in one statement."""
IDS_PER_MESSAGE = 100
UNHEARD = 1_000
"""Runs remembered of which something was said that nobody followed then: word that somebody does may
be on its way."""
TEXT = b',"text":'
"""What stands between the head of a delta, the same for each piece, and the piece."""

Message = list[Any]
"""``[kind, …]``; the kinds are the methods ``_on_…`` below."""


@dataclass(frozen=True)
class Ears:
    """Who is told of what is heard."""

    work: Callable[[], None]
    """There may be tasks to take."""
    ended: Callable[[str, str], None]
    """A task, by run id and path, has ended."""
    order: Callable[[str], None]
    """Somebody changed what is to happen with this run."""
    carries: Callable[[str], bool]
    """Whether a task of the run is carried out here."""
    hears_all: Callable[[str], bool]
    """Whether every task of the run that lives is carried out here."""


class Relay:
    """Joins this process's hub to those of the other nodes, from ``start`` to ``stop``."""

    def __init__(
        self, *, node: str, hub: EventHub, wire: Wire, database: Database, ears: Ears
    ) -> None:
        self._node = node
        self._hub = hub
        self._wire = wire
        self._database = database
        self._ears = ears
        self._wanted: dict[str, float] = {}
        self._fresh: dict[str, None] = {}
        self._seen: dict[str, int] = {}
        self._unheard: OrderedDict[str, None] = OrderedDict()
        self._pending: deque[Message] = deque()
        self._lost = False
        self._ready = asyncio.Event()
        self._look = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._hub.join(self)
        await self._wire.start(self._heard, self._turned)
        self._loops = [
            asyncio.create_task(self._send_loop(), name="relay-send"),
            asyncio.create_task(self._look_loop(), name="relay-look"),
        ]

    async def stop(self) -> None:
        self._hub.join(None)
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        if self._pending:
            await self._wire.send(packed(self._node, list(self._pending)))
        await self._wire.stop()

    # What the hub and the engine say ---------------------------------------------------------

    def wanted(self, run_id: str) -> bool:
        """Whether a reader on another node follows the run."""
        until = self._wanted.get(run_id)
        return until is not None and until > asyncio.get_running_loop().time()

    def publish(self, run_id: str, events: Iterable[StoredEvent]) -> None:
        """Carry events of a run to the nodes that follow it."""
        if self._nobody_follows(run_id):
            return
        for event in events:
            if event.type == DELTA:
                head, _, text = event.data.partition(TEXT)
                self._say(["delta", run_id, head.decode(), text[:-1].decode()])
            else:
                self._say(["event", run_id, event.seq, event.type, event.data.decode()])

    def followed(self, run_id: str) -> None:
        """A reader of the run has come, or it is no longer carried out here alone."""
        self._fresh[run_id] = None
        self._ready.set()

    def look(self, run_id: str) -> None:
        """Readers elsewhere must look for themselves."""
        if not self._nobody_follows(run_id):
            self._say(["look", run_id])

    def _nobody_follows(self, run_id: str) -> bool:
        if self.wanted(run_id):
            return False
        self._unheard[run_id] = None
        self._unheard.move_to_end(run_id)
        if len(self._unheard) > UNHEARD:
            self._unheard.popitem(last=False)
        return True

    def tell_work(self) -> None:
        """Other nodes may find tasks to take."""
        self._say(["work"])

    def tell_ended(self, run_id: str, path: str) -> None:
        self._say(["ended", run_id, path])

    def tell_order(self, run_id: str) -> None:
        self._say(["order", run_id])

    def _say(self, message: Message) -> None:
        if not self._wire.up:
            return
        if len(self._pending) >= MAX_PENDING:
            self._pending.clear()
            self._lost = True
        self._pending.append(message)
        self._ready.set()

    # Sending -----------------------------------------------------------------------------------

    async def _send_loop(self) -> None:
        while True:
            await self._ready.wait()
            await asyncio.sleep(WINDOW_S)
            self._ready.clear()
            fresh, self._fresh = self._fresh, {}
            messages = list(_in_pieces("follow", filter(self._foreign, fresh)))
            if self._lost:
                self._lost = False
                messages.append(["look"])
            messages += self._pending
            self._pending.clear()
            if messages:
                await self._wire.send(packed(self._node, messages))

    def _foreign(self, run_id: str) -> bool:
        return not self._ears.hears_all(run_id)

    # Hearing -----------------------------------------------------------------------------------

    def _turned(self, up: bool) -> None:
        if up:  # What was said meanwhile was not heard here, nor what was said here, there.
            self._say(["hello"])
            self._ears.work()
        self._seen.clear()
        self._look.set()

    def _heard(self, text: str) -> None:
        try:
            told = json.loads(text)
            if told["node"] == self._node:
                return
            for kind, *rest in told["say"]:
                hear = getattr(self, f"_on_{kind}", None)
                if hear is not None:  # Else a newer version says what this one need not know.
                    hear(*rest)
        except Exception:
            log.exception("what another node said cannot be read")

    def _on_hello(self) -> None:
        """A node that has heard nothing so far, and was not heard."""
        for run_id in self._hub.followed():
            self.followed(run_id)
        self._on_look()
        self._ears.work()

    def _on_follow(self, *run_ids: str) -> None:
        until = asyncio.get_running_loop().time() + WANTED_S
        for run_id in run_ids:
            if not self.wanted(run_id) and (run_id in self._unheard or self._ears.carries(run_id)):
                self._say(["look", run_id])  # It may have missed what was stored just now.
            self._unheard.pop(run_id, None)
            self._wanted[run_id] = until

    def _on_look(self, *run_ids: str) -> None:
        for run_id in run_ids or list(filter(self._foreign, self._hub.followed())):
            self._hub.rouse(run_id)

    def _on_event(self, run_id: str, seq: int, kind: str, data: str) -> None:
        self._seen[run_id] = max(seq, self._seen.get(run_id, 0))
        self._hub.hand_out(run_id, [StoredEvent(seq, kind, data.encode())])

    def _on_delta(self, run_id: str, head: str, *texts: str) -> None:
        start = head.encode() + TEXT
        self._hub.hand_out(
            run_id, [StoredEvent(None, DELTA, start + text.encode() + b"}") for text in texts]
        )

    def _on_work(self) -> None:
        self._ears.work()

    def _on_ended(self, run_id: str, path: str) -> None:
        self._ears.ended(run_id, path)

    def _on_order(self, run_id: str) -> None:
        self._ears.order(run_id)

    # Looking -----------------------------------------------------------------------------------

    async def _look_loop(self) -> None:
        while True:
            await wait_nudged(self._look, LOOK_S if self._wire.up else LOOK_UNWIRED_S)
            now = asyncio.get_running_loop().time()
            self._wanted = {run: until for run, until in self._wanted.items() if until > now}
            followed = list(filter(self._foreign, self._hub.followed()))
            self._seen = {run: self._seen[run] for run in followed if run in self._seen}
            for message in _in_pieces("follow", followed):
                self._say(message)
            try:
                for at in range(0, len(followed), AT_ONCE):
                    await self._look_at(followed[at : at + AT_ONCE])
            except AgentServerError as error:
                log.warning("cannot look at followed runs", error=error.detail)
            except Exception:
                log.exception("cannot look at followed runs")

    async def _look_at(self, run_ids: list[str]) -> None:
        for run_id, seq in (await self._database.read(lambda c: store.heads(c, run_ids))).items():
            if self._seen.get(run_id) != seq:
                self._seen[run_id] = seq
                self._hub.rouse(run_id)


def _in_pieces(kind: str, run_ids: Iterable[str]) -> Iterator[Message]:
    rest = iter(run_ids)
    while piece := list(islice(rest, IDS_PER_MESSAGE)):
        yield [kind, *piece]


def packed(node: str, messages: Iterable[Message]) -> list[str]:
    """``messages`` as texts of at most ``MAX_TEXT`` bytes, those of one run in order.

    Pieces of one text travel as one message. An event too large to travel becomes word to look;
    a piece of text that is, is left out: its whole text follows, stored.
    """
    start = f'{{"node":{json.dumps(node)},"say":['
    room = MAX_TEXT - len(start) - 2
    texts: list[str] = []
    parts: list[str] = []
    size = 0
    for message in _joined(messages, room):
        part = json.dumps(message, separators=(",", ":"))
        if len(part) > room:
            if message[0] != "event":
                continue
            part = json.dumps(["look", message[1]], separators=(",", ":"))
        if size + len(part) + 1 > room:
            texts.append(start + ",".join(parts) + "]}")
            parts, size = [], 0
        parts.append(part)
        size += len(part) + 1
    if parts:
        texts.append(start + ",".join(parts) + "]}")
    return texts


def _joined(messages: Iterable[Message], room: int) -> list[Message]:
    """The same, with deltas joined to the delta before of the same run and head."""
    joined: list[Message] = []
    last: dict[str, tuple[Message, int]] = {}
    for message in messages:
        if message[0] == "delta":
            _, run_id, head, text = message
            size = 2 * len(text)  # At most: quotes and backslashes are escaped once more.
            before, grown = last.get(run_id, (None, 0))
            if before is not None and before[:3] == message[:3] and grown + size < room:
                before.append(text)
                last[run_id] = (before, grown + size)
                continue
            last[run_id] = (message, 2 * len(head) + len(run_id) + size + 50)
        elif len(message) > 1:
            last.pop(message[1], None)
        joined.append(message)
    return joined
