"""Watches the SQL of a server: each statement that looks something up by a name that a tenant may
choose (a session, a subject, a key, a memory's id, …) must name the tenant, once for each table.

Imported into the server's process by ``agents_served``. Leans on SQLAlchemy's events, so that no
statement can be sent past it. It knows such names by the word that the tests plant in them, and
memories by their ids; ids that only the server makes (runs, tasks, …) name nothing of another's.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from agent_server.storage.tables import metadata

SECRET = "marigold"
"""Stands in every name that the tests plant."""
WITH_TENANT = frozenset(t.name for t in metadata.sorted_tables if "tenant" in t.c)
ELSEWISE = {
    r"FROM tasks WHERE tasks\.lane = (\?|\$)": "a lane's name begins with its tenant",
    r"^UPDATE runs .* WHERE runs\.id = (\?|\$)": "the server makes ids of runs",
    r"\bspace (\+ 0 )?= (\?|\$|CAST\(value|json_extract)": "a namespace's number is of one tenant",
    r"\(memories\.space, memories\.\"?key\"?\) IN": "a namespace's number is of one tenant",
    r"memories\.lexemes @@ CAST\((given\.)?word AS": "a namespace's number stands before each word",
}
"""Statements that may go without, and why."""
_TABLES = re.compile(r"\b(?:FROM|JOIN|UPDATE|INTO)\s+\"?(\w+)")
_TENANT = re.compile(
    r"\btenant (?:= (?:\?|\$|\w+\.tenant)|IN)|INTO \w+ \(.*?\btenant\b.*?\)|"
    r"memories\.space = memory_spaces\.id"
)
"""What binds a table to a tenant, or to a table that is bound to one."""
_NAME = re.compile(rf"[^{{]{{0,150}}{SECRET}.{{0,150}}|mem_[0-9a-f]{{32}}", re.DOTALL)


def unbound(statement: str) -> bool:
    """Whether a table in it is read or written without a word of whose rows."""
    if any(re.search(pattern, statement) for pattern in ELSEWISE):
        return False
    return len(tables_in(statement)) > len(_TENANT.findall(statement))


def tables_in(statement: str) -> list[str]:
    """The tables that have a tenant, each as often as it is named."""
    return [name for name in _TABLES.findall(statement) if name in WITH_TENANT]


def watch(book: Path) -> None:
    """From now on write each kind of statement that binds a chosen name to ``book``, one a line."""
    seen: set[str] = set()

    @event.listens_for(Engine, "before_cursor_execute")
    def _look(_c: Any, _cursor: Any, statement: str, bound: Any, *_: Any) -> None:
        kind = " ".join(re.sub(r"((\?|\$\d+(::\w+)?), )+", "", statement).split())
        if kind not in seen and any(_NAME.fullmatch(value) for value in _flat(bound)):
            seen.add(kind)
            with book.open("a") as file:
                file.write(f"{kind}\n")


def _flat(bound: Any) -> Iterator[str]:
    if isinstance(bound, str):
        yield bound
    elif isinstance(bound, dict):
        yield from _flat(list(bound.values()))
    elif isinstance(bound, (list, tuple)):
        for value in bound:
            yield from _flat(value)


if "STATEMENTS_FILE" in os.environ:
    watch(Path(os.environ["STATEMENTS_FILE"]))
