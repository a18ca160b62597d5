"""Which SQLite the server runs on: one that comes as a package, or Python's own.

Leans on ``pysqlite3`` (a recent SQLite inside a wheel) and ``sqlite-vec`` where their wheels exist,
else on the standard library. Refuses to fail for want of an extension: Python's own ``sqlite3``
may be built without loading any, and all but the speed of vector search goes on without.
"""

import importlib
import math
from typing import Any, Final

try:
    driver: Final[Any] = importlib.import_module("pysqlite3.dbapi2")
except ImportError:  # No wheel for this platform.
    driver = importlib.import_module("sqlite3")  # type: ignore[misc]  # the other of the two

VERSION: Final[str] = driver.sqlite_version
SECURE_TEXT_INDEX: Final[bool] = driver.sqlite_version_info >= (3, 42)
"""Whether the text index can erase what is deleted, instead of marking it."""


def add_functions(connection: Any) -> None:
    """Give ``connection`` what not every build of SQLite has, and what there is of sqlite-vec."""
    connection.create_function("ln", 1, math.log, deterministic=True)
    load_vector_functions(connection)


def load_vector_functions(connection: Any) -> str | None:
    """Give ``connection`` the functions of sqlite-vec; None, or why it has not got them."""
    if not hasattr(connection, "enable_load_extension"):
        return f"this Python's sqlite3 ({VERSION}) cannot load extensions"
    try:
        sqlite_vec = importlib.import_module("sqlite_vec")
        connection.enable_load_extension(True)
        try:
            connection.load_extension(sqlite_vec.loadable_path())
        finally:
            connection.enable_load_extension(False)
    except (ImportError, OSError, AttributeError, driver.Error) as error:
        return f"sqlite-vec cannot be loaded ({error})"
    return None
