"""Checks a JSON value against a JSON Schema (draft 2020-12), and says every fault with its place.

Leans on jsonschema with a registry that holds nothing: jsonschema's own default would fetch a
remote ``$ref`` over the network. Refuses to know what the value is for.
"""

from typing import Any, Final

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError

MAX_FAULTS: Final = 50
_NOTHING_ELSE: Final[Registry[Any]] = Registry()


def checked(value: Any, schema: JsonObject) -> list[FieldError]:
    """What is wrong with ``value``; empty when it fits."""
    found: list[FieldError] = []
    validator = jsonschema.Draft202012Validator(schema, registry=_NOTHING_ELSE)
    try:
        for error in validator.iter_errors(value):
            path = "".join(f"/{part}" for part in error.absolute_path)
            found.append(FieldError(path=path, message=error.message[:500]))
            if len(found) == MAX_FAULTS:
                break
    except Unresolvable as error:
        found.append(
            FieldError(path="", message=f"the schema refers to {error.ref!r}, which is not in it")
        )
    except RecursionError:
        found.append(FieldError(path="", message="the schema refers to itself without end"))
    return found
