"""``agent-server memory import`` and ``export``: folders of documents, JSONL, one readable JSON.

Leans on the client. Keeps no notes of how far it is: each write names itself, by its id, its key
or the hash of its line, so that one that is repeated after a kill finds itself there already.
"""

import base64
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
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
from agent_server.cli.errors import print_error
from agent_server.cli.runs import LOOKING
from agent_server.client import AgentServerClient
from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import AgentServerError, ErrorInfo, InvalidRequest
from agent_server.domain.ids import derived_id
from agent_server.domain.memory_api import MemoryInput
from agent_server.memory.documents import media_type_of, text_of

FORMAT = "agent-server.memories/1"
"""What a readable file says of itself."""
_NO_MOMENT = "mem_" + "0" * 32
_KEPT = (*MemoryInput.model_fields,)


async def run_import(where: Target, source: Path, fields: dict[str, Any], *, batch: int) -> bool:
    """Import ``source``; False when a part of it could not be, which is said for each."""
    files = _files(source)
    given = {name: value for name, value in fields.items() if value is not None}
    async with connect(where, LOOKING) as client:
        if files is not None:
            return await _import_documents(client, files, given)
        return await _import_memories(client, source, given, batch)


async def run_export(where: Target, file: Path | None, filters: dict[str, Any]) -> None:
    """Export what the filters leave to ``file``, or to stdout."""
    async with connect(where, LOOKING) as client:
        found = client.memories.export(**filters)
        if file is None or file == Path("-"):
            await _write_lines(found, sys.stdout)
            return
        with file.open("w", encoding="utf-8") as out:
            if file.suffix.lower() == ".json":
                count = await _write_readable(found, out)
            else:
                count = await _write_lines(found, out)
    sys.stderr.write(f"{count} memories written to {file}\n")


# Documents


async def _import_documents(
    client: AgentServerClient, files: dict[str, Path], given: dict[str, Any]
) -> bool:
    failed = 0
    async with _progress(len(files), "documents") as bar:
        for name, file in files.items():
            try:
                await client.memories.add(**_document(file, name), **given)
            except AgentServerError as error:
                failed += 1
                bar.complain(name, error)
            bar.done()
    sys.stderr.write(f"{len(files) - failed} documents imported, {failed} failed\n")
    return failed == 0


def _files(source: Path) -> dict[str, Path] | None:
    """The documents at ``source`` by name: the file itself, or those in the folder and below, but
    hidden ones and what leads out of it. None for a file of memories."""
    if not source.exists():
        raise InvalidRequest(f"There is no file or folder {str(source)!r}.")
    if source.is_file():
        memories = source.suffix.lower() in (".jsonl", ".ndjson", ".json")
        return None if memories else {source.name: source}
    root = source.resolve()
    found: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and root in path.resolve().parents:
            found[name.as_posix()] = path
    return found


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
        "idempotency_key": None,
    }


# Memories


async def _import_memories(
    client: AgentServerClient, source: Path, given: dict[str, Any], batch: int
) -> bool:
    failed = 0
    written = 0
    total = sum(1 for _ in _lines(source))
    async with _progress(total, "memories") as bar:
        waiting: list[MemoryInput] = []
        seen: Counter[str] = Counter()
        for number, line in _lines(source):
            try:
                waiting.append(_memory(line, given, seen))
            except (ValidationError, ValueError) as error:
                failed += 1
                bar.complain(f"{source.name}:{number}", InvalidRequest(_words(error)))
                bar.done()
            if len(waiting) >= batch:
                written += await _write(client, waiting, bar)
        written += await _write(client, waiting, bar)
    sys.stderr.write(f"{written} memories imported, {failed} failed\n")
    return failed == 0


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """Each memory as JSON text, with the number of its line, or its place in a readable file."""
    if source.suffix.lower() == ".json":
        data = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidRequest(
                f"{str(source)!r} is not an export of memories.",
                hint=f'It must be an object with "format": "{FORMAT}" and "memories": […].',
            )
        for number, memory in enumerate(data.get("memories") or (), start=1):
            yield number, json.dumps(memory, sort_keys=True)
        return
    with source.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line.strip()


def _memory(line: str, given: dict[str, Any], seen: Counter[str]) -> MemoryInput:
    """One line as a memory: as it was exported, or as the API takes it."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")
    if "version" in fields:  # An export, which says more than can be written.
        source = {name: value for name, value in (fields.get("source") or {}).items() if value}
        metadata = {**(fields.get("metadata") or {}), "exported_source": source}
        fields = {name: fields[name] for name in _KEPT if fields.get(name) is not None}
        fields["metadata"] = metadata
        # The text of a document, whatever it was read from.
        fields |= {"media_type": _media_type(metadata)} if fields["kind"] == "document" else {}
    if "id" not in fields:
        seen[line] += 1
        digest = sha256(line.encode("utf-8", "surrogatepass")).hexdigest()
        named = f"{given.get('namespace', '')}/{digest}/{seen[line]}"
        fields["id"] = derived_id("mem", _NO_MOMENT, named)
    return MemoryInput.model_validate({**fields, **given})


def _media_type(metadata: JsonObject) -> str:
    return "text/markdown" if metadata.get("media_type") == "text/markdown" else "text/plain"


async def _write(client: AgentServerClient, waiting: list[MemoryInput], bar: "_Bar") -> int:
    count = len(waiting)
    if count:
        await client.memories.add_all(waiting)
        bar.done(count)
        waiting.clear()
    return count


async def _write_lines(found: AsyncIterator[Any], out: TextIO) -> int:
    count = 0
    async for memory in found:
        out.write(json.dumps(memory.model_dump(mode="json"), ensure_ascii=False) + "\n")
        count += 1
    out.flush()
    return count


async def _write_readable(found: AsyncIterator[Any], out: TextIO) -> int:
    head = {"format": FORMAT, "exported_at": utcnow().isoformat(timespec="seconds")}
    out.write(json.dumps(head, indent=2)[:-2] + ',\n  "memories": [')
    count = 0
    async for memory in found:
        fields = {k: v for k, v in memory.model_dump(mode="json").items() if v not in (None, {})}
        text = json.dumps(fields, ensure_ascii=False, indent=2).replace("\n", "\n    ")
        out.write(f"{',' if count else ''}\n    {text}")
        count += 1
    out.write("\n  ]\n}\n" if count else "]\n}\n")
    return count


# What a person sees


class _Bar:
    """What is done of it, and what went wrong, which is said above the bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def done(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def complain(self, place: str, error: AgentServerError) -> None:
        info = error.info()
        told = ErrorInfo(code=info.code, message=f"{place}: {info.message}", hint=info.hint)
        print_error(told, self._progress.console)


@asynccontextmanager
async def _progress(total: int, what: str) -> AsyncIterator[_Bar]:
    """A bar on a terminal's stderr."""
    columns: Sequence[Any] = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _Bar(bar, bar.add_task(what, total=total))


def _words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return str(error)
