"""What commands print that list and show things: tables, and JSON for machines.

Leans on rich. Refuses to know what is listed.
"""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Ids are for copying: never cut.
        table.add_column(
            column,
            no_wrap=column in ("run", "status", "created", "agent", "approval", "asked", "step"),
        )
    return table


def wide_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
