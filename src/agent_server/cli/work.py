"""The work behind the commands: ``work.consent`` is ``agent_server.cli.consent``, imported when it
is first asked for.

Leans on nothing at start, so that every ``--help`` answers at once; type checkers and
import-linter read the plain imports. Refuses to know what the work is.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_server.cli import (
        configuration,
        connect,
        consent,
        database,
        doctor,
        errors,
        halts,
        history,
        memory,
        memory_eval,
        memory_import,
        replay,
        run,
        runs,
        serve,
        workflows,
    )
else:

    def __getattr__(name: str) -> ModuleType:
        if name not in __all__:
            raise AttributeError(f"No command has work in a module {name!r}.")
        return import_module(f"agent_server.cli.{name}")


__all__ = [
    "configuration",
    "connect",
    "consent",
    "database",
    "doctor",
    "errors",
    "halts",
    "history",
    "memory",
    "memory_eval",
    "memory_import",
    "replay",
    "run",
    "runs",
    "serve",
    "workflows",
]
