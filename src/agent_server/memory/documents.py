"""Documents as memory takes them in: read by kind, cut by structure.

Leans on the readers, each an extension loaded when a document of its kind comes. Refuses to know
how a chunk is stored and found again.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import inf
from pathlib import PurePath
from typing import Protocol

from agent_server.domain.errors import InvalidDocument
from agent_server.plugins import DOCUMENT_READERS, Extension, extensions

PLAIN = "text/plain"
SUFFIXES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
}
"""What a file's name says of it; any other is read as plain text, if it is text."""
TEXTS = frozenset((PLAIN, "text/markdown", "text/html"))
"""Kinds that take no longer than their length, and are read where they come."""
TEXT_CONTROLS = frozenset("\t\n\r\f\x1b")
_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")
"""Where a sentence ends, or a line."""


@dataclass(frozen=True)
class Block:
    """A part that should stay in one piece: a paragraph, a list, a table, a piece of code."""

    text: str
    headings: tuple[str, ...] = ()
    """The headings it stands under, the outermost first."""
    page: int | None = None
    """From 1, where the document has pages."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document that is remembered and found by itself."""

    text: str
    """Verbatim, but that the last ``overlap`` characters of the chunk before begin it."""
    headings: tuple[str, ...] = ()
    page: int | None = None
    overlap: int = 0

    @property
    def titled(self) -> str:
        """The text under the path of its headings, as it is searched and shown."""
        return f"{' > '.join(self.headings)}\n\n{self.text}" if self.headings else self.text


Reader = Callable[[bytes], Iterable[Block]]
"""Reads a document of one kind. Raises ``InvalidDocument`` for what is none."""


class ReadsApart(Protocol):
    """See ``memory.apart.Apart``."""

    def deadline(self) -> float: ...

    def read(self, data: bytes, media_type: str, deadline: float) -> list[Block]: ...


class Documents:
    """Reads and cuts documents. ``size`` and ``overlap`` of chunks are in characters."""

    def __init__(
        self, *, size: int = 1_200, overlap: int = 150, apart: ReadsApart | None = None
    ) -> None:
        """``apart`` reads all kinds but those of ``TEXTS``; by default they are read here."""
        self._size = size
        self._overlap = min(overlap, size // 2)
        self._apart = apart

    def deadline(self) -> float:
        """For ``read``: when documents that are begun to be read now must be done."""
        return inf if self._apart is None else self._apart.deadline()

    @cached_property
    def _readers(self) -> dict[str, Extension]:
        return extensions(DOCUMENT_READERS)

    @property
    def media_types(self) -> tuple[str, ...]:
        """The kinds that can be read."""
        return tuple(self._readers)

    def chunks(self, data: bytes, media_type: str) -> list[Chunk]:
        """``data`` in pieces, as ``cut`` and ``read`` say."""
        return list(self.cut(self.read(data, media_type)))

    def read(self, data: bytes, media_type: str, deadline: float = inf) -> list[Block]:
        """The blocks of ``data``, at least one. Blocking: run it in a thread.

        Raises ``InvalidDocument`` for a kind that is not read here, for data that are not of that
        kind, for what cannot be read in time or in memory, and for a document without any text.
        """
        kind = media_type.partition(";")[0].strip().lower()
        reader = self._readers.get(kind)
        if reader is None:
            raise InvalidDocument(
                f"Documents of the type {media_type[:100]!r} cannot be read.",
                hint=f"Send one of {', '.join(self._readers)}.",
            )
        if self._apart is None or kind in TEXTS:
            found = list(reader.loaded(data))
        else:
            found = self._apart.read(data, kind, deadline)
        if not any(block.text.strip() for block in found):
            raise InvalidDocument(
                "The document has no text.",
                hint=(
                    "A PDF of scanned pages must go through text recognition first."
                    if media_type == "application/pdf"
                    else "Send a document with text in it."
                ),
            )
        return found

    def cut(self, blocks: Iterable[Block]) -> Iterator[Chunk]:
        """``blocks`` gathered up to the size of a chunk; none reaches over a heading."""
        for headings, section in groupby(blocks, key=lambda block: block.headings):
            yield from self._cut_section(headings, section)

    def _cut_section(self, headings: tuple[str, ...], blocks: Iterable[Block]) -> Iterator[Chunk]:
        text, page, overlap = "", None, 0
        for block in blocks:
            for glue, piece in self._pieces(block.text):
                if text and len(text) + len(glue) + len(piece) > self._size:
                    yield Chunk(text, headings, page, overlap)
                    tail = _tail(text[overlap:], min(self._overlap, self._size - len(piece)))
                    text, page, overlap = tail, block.page, len(tail)
                if page is None:
                    page = block.page
                text = f"{text}{glue if text else ''}{piece}"
        if text[overlap:].strip():
            yield Chunk(text, headings, page, overlap)

    def _pieces(self, text: str) -> Iterator[tuple[str, str]]:
        """A block whole where it fits, else by sentences, else by length: with what joins each to
        the piece before."""
        text = text.strip("\n").rstrip()
        if len(text) <= self._size:
            if text.strip():
                yield "\n\n", text
            return
        room = self._size - self._overlap
        glue, start = "\n\n", 0
        bounds = [found.span() for found in _ENDS.finditer(text)] + [(len(text), len(text))]
        for end, after in bounds:
            while end - start > room:
                space = text.rfind(" ", start + room // 2, start + room)
                stop = space if space > 0 else start + room
                yield glue, text[start:stop]
                start = stop + 1 if space > 0 else stop
                glue = " " if space > 0 else ""
            if end > start:
                yield glue, text[start:end]
            glue, start = text[end:after], after


def readable(blocks: Iterable[Block]) -> str:
    """The text of a document with its headings, as Markdown, from which it can be cut again."""
    parts: list[str] = []
    path: tuple[str, ...] = ()
    for block in blocks:
        same = 0
        while same < min(len(path), len(block.headings)) and path[same] == block.headings[same]:
            same += 1
        for level, title in enumerate(block.headings[same:], start=same + 1):
            parts.append(f"{'#' * min(level, 6)} {title}")
        parts.append(block.text)
        path = block.headings
    return "\n\n".join(parts)


def _tail(text: str, length: int) -> str:
    """The end of ``text`` from the start of a sentence, else of a word; at most ``length``."""
    if length <= 0:
        return ""
    tail = text[-length:]
    if len(tail) == len(text):
        return tail
    for pattern in (_ENDS, re.compile(r"\s+")):
        found = pattern.search(tail)
        if found is not None and found.end() < len(tail):
            return tail[found.end() :]
    return tail


def media_type_of(name: str, data: bytes) -> str:
    """What a file is, by its name, or by its first bytes where the name says nothing."""
    known = SUFFIXES.get(PurePath(name).suffix.lower())
    if known is not None:
        return known
    return "application/pdf" if data.startswith(b"%PDF-") else PLAIN


def text_of(data: bytes) -> str:
    """``data`` as text. Raises ``InvalidDocument`` for what is none."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidDocument(
            f"The document is not text: the byte at {error.start} is not UTF-8.",
            hint="Convert it to UTF-8 text, Markdown, HTML or PDF.",
        ) from error
    odd = next((c for c in text if c < " " and c not in TEXT_CONTROLS), None)
    if odd is not None:
        raise InvalidDocument(
            f"The document is not text: it holds the control character {odd!r}.",
            hint="Convert it to UTF-8 text, Markdown, HTML or PDF.",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(data: bytes) -> Iterator[Block]:
    """Plain text: paragraphs are parted by an empty line."""
    for paragraph in re.split(r"\n[ \t]*\n", text_of(data)):
        if paragraph.strip():
            yield Block(paragraph)


class Outline:
    """The path of headings while a document is read from its top."""

    def __init__(self) -> None:
        self._levels: list[tuple[int, str]] = []
        self._bare = False

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(title for _, title in self._levels)

    def heading(self, level: int, title: str) -> Iterator[Block]:
        """Go on below this heading; one that had nothing below it is a block of its own."""
        if self._bare and self._levels and level <= self._levels[-1][0]:
            yield from self.end()
        self._levels = [known for known in self._levels if known[0] < level]
        if title:
            self._levels.append((level, title))
        self._bare = bool(title)

    def block(self, text: str) -> Block:
        self._bare = False
        return Block(text, self.path)

    def end(self) -> Iterator[Block]:
        if self._bare:
            yield Block(self.path[-1], self.path[:-1])
        self._bare = False
