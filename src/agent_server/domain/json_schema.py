"""Whether a JSON value fits a JSON Schema (draft 2020-12), with each fault at its place.

Leans on jsonschema, shut off from the network: its own default would fetch a remote ``$ref``.
Refuses to know what the value is for.
"""

from typing import Any, Final

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError

MAX_FAULTS: Final = 50
MAX_MESSAGE: Final = 500
"""Characters of a message: jsonschema quotes the whole value."""
_NOTES: Final = (
    "title description default examples deprecated readOnly writeOnly format definitions"
)
KEYWORDS: Final = frozenset((*jsonschema.Draft202012Validator.VALIDATORS, *_NOTES.split()))
"""What a schema may say, keywords that begin with ``$`` aside."""
_NOTHING_ELSE: Final[Registry[Any]] = Registry()


def schema_fault(schema: JsonObject) -> str | None:
    """What keeps ``schema`` from being a JSON Schema, or None."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its root"
        return f"it is not a JSON Schema: at {where}: {error.message}"
    return None


def faults_in(value: Any, schema: JsonObject, *, at: str = "") -> list[FieldError]:
    """What is wrong with ``value``, the first 50 faults; empty when it fits. ``at`` is put in
    front of each path (``/a/0``)."""
    found: list[FieldError] = []
    validator = jsonschema.Draft202012Validator(schema, registry=_NOTHING_ELSE)
    try:
        for error in validator.iter_errors(value):
            path = at + "".join(f"/{part}" for part in error.absolute_path)
            found.append(FieldError(path=path, message=error.message[:MAX_MESSAGE]))
            if len(found) == MAX_FAULTS:
                break
    except Unresolvable as error:
        message = f"the schema refers to {error.ref!r}, which is not in it"
        found.append(FieldError(path=at, message=message))
    except RecursionError:
        found.append(FieldError(path=at, message="the schema refers to itself without end"))
    return found
