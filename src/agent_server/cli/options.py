"""The options that several commands share, and how a command carries out its work.

Leans on Typer alone, so that ``--help`` answers at once. Refuses to know any command.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, List, Optional  # noqa: UP035

import typer

# Typer reads these at run time on every supported Python: `X | None` would not do on 3.10.
Text = Optional[str]  # noqa: UP045
File = Optional[Path]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Fraction = Optional[float]  # noqa: UP045
Many = Optional[List[str]]  # noqa: UP006, UP045

ServerOption = Annotated[
    Text,
    typer.Option(
        "--server",
        help="Address of a server; default: AGENT_SERVER_URL, else one inside this process.",
    ),
]
ApiKeyOption = Annotated[
    Text, typer.Option("--api-key", help="Key of that server; default: AGENT_SERVER_API_KEY.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer only.")]
AgentsOption = Annotated[
    Text,
    typer.Option("--agents", help="Files, folders or modules with agents, comma-separated."),
]

ApproveOption = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--approve/--reject",
        help="What to say to whatever the run asks for; default: ask at the terminal, if it is one.",
    ),
]


def do(work: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the coroutine function ``work`` to its end."""
    import anyio  # noqa: PLC0415  # `--help` does not need it

    return anyio.run(partial(work, *args, **kwargs))


def leave(work: Any, *args: Any) -> None:
    """Run ``work`` and leave with the exit code it answers."""
    raise typer.Exit(do(work, *args))
