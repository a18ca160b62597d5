"""An error as a person at a terminal reads it: what happened, what was wrong, what to do.

Leans on the domain's error tree. Refuses errors that are not in it: those are bugs, and keep
their traceback.
"""

import sys

from rich.console import Console
from rich.text import Text

from agent_server.domain.errors import AgentServerError, ErrorInfo


def report(error: BaseException) -> bool:
    """Print ``error`` on stderr if it is one of ours; False if it is not."""
    found = _ours(error)
    if found is None:
        return False
    print_error(found.info())
    return True


def print_error(info: ErrorInfo, console: Console | None = None) -> None:
    """Print a recorded error on stderr: message, the fields that are wrong, hint. ``console`` is
    the one of a progress bar that is shown, which the lines then stand above."""
    console = console or Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("Error: ", "bold red"), printable(info.message)))
    for field in info.errors:
        said = field.message in info.message and field.path.strip("/") in info.message
        if said and field.line is None and not field.hint:
            continue
        line = f" line {field.line}" if field.line is not None else ""
        where = f"{field.path}{line}: " if field.path or line else ""
        hint = f" ({field.hint})" if field.hint else ""
        console.print(Text(printable(f"  {where}{field.message}{hint}")))
    if info.hint:
        console.print(Text.assemble(("Hint: ", "bold"), printable(info.hint)))
    sys.stderr.flush()


def printable(text: str) -> str:
    """``text`` without control characters, which could move the cursor or recolour the screen."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def _ours(error: BaseException) -> AgentServerError | None:
    """``error`` itself, or the one error of ours inside a task group's wrapping."""
    if isinstance(error, AgentServerError):
        return error
    inner = getattr(error, "exceptions", None)
    if inner and len(inner) == 1:
        return _ours(inner[0])
    return None
