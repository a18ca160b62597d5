"""The command line: ``agent-server`` and ``python -m agent_server``.

Leans on Typer and rich at start, and on everything else only when a command runs, so that
``--help`` answers at once. Refuses to show a traceback for what a person can put right.
"""

import sys
from collections.abc import Sequence
from io import TextIOWrapper

from agent_server.cli import work
from agent_server.cli.app import app

EXIT_FAILED = 1
EXIT_DETACHED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    0: it worked, and a run that was waited for succeeded. 1: it did not. 2: the command was not
    understood. 130: interrupted; a run that was being followed goes on.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a model says may hold characters that this terminal, or any, cannot show.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=None if argv is None else list(argv), prog_name="agent-server")
    except KeyboardInterrupt:
        sys.exit(EXIT_DETACHED)
    except BrokenPipeError:
        # The reader of our output left, as `head` does; that is no failure worth words.
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    except Exception as error:
        if not work.errors.report(error):
            raise
        sys.exit(EXIT_FAILED)
