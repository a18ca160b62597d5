"""What a person types at a terminal: one line, or a text in their own editor.

Leans on termios and on anyio, so that a question can be withdrawn while it is being answered.
Refuses what was typed before the question stood there: nobody consents to what they have not read.
"""

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import anyio
from rich.console import Console

try:
    import termios
except ImportError:  # Not on Windows: questions are answered with `agent-server approvals` there.
    termios = None  # type: ignore[assignment]

STDIN, STDERR = 0, 2
EDITORS = ("sensible-editor", "nano", "vi")
"""Where neither VISUAL nor EDITOR says one, the first of these that there is."""


def somebody_there() -> bool:
    """Whether a person can be asked: questions go to stderr, answers come from stdin."""
    return termios is not None and os.isatty(STDIN) and os.isatty(STDERR)


async def ask_line(console: Console, prompt: str) -> str | None:
    """The line that is typed, without blanks around it; None at the end of the input (Ctrl-D)."""
    termios.tcflush(STDIN, termios.TCIFLUSH)
    console.print(prompt, end="", highlight=False, soft_wrap=True)
    await anyio.wait_readable(STDIN)
    said = os.read(STDIN, 65_536)
    if not said:
        console.print()
        return None
    return said.decode(errors="replace").partition("\n")[0].strip()


async def ask_one_of(console: Console, prompt: str, choices: str) -> str | None:
    """One of the letters ``choices``, asked until it is; None at the end of the input."""
    while True:
        said = await ask_line(console, prompt)
        if said is None:
            return None
        if said and said[0].lower() in choices:
            return said[0].lower()
        console.print(f"One of {', '.join(choices)}, please.")


async def edit_text(text: str, suffix: str = ".json") -> str | None:
    """``text`` as the person leaves it in their editor; None where there is no editor or it fails."""
    command = _editor()
    if command is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"edit{suffix}"
        path.write_text(text, encoding="utf-8")
        argv = [*command, str(path)]
        editor = await anyio.open_process(argv, stdin=None, stdout=None, stderr=None)
        async with editor:
            if await editor.wait() != 0:
                return None
        return path.read_text(encoding="utf-8")


def _editor(find: Callable[[str], str | None] = shutil.which) -> list[str] | None:
    chosen = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if chosen:
        return shlex.split(chosen)
    return next(([found] for name in EDITORS if (found := find(name))), None)
