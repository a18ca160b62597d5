"""Reading a document in a process of its own, within a time and a memory.

Leans on the readers, which run in that process. Refuses to trust them: a file that makes one loop,
recurse or fill the memory costs what is allowed, and takes nothing along.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any, Final

from agent_server.domain.errors import InvalidDocument
from agent_server.memory.documents import Block
from agent_server.plugins import DOCUMENT_READERS, extensions

try:
    import resource
except ImportError:  # Windows: there the time alone is limited.
    resource = None  # type: ignore[assignment]

MAX_TEXT: Final = 20_000_000
"""Characters that may come out of one document."""
NO_MEMORY: Final = 73
"""The status with which the process says that the memory did not suffice."""
_UNREADABLE: Final = "Split it, or send its text."


class Apart:
    """Reads by a process each time: it begins in about half a second.

    ``seconds`` are for all documents of one request, ``memory_bytes`` for each.
    """

    def __init__(self, *, seconds: float, memory_bytes: int) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes

    def deadline(self) -> float:
        """When what is begun to be read now must be done, on the clock of ``monotonic``."""
        return monotonic() + self._seconds

    def read(self, data: bytes, media_type: str, deadline: float) -> list[Block]:
        """What the reader of the kind makes of ``data``. Blocking. Raises ``InvalidDocument``, also
        for what takes too long or too much."""
        limits = [str(self._memory_bytes), str(ceil(self._seconds) + 1)]
        command = [sys.executable, "-m", __name__, media_type, *limits]
        # Of the environment it gets what it needs to begin, and no secret.
        path = os.pathsep.join(str(Path(part).absolute()) for part in sys.path if part)
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
        try:
            done = subprocess.run(
                command,
                input=data,
                capture_output=True,
                timeout=max(0.0, deadline - monotonic()),
                env={**kept, "PYTHONPATH": path},
                cwd=os.sep,
            )
        except subprocess.TimeoutExpired as error:
            raise InvalidDocument(
                f"The documents of this request take longer than {self._seconds:g} s to read.",
                hint=f"{_UNREADABLE} AGENT_SERVER_DOCUMENT_READ_S is the limit.",
            ) from error
        if done.returncode == NO_MEMORY:
            raise InvalidDocument(
                f"The document takes more than {self._memory_bytes:,} bytes of memory to read.",
                hint=f"{_UNREADABLE} AGENT_SERVER_DOCUMENT_READ_BYTES is the limit.",
            )
        if done.returncode != 0:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
            raise InvalidDocument(
                f"The document broke its reader (status {done.returncode}): {last}",
                hint=_UNREADABLE,
            )
        told = json.loads(done.stdout)
        if "detail" in told:
            raise InvalidDocument(told["detail"], hint=told["hint"])
        return [_block(one) for one in told["blocks"]]


def _block(told: dict[str, Any]) -> Block:
    return Block(told["text"], tuple(told["headings"]), told["page"])


def main(arguments: Sequence[str]) -> int:
    """Read the document on standard input, and write its blocks or what is wrong as JSON.

    The limit of CPU seconds is for the case that whoever waits for it was killed.
    """
    media_type, memory_bytes, cpu_s = arguments[0], int(arguments[1]), int(arguments[2])
    try:
        reader = extensions(DOCUMENT_READERS)[media_type]
        data = sys.stdin.buffer.read()
        if resource is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        answer: dict[str, Any] = {"blocks": _blocks(reader.loaded(data))}
    except MemoryError:
        return NO_MEMORY
    except InvalidDocument as error:
        answer = {"detail": error.detail, "hint": error.hint}
    json.dump(answer, sys.stdout)
    return 0


def _blocks(read: Iterable[Block]) -> list[dict[str, Any]]:
    found, size = [], 0
    for block in read:
        size += len(block.text)
        if size > MAX_TEXT:
            raise InvalidDocument(
                f"The document has more than {MAX_TEXT:,} characters of text.", hint="Split it."
            )
        found.append(asdict(block))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
