"""``agent-server memory import`` and ``export``: folders of documents, JSONL, one readable JSON.

Leans on the client. Keeps no notes of how far it is: each write names itself, by its id, its key
or the hash of its line, so that one that is repeated after a kill finds itself there already.
"""

import base64
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import print_error, printable
from agent_server.cli.runs import LOOKING
from agent_server.client import AgentServerClient
from agent_server.client.http import checked
from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    AgentServerError,
    BodyTooLarge,
    ErrorInfo,
    InvalidDocument,
    InvalidRequest,
    MalformedBody,
    Unavailable,
)
from agent_server.domain.ids import derived_id
from agent_server.domain.memory_api import MemoriesWritten, MemoryInput
from agent_server.memory.documents import media_type_of, text_of

FORMAT = "agent-server.memories/1"
"""What a readable file says of itself."""
MAX_CHARACTERS = 500_000
"""Of the memories in one call: a server may cut off what is too large without a word."""
_NO_MOMENT = "mem_" + "0" * 32
_OF_ONE = (BodyTooLarge, InvalidDocument, InvalidRequest, MalformedBody)
"""Errors that one memory of many can be the reason for."""
_WITH_HEADINGS = ("text/markdown", "text/html", "application/pdf")
_KEPT = (*MemoryInput.model_fields,)


async def run_import(where: Target, source: Path, fields: dict[str, Any], *, batch: int) -> bool:
    """Import ``source``; False when a part of it could not be, which is said for each."""
    found = files_in(source)
    given = {name: value for name, value in fields.items() if value is not None}
    async with connect(where, LOOKING) as client:
        if found is not None:
            return await _import_documents(client, found, given)
        return await _import_memories(client, source, given, batch)


async def run_export(where: Target, file: Path | None, filters: dict[str, Any]) -> None:
    """Export what the filters leave to ``file``, or to stdout."""
    async with connect(where, LOOKING) as client:
        found = client.memories.export(**filters)
        if file is None or file == Path("-"):
            await _write_lines(found, sys.stdout)
            return
        write = _write_readable if file.suffix.lower() == ".json" else _write_lines
        with _replacing(file) as out:
            count = await write(found, out)
    sys.stderr.write(f"{count} memories written to {file}\n")


# Documents


@dataclass(frozen=True)
class Files:
    """The documents in a folder by name, and what of it is left out."""

    found: dict[str, Path] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    """Links to folders, out of the folder, or to nothing: none is followed."""
    closed: list[tuple[str, OSError]] = field(default_factory=list)
    """Folders that cannot be listed."""


async def _import_documents(client: AgentServerClient, files: Files, given: dict[str, Any]) -> bool:
    async with _progress(len(files.found) + len(files.closed), "documents") as bar:
        bar.links = files.links
        for name, unlisted in files.closed:
            bar.complain(name, _unreadable(unlisted))
        for name, file in files.found.items():
            try:
                draft = checked(MemoryInput, {**_document(file, name), **given}, "document")
                written = await client.memories.add_all([draft])
                bar.count(written)
                if written.new and written.data[0].supersedes is not None:
                    bar.replaced.append(name)
            except OSError as error:
                bar.complain(name, _unreadable(error))
            except AgentServerError as error:
                bar.complain(name, error)
    return bar.whole


def files_in(source: Path) -> Files | None:
    """The documents at ``source``: the file itself, or those in the folder and below, but hidden
    ones. None for a file of memories."""
    if not source.exists():
        raise InvalidRequest(f"There is no file or folder {str(source)!r}.")
    if source.is_file():
        memories = source.suffix.lower() in (".jsonl", ".ndjson", ".json")
        return None if memories else Files({source.name: source})
    root = source.resolve()
    files = Files()

    def name_of(path: Path) -> str:
        return path.relative_to(source).as_posix()

    def closed(error: OSError) -> None:
        files.closed.append((name_of(Path(error.filename)), error))

    for folder, folders, names in os.walk(source, onerror=closed):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files.links.extend(name_of(here / n) for n in folders if (here / n).is_symlink())
        for name in sorted(name for name in names if not name.startswith(".")):
            path = here / name
            if path.is_file() and root in path.resolve().parents:
                files.found[name_of(path)] = path
            elif path.is_symlink():
                files.links.append(name_of(path))
    return files


def _unreadable(error: OSError) -> InvalidDocument:
    return InvalidDocument(f"It cannot be read: {error.strerror}.")


def _document(file: Path, name: str) -> JsonObject:
    """A file as a memory whose key is its path: a newer content supersedes the older."""
    data = file.read_bytes()
    media_type = media_type_of(name, data)
    binary = media_type == "application/pdf"
    return {
        "kind": "document",
        "content": base64.b64encode(data).decode() if binary else text_of(data),
        "media_type": media_type,
        "key": f"file:{name}",
        "metadata": {"title": name},
    }


# Memories


async def _import_memories(
    client: AgentServerClient, source: Path, given: dict[str, Any], batch: int
) -> bool:
    total = sum(1 for _ in _lines(source))
    async with _progress(total, "memories") as bar:
        waiting: list[tuple[str, MemoryInput]] = []
        size = 0
        seen: Counter[str] = Counter()
        for number, line in _lines(source):
            place = f"{source.name}:{number}"
            try:
                memory = _memory(line, given, seen)
            except ValueError as error:
                bar.complain(place, InvalidRequest(_words(error)))
                continue
            if len(waiting) >= batch or size + len(line) > MAX_CHARACTERS:
                await _write(client, waiting, bar)
                waiting, size = [], 0
            waiting.append((place, memory))
            size += len(line)
        await _write(client, waiting, bar)
    return bar.whole


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """Each memory as JSON text, with the number of its line, or its place in a readable file."""
    readable = source.suffix.lower() == ".json"
    try:
        with source.open(encoding="utf-8-sig") as lines:
            if not readable:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, line.strip()
                return
            data = json.load(lines)
    except OSError as error:
        raise InvalidRequest(f"{str(source)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # UnicodeDecodeError is one.
        wrong = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "not JSON"
        raise InvalidRequest(f"{str(source)!r} is {wrong}: {error}.") from error
    memories = data.get("memories", []) if isinstance(data, dict) else None
    if not isinstance(memories, list) or data.get("format") != FORMAT:
        raise InvalidRequest(
            f"{str(source)!r} is not an export of memories.",
            hint=f'It must be an object with "format": "{FORMAT}" and "memories": […]. To import it '
            "as a document, name it .txt.",
        )
    for number, memory in enumerate(memories, start=1):
        yield number, json.dumps(memory, sort_keys=True)


def _memory(line: str, given: dict[str, Any], seen: Counter[str]) -> MemoryInput:
    """One line as a memory: as it was exported, or as the API takes it."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")
    if not _encodable(json.dumps(fields, ensure_ascii=False)):
        raise ValueError("holds half a character (a lone surrogate), which cannot be sent")
    details = [fields.get(name) or {} for name in ("source", "metadata")]
    if "version" in fields and all(isinstance(one, dict) for one in details):
        # An export, which says more than can be written.
        source = {name: value for name, value in (fields.get("source") or {}).items() if value}
        # What was imported before keeps the source that it had at first.
        metadata = {"exported_source": source, **(fields.get("metadata") or {})}
        fields = {name: fields[name] for name in _KEPT if fields.get(name) is not None}
        fields["metadata"] = metadata
        # The text of a document with its headings, whatever it was read from.
        fields |= {"media_type": _media_type(metadata)} if fields.get("kind") == "document" else {}
    if "id" not in fields:
        seen[line] += 1
        digest = sha256(line.encode("utf-8", "surrogatepass")).hexdigest()
        named = f"{given.get('namespace', '')}/{digest}/{seen[line]}"
        fields["id"] = derived_id("mem", _NO_MOMENT, named)
    return MemoryInput.model_validate({**fields, **given})


def _media_type(metadata: JsonObject) -> str:
    return "text/markdown" if metadata.get("media_type") in _WITH_HEADINGS else "text/plain"


async def _write(
    client: AgentServerClient, waiting: Sequence[tuple[str, MemoryInput]], bar: "_Bar"
) -> None:
    """Write them in one call, or in halves where they are too much for one, or where one of them is
    refused, so that the others are written."""
    if not waiting:
        return
    try:
        bar.count(await client.memories.add_all([memory for _, memory in waiting]))
    except _OF_ONE as error:
        if len(waiting) == 1:
            bar.complain(waiting[0][0], error)
            return
        half = len(waiting) // 2
        await _write(client, waiting[:half], bar)
        await _write(client, waiting[half:], bar)
    except Unavailable as error:
        [(place, memory), *others] = waiting
        if others or len(memory.model_dump_json()) <= MAX_CHARACTERS:
            raise
        bar.complain(place, error)  # Cut off as too large. If not, the next one tells.


@contextmanager
def _replacing(file: Path) -> Iterator[TextIO]:
    """A file to write, which takes the place of ``file`` once all of it is written: an export that
    fails leaves the one before as it was."""
    special = file.exists() and not file.is_file()
    part = file if special else file.with_name(f".{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as out:
            yield out
        if not special:
            part.replace(file)
    except OSError as error:
        raise InvalidRequest(f"{str(file)!r} cannot be written: {error.strerror}.") from error
    finally:
        if not special:
            part.unlink(missing_ok=True)


async def _write_lines(found: AsyncIterator[Any], out: TextIO) -> int:
    count = 0
    async for memory in found:
        out.write(_json(memory.model_dump(mode="json")) + "\n")
        count += 1
    out.flush()
    return count


async def _write_readable(found: AsyncIterator[Any], out: TextIO) -> int:
    head = {"format": FORMAT, "exported_at": utcnow().isoformat(timespec="seconds")}
    out.write(json.dumps(head, indent=2)[:-2] + ',\n  "memories": [')
    count = 0
    async for memory in found:
        said = memory.model_dump(mode="json").items()
        fields = {k: v for k, v in said if k == "content" or v not in (None, {})}
        text = _json(fields, indent=2).replace("\n", "\n    ")
        out.write(f"{',' if count else ''}\n    {text}")
        count += 1
    out.write("\n  ]\n}\n" if count else "]\n}\n")
    return count


def _json(fields: JsonObject, indent: int | None = None) -> str:
    """Readable, but escaped where a half of a character could not be written else."""
    text = json.dumps(fields, ensure_ascii=False, indent=indent)
    return text if _encodable(text) else json.dumps(fields, indent=indent)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# What a person sees


class _Bar:
    """What is done of it, and what went wrong, which is said above the bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self.new = self.known = self.failed = 0
        self.replaced: list[str] = []
        """Where something new took the place of what had its key."""
        self.links: list[str] = []
        """Links that were not followed."""

    @property
    def whole(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    def count(self, written: MemoriesWritten) -> None:
        self.new += written.new
        self.known += len(written.data) - written.new
        self._progress.advance(self._task, len(written.data))

    def complain(self, place: str, error: AgentServerError) -> None:
        self.failed += 1
        info = error.info()
        told = ErrorInfo(code=info.code, message=f"{place}: {info.message}", hint=info.hint)
        print_error(told, self._progress.console)
        self._progress.advance(self._task)


@asynccontextmanager
async def _progress(total: int, what: str) -> AsyncIterator[_Bar]:
    """A bar on a terminal's stderr, and in the end a line of what was done."""
    columns: Sequence[Any] = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = _Bar(progress, progress.add_task(what, total=total))
        yield bar
    told = f"{bar.new} {what} imported, {bar.known} there already, {bar.failed} failed"
    if bar.replaced:
        told += f"; an older text was superseded by {_some(bar.replaced)}"
    if bar.links:
        told += f"; links that were not followed: {_some(bar.links)}"
    sys.stderr.write(f"{printable(told)}\n")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def _words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error}"
    return str(error)
