"""Many rows by one statement.

Leans on SQLAlchemy's compiler for how one row is written. Refuses to know a table.

Python's SQLite driver lets go of the interpreter's lock at each row that it writes, and must wait
for it again while the loop is busy; so on SQLite the rows go into one ``VALUES``. PostgreSQL's driver
sends the rows of one statement together by itself.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.engine import Dialect

VARIABLES: Final = 30_000
"""Values of one statement; SQLite takes 32,766."""
_Process = Callable[[Any], Any] | None


def insert_rows(connection: Connection, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Run ``statement``, an ``INSERT`` of one row of bound values, for each of ``rows``, which have
    the same names."""
    if len(rows) < 2 or connection.dialect.name != "sqlite":
        connection.execute(statement, list(rows))
        return
    dialect = connection.dialect
    head, row, tail, columns = _compiled(statement, tuple(rows[0]), dialect)
    most = VARIABLES // len(columns)
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        values = tuple(
            values[name] if process is None else process(values[name])
            for values in some
            for name, process in columns
        )
        connection.exec_driver_sql(head + ", ".join([row] * len(some)) + tail, values)


@lru_cache(maxsize=64)
def _compiled(
    statement: Any, names: tuple[str, ...], dialect: Dialect
) -> tuple[str, str, str, tuple[tuple[str, _Process], ...]]:
    """What stands before the row, the row, what follows, and how each of its values is bound."""
    compiled = statement.compile(dialect=dialect, column_keys=list(names))
    found = re.fullmatch(r"(.* VALUES )(\([?, ]+\))(.*)", compiled.string, re.DOTALL)
    assert found is not None and compiled.positiontup is not None, compiled.string
    columns = tuple(
        (name, compiled.binds[name].type.bind_processor(dialect)) for name in compiled.positiontup
    )
    assert len(columns) == found[2].count("?"), compiled.string
    return found[1], found[2], found[3], columns
