"""Whether an answer is what was expected: JSON that fits a JSON Schema.

Leans on the check of values against schemas. Refuses to know who answered.
"""

import json
import re
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.json_schema import faults_in

_FENCE = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def fit(output: Any, schema: JsonObject) -> tuple[Any, list[str]]:
    """``output`` as the schema wants it, and what is wrong with it.

    A text is read as JSON first, with or without a Markdown fence around it; a text that is no
    JSON still fits a schema that takes text.
    """
    if not isinstance(output, str):
        return output, _faults(output, schema)
    fenced = _FENCE.fullmatch(output)
    try:
        value = json.loads(fenced.group(1) if fenced else output)
    except ValueError as error:
        if not _faults(output, schema):
            return output, []
        return output, [f"the answer is not JSON: {error}"]
    faults = _faults(value, schema)
    if faults and not _faults(output, schema):
        return output, []
    return value, faults


def _faults(value: Any, schema: JsonObject) -> list[str]:
    """What is wrong with ``value``, in words for the model that is to mend it."""
    return [f"{fault.path or 'the whole'}: {fault.message}" for fault in faults_in(value, schema)]
