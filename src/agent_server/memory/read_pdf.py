"""The text of a PDF, page by page, under the headings of its outline.

Leans on pypdf. Refuses to recognise text in pictures: a scanned page has none.
"""

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pypdf import PdfReader
from pypdf.errors import FileNotDecryptedError, PyPdfError

from agent_server.domain.errors import InvalidDocument
from agent_server.memory.documents import Block, Outline

MAX_PAGES = 5_000


def read_pdf(data: bytes) -> Iterator[Block]:
    """The paragraphs of each page. Raises ``InvalidDocument`` for what is no PDF, or is locked."""
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise _locked()
        pages = len(reader.pages)
        if pages > MAX_PAGES:
            raise InvalidDocument(
                f"The PDF has {pages:,} pages; at most {MAX_PAGES:,} are read.",
                hint="Split it.",
            )
        titles = _titles(reader)
        outline = Outline()
        for number in range(pages):
            for level, title in titles.get(number, ()):
                yield from outline.heading(level, title)
            text = reader.pages[number].extract_text()
            for paragraph in re.split(r"\n\s*\n", text.replace("\0", "")):
                if paragraph.strip():
                    block = outline.block(paragraph)
                    yield Block(block.text, block.headings, number + 1)
        yield from outline.end()
    except FileNotDecryptedError as error:
        raise _locked() from error
    except InvalidDocument:
        raise
    # A broken file fails inside pypdf in any of these ways.
    except (PyPdfError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InvalidDocument(
            f"The document is not a PDF that can be read: {error or type(error).__name__}.",
            hint="Open it in a viewer and save it anew, or send its text.",
        ) from error
    except (RecursionError, OverflowError) as error:
        raise InvalidDocument(
            "The PDF is built in a way that cannot be read.", hint="Send its text."
        ) from error


def _titles(reader: PdfReader) -> dict[int, list[tuple[int, str]]]:
    """The outline's entries by page, each with its depth from 1; none where it is broken."""
    found: dict[int, list[tuple[int, str]]] = {}

    def walk(entries: Sequence[Any], level: int) -> None:
        for entry in entries:
            if isinstance(entry, list):
                walk(entry, level + 1)
                continue
            page = reader.get_destination_page_number(entry)
            if page is not None and page >= 0:
                found.setdefault(page, []).append((level, " ".join(str(entry.title).split())))

    try:
        walk(reader.outline, 1)
    except (PyPdfError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return found


def _locked() -> InvalidDocument:
    return InvalidDocument("The PDF is locked with a password.", hint="Save it without one.")
