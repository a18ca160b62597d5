"""Markdown as blocks under their headings, each verbatim.

Leans on markdown-it (CommonMark, with tables) for where blocks begin and end. Refuses to render.
"""

from collections.abc import Iterator

from markdown_it import MarkdownIt

from agent_server.memory.documents import Block, Outline, text_of


def read_markdown(data: bytes) -> Iterator[Block]:
    """The top-level blocks of the document, as they stand in its source."""
    text = text_of(data)
    lines = text.split("\n")
    outline = Outline()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for index, token in enumerate(tokens):
        if token.level != 0 or token.nesting < 0 or token.map is None:
            continue
        if token.type == "heading_open":
            title = " ".join(tokens[index + 1].content.split())
            yield from outline.heading(int(token.tag[1:]), title)
        else:
            block = "\n".join(lines[token.map[0] : token.map[1]]).strip("\n")
            if block.strip():
                yield outline.block(block)
    yield from outline.end()
