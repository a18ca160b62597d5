"""References: the text of a JSON column whose large parts are kept elsewhere, as blobs.

Leans on nothing of ours; a column type asks it, and ``outside`` answers. Refuses to keep or to fetch
anything: it says which blobs a transaction needs, and the transaction is run again with them.

A text with references begins with ``@``, which no JSON does; behind it stand the tenant and the key
under which a reference stands in the rest, as a JSON list, and then the rest. That key occurs nowhere
else in the value, so that nothing a user writes is taken for a reference.

What is cut out of a value are its smallest parts that are over the limit. So the same part is the same
blob wherever it stands: in the output of a task, among the arguments of the next, and in an event.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

MARK: Final = "@"
LEAST: Final = 1_024
"""Bytes of JSON that always stand in their row."""
NAME: Final = "$blob"
MAX_DEPTH: Final = 12
"""Levels below which a large part is not looked into, and is one blob."""

encode = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: ``json.dumps`` would make one for each value."""
_decoder = json.JSONDecoder()


class Elsewhere(Exception):
    """The transaction needs blobs that are not there yet. It was rolled back, and is to be run
    again."""


class NotLoaded(Elsewhere):
    """It read references: ``keys`` are the blobs, each with its tenant."""

    def __init__(self, keys: "set[tuple[str, str]]") -> None:
        super().__init__(f"{len(keys)} blobs are not loaded")
        self.keys = keys


class Opening:
    """What one run of a transaction reads by reference: ``loaded`` has the JSON of blobs by key,
    ``lost`` why there is none."""

    def __init__(self, loaded: dict[str, bytes], lost: dict[str, str]) -> None:
        self._loaded = loaded
        self._lost = lost
        self.missing: set[tuple[str, str]] = set()

    def part(self, tenant: str, key: str) -> Any:
        """Raises ``ValueError`` for one that is lost."""
        data = self._loaded.get(key)
        if data is not None:
            return json.loads(data)
        if key in self._lost:
            raise ValueError(self._lost[key])
        self.missing.add((tenant, key))
        return None


class Spilling:
    """What one run of a transaction stores by reference: each text over ``limit`` bytes, if it or
    all its pieces are blobs by now. ``wanted`` are those that are not."""

    def __init__(self, limit: int, tenant: str, run_id: str, known: "Known") -> None:
        self.limit = limit
        self.run_id = run_id
        """Whose rows are stored just now."""
        self._tenant = tenant
        self._known = known
        self.wanted: set[str] = set()
        self.used: set[tuple[str, str, str]] = set()
        """The run, the key of the blob, and the table of the row that refers to it."""

    def text(self, text: str, table: str) -> str:
        placed = self._known.texts.get(text) or self._fitted(text)
        if placed is None:
            self.wanted.add(text)
            return text
        self.used.update((self.run_id, key, table) for key in placed.keys)
        return placed.text

    def _fitted(self, text: str) -> "Placed | None":
        """Made anew each time that the transaction runs (by an event's moment, say), but perhaps of
        the same pieces."""
        if not self._known.pieces:
            return None
        cut = Cut(text, self.limit)
        for piece in cut.pieces:
            piece.key = self._known.pieces.get(piece.data, "")
            if not piece.key:
                return None
        return cut.stored(self._tenant)


class Known:
    """What of a transaction's large values is stored by now."""

    def __init__(self) -> None:
        self.texts: dict[str, Placed] = {}
        self.pieces: dict[bytes, str] = {}
        """Bytes to keys."""

    def clear(self) -> None:
        self.texts.clear()
        self.pieces.clear()


class Placed:
    """A large text as it is stored, and the keys of its blobs."""

    def __init__(self, text: str, keys: tuple[str, ...]) -> None:
        self.text = text
        self.keys = keys


OPENING: ContextVar[Opening | None] = ContextVar("opening", default=None)
SPILLING: ContextVar[Spilling | None] = ContextVar("spilling", default=None)
"""Of the transaction that runs just now; set inside it, wherever that is."""


def spilled(text: str, table: str) -> str:
    """What is stored for ``text``, JSON over ``LEAST`` bytes, in a row of ``table``: itself where
    nobody said whose it is, or below the limit."""
    spilling = SPILLING.get()
    if spilling is None or len(text) <= spilling.limit:
        return text
    return spilling.text(text, table)


@contextmanager
def belonging(run_id: str) -> Iterator[None]:
    """What is stored meanwhile, in a transaction of another run, are rows of ``run_id``."""
    spilling = SPILLING.get()
    if spilling is None:
        yield
        return
    before, spilling.run_id = spilling.run_id, run_id
    try:
        yield
    finally:
        spilling.run_id = before


def opened(text: str) -> Any:
    """The value of a text with references. Raises ``NotLoaded``, and ``ValueError`` where it cannot
    be read."""
    opening = OPENING.get()
    if opening is None:
        opening = Opening({}, {})
        _open(text, opening)
        raise NotLoaded(opening.missing)
    return _open(text, opening)


def rest_of(text: str) -> str:
    """The JSON that stands in the row itself. Raises ``ValueError`` for no text of ours."""
    return text[_decoder.raw_decode(text, len(MARK))[1] :] if text[:1] == MARK else text


def _open(text: str, opening: Opening) -> Any:
    (tenant, name), end = _decoder.raw_decode(text, len(MARK))

    def part(found: dict[str, Any]) -> Any:
        return opening.part(tenant, found[name]) if name in found else found

    return json.loads(text[end:], object_hook=part)


class Piece:
    """A part of a value that is to be a blob; ``key`` is known when it is one."""

    __slots__ = ("data", "key")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.key = "x" * 81


class Cut:
    """A value over the limit, cut into the blobs ``pieces`` and what stays in the row."""

    def __init__(self, text: str, limit: int) -> None:
        self._name = NAME
        while f'"{self._name}"' in text:
            self._name += "$"
        self._limit = limit
        self._encode = json.JSONEncoder(separators=(",", ":"), default=self._reference).encode
        self._rest, self.pieces = self._cut(json.loads(text), MAX_DEPTH)

    def stored(self, tenant: str) -> Placed:
        """The row's text, when every piece has its key."""
        text = f"{MARK}{encode([tenant, self._name])}{self._encode(self._rest)}"
        return Placed(text, tuple({piece.key for piece in self.pieces}))

    def _reference(self, piece: Any) -> dict[str, Any]:
        return {self._name: piece.key, "size": len(piece.data)}

    def _cut(self, value: Any, depth: int) -> tuple[Any, list[Piece]]:
        text = encode(value)
        if len(text) <= self._limit:
            return value, []
        if depth and isinstance(value, (dict, list)):
            pieces: list[Piece] = []

            def inner(part: Any) -> Any:
                # An escape takes at most twelve bytes for a character.
                if not part or type(part) not in (str, list, dict):
                    return part
                if type(part) is str and len(part) * 12 <= self._limit:
                    return part
                made, more = self._cut(part, depth - 1)
                pieces.extend(more)
                return made

            rest: Any
            if isinstance(value, dict):
                rest = {name: inner(part) for name, part in value.items()}
            else:
                rest = [inner(part) for part in value]
            if pieces and len(self._encode(rest)) <= self._limit:
                return rest, pieces
        piece = Piece(text.encode("ascii"))
        return piece, [piece]
