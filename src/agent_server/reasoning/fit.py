"""Whether an answer is what was expected: JSON that fits a JSON Schema.

Leans on jsonschema, shut off from the network: a ``$ref`` to somewhere else is a fault, never a
request. Refuses to know who answered.
"""

import json
import re
from typing import Any

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from agent_server.domain.base import JsonObject

MAX_FAULTS = 20
_NOTHING_ELSE: Registry[Any] = Registry()
# jsonschema's own default would fetch a remote ``$ref`` over the network.
_FENCE = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def schema_fault(schema: JsonObject) -> str | None:
    """What keeps ``schema`` from being a JSON Schema, or None."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its root"
        return f"it is not a JSON Schema: at {where}: {error.message}"
    return None


def faults_of(value: Any, schema: JsonObject) -> list[str]:
    """What is wrong with ``value``, each fault with its place; empty if it fits."""
    validator = jsonschema.Draft202012Validator(schema, registry=_NOTHING_ELSE)
    faults: list[str] = []
    try:
        for error in validator.iter_errors(value):
            where = "/".join(map(str, error.absolute_path)) or "the whole"
            faults.append(f"{where}: {error.message}")
            if len(faults) == MAX_FAULTS:
                break
    except Unresolvable as error:
        faults.append(f"the schema refers to {error.ref!r}, which is not part of it")
    except RecursionError:
        faults.append("the schema refers to itself without end")
    return faults


def fit(output: Any, schema: JsonObject) -> tuple[Any, list[str]]:
    """``output`` as the schema wants it, and what is wrong with it.

    A text is read as JSON first, with or without a Markdown fence around it; a text that is no
    JSON still fits a schema that takes text.
    """
    if not isinstance(output, str):
        return output, faults_of(output, schema)
    fenced = _FENCE.fullmatch(output)
    try:
        value = json.loads(fenced.group(1) if fenced else output)
    except ValueError as error:
        if not faults_of(output, schema):
            return output, []
        return output, [f"the answer is not JSON: {error}"]
    faults = faults_of(value, schema)
    if faults and not faults_of(output, schema):
        return output, []
    return value, faults
