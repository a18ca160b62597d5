"""A command at a terminal of its own, for tests that type.

Leans on pty, so on Unix. Refuses patience: every wait has a bound.
"""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType


class Terminal:
    """``with Terminal("runs", "follow", id, env=…, folder=…) as seen: seen.expect("Approve?")``."""

    def __init__(self, *argv: str, env: dict[str, str], folder: Path) -> None:
        self._mine, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 110)) if sys.version_info >= (3, 11) else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agent_server", *argv],
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs},
            env={**os.environ, "COLUMNS": "110", "LINES": "40", "TERM": "xterm", **env},
            cwd=folder,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = ""
        self.output = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait(10)
        os.close(self._mine)

    def expect(self, text: str, timeout_s: float = 30) -> str:
        """What was printed up to ``text``, without colours and moves of the cursor."""
        until = time.monotonic() + timeout_s
        while text not in self._unread:
            left = until - time.monotonic()
            assert left > 0 and self._read(left), f"no {text!r} in:\n{self.output[-4000:]}"
        before, _, self._unread = self._unread.partition(text)
        return before

    def type(self, line: str) -> None:
        os.write(self._mine, f"{line}\n".encode())

    def exit_code(self, timeout_s: float = 30) -> int:
        """The exit code, once all that it prints has been read."""
        until = time.monotonic() + timeout_s
        while self._read(max(0.0, until - time.monotonic())):
            pass
        return self._process.wait(10)

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._mine], [], [], timeout_s)
        if not ready:
            return False
        try:
            got = os.read(self._mine, 65_536).decode(errors="replace")
        except OSError:  # Linux says so when the other side is closed
            return False
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", got).replace("\r", "")
        self._unread += plain
        self.output += plain
        return bool(got)
