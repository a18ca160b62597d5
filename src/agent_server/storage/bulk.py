"""Many rows by one statement.

Leans on SQLAlchemy's compiler for how one row is written. Refuses to know a table.

Python's SQLite driver lets go of the interpreter's lock at each row that it writes, and must wait
for it again while the loop is busy; so on SQLite the rows go into one ``VALUES``. PostgreSQL's driver
sends the rows of one statement together by itself.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

from sqlalchemy import Connection, Table
from sqlalchemy.engine import Dialect

VARIABLES: Final = 30_000
"""Values of one statement; SQLite takes 32,766."""
_Process = Callable[[Any], Any] | None
_Made = tuple[str, str, str, tuple[tuple[str, _Process], ...]]
"""What stands before the row, the row, what follows, and how each of its values is bound."""


def insert_rows(connection: Connection, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Run ``statement``, an ``INSERT`` of one row of bound values, for each of ``rows``, which have
    the same names."""
    if len(rows) < 2 or connection.dialect.name != "sqlite":
        connection.execute(statement, list(rows))
        return
    _execute(connection, _compiled(statement, tuple(rows[0]), connection.dialect), rows)


def update_rows(
    connection: Connection,
    table: Table,
    rows: Sequence[dict[str, Any]],
    by: Sequence[str],
    clears: Sequence[str],
) -> None:
    """On SQLite: give the rows of ``table`` that have the values of ``rows`` in the columns ``by`` the other
    values that stand there, and no value in ``clears``."""
    made = _update(table, tuple(rows[0]), tuple(by), tuple(clears), connection.dialect)
    _execute(connection, made, rows)


def _execute(connection: Connection, made: _Made, rows: Sequence[dict[str, Any]]) -> None:
    """Run the statement once for as many rows as it may bind values of."""
    head, row, tail, columns = made
    most = VARIABLES // len(columns)
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        connection.exec_driver_sql(
            head + ", ".join([row] * len(some)) + tail, _bound(some, columns)
        )


def _bound(
    rows: Sequence[dict[str, Any]], columns: tuple[tuple[str, _Process], ...]
) -> tuple[Any, ...]:
    # A column at a time: that is half the cost of a value at a time.
    bound: list[list[Any]] = []
    for name, process in columns:
        values = [row[name] for row in rows]
        if process is not None:
            values = [None if value is None else process(value) for value in values]
        bound.append(values)
    return tuple(chain.from_iterable(zip(*bound, strict=True)))


@lru_cache(maxsize=8)
def _update(
    table: Table,
    names: tuple[str, ...],
    by: tuple[str, ...],
    clears: tuple[str, ...],
    dialect: Dialect,
) -> _Made:
    """As ``_compiled``, of an update: SQLite calls the columns of a ``VALUES`` by their number."""
    given = {name: f"given.column{number}" for number, name in enumerate(names, 1)}
    sets = [f"{name} = {given[name]}" for name in names if name not in by]
    sets += [f"{name} = NULL" for name in clears]
    where = [f"{table.name}.{name} = {given[name]}" for name in by]
    columns = tuple((name, table.c[name].type.bind_processor(dialect)) for name in names)
    return (
        f"UPDATE {table.name} SET {', '.join(sets)} FROM (VALUES ",
        f"({', '.join('?' * len(names))})",
        f") AS given WHERE {' AND '.join(where)}",
        columns,
    )


@lru_cache(maxsize=64)
def _compiled(statement: Any, names: tuple[str, ...], dialect: Dialect) -> _Made:
    """An ``INSERT`` of one row, taken apart."""
    compiled = statement.compile(dialect=dialect, column_keys=list(names))
    found = re.fullmatch(r"(.* VALUES )(\([?, ]+\))(.*)", compiled.string, re.DOTALL)
    assert found is not None and compiled.positiontup is not None, compiled.string
    columns = tuple(
        (name, compiled.binds[name].type.bind_processor(dialect)) for name in compiled.positiontup
    )
    assert len(columns) == found[2].count("?"), compiled.string
    return found[1], found[2], found[3], columns
