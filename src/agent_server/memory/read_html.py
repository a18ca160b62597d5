"""HTML as the blocks a reader sees, under their headings.

Leans on the standard library's parser, which takes any markup. Refuses scripts, styles and what
is hidden: only text that is shown is remembered.
"""

import re
from collections.abc import Iterator
from html.parser import HTMLParser

from agent_server.memory.documents import Block, Outline, text_of

_UNSEEN = frozenset({"script", "style", "template", "noscript", "head", "svg", "iframe", "object"})
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_BLOCKS = frozenset(
    "address article aside blockquote body caption dd details div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr html li main nav ol p pre section table td th tr ul "
    "summary".split()
)
_HEADING = re.compile("h[1-6]")


def read_html(data: bytes) -> Iterator[Block]:
    """Paragraphs, list items, rows of tables and preformatted text, in their order."""
    parser = _Blocks()
    parser.feed(text_of(data))
    parser.close()
    parser.flush()
    yield from parser.found
    yield from parser.outline.end()


class _Blocks(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Block] = []
        self.outline = Outline()
        self._text: list[str] = []
        self._heading: int | None = None
        self._unseen: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._unseen:
            if tag == self._unseen[-1]:
                self._unseen.append(tag)
            return
        if tag in _UNSEEN or (tag not in _VOID and _hidden(dict(attrs))):
            self._unseen.append(tag)
        elif tag in ("td", "th") and self._text:
            self._text.append(" | ")
        elif tag == "br":
            self._text.append("\n")
        elif tag in _BLOCKS:
            self.flush()
            self._pre += tag == "pre"
            self._heading = int(tag[1]) if _HEADING.fullmatch(tag) else None

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag == self._unseen[-1]:
                self._unseen.pop()
        elif tag in _BLOCKS and tag not in ("td", "th"):
            self.flush()
            self._pre -= tag == "pre" and self._pre > 0

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._text.append(data if self._pre else re.sub(r"\s+", " ", data))

    def flush(self) -> None:
        """What was gathered is a block, or a heading."""
        text = "".join(self._text)
        self._text.clear()
        text = text.strip("\n") if self._pre else re.sub(r" *\n *", "\n", text).strip(" |\n")
        if not text.strip():
            return
        if self._heading is not None:
            self.found += self.outline.heading(self._heading, " ".join(text.split()))
            self._heading = None
        else:
            self.found.append(self.outline.block(text))


def _hidden(attributes: dict[str, str | None]) -> bool:
    style = (attributes.get("style") or "").replace(" ", "").lower()
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or "display:none" in style
        or "visibility:hidden" in style
    )
