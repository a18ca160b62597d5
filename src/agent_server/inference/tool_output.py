"""What a tool returned, as JSON that replays to an equal thing for the model.

Leans on the SDK's tool output types and on Pydantic. Refuses to know the ledger.
"""

import math
from typing import Any

from agents import FunctionTool, ToolOutputFileContent, ToolOutputImage, ToolOutputText
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

_CONTENT = (ToolOutputText, ToolOutputImage, ToolOutputFileContent)
_BY_TYPE: dict[str, type[BaseModel]] = {
    "text": ToolOutputText,
    "image": ToolOutputImage,
    "file": ToolOutputFileContent,
}
_FORM = "$form"
"""Marks a JSON object that stands for something JSON does not have."""


class ReplayedOutput:
    """An object that a tool returned in an earlier attempt: its text, as the model saw it, and
    its JSON value."""

    def __init__(self, text: str, value: Any) -> None:
        self.text = text
        self.value = value

    def __str__(self) -> str:
        return self.text


def output_to_json(tool: FunctionTool, output: Any) -> Any:
    """``output`` as the ledger holds it: itself where it is plain JSON."""
    if _plain(output):
        return {_FORM: "json", "value": output} if _marked(output) else output
    adapter = tool._output_type_adapter
    if adapter is not None:
        return {_FORM: "typed", "value": adapter.dump_python(output, mode="json", by_alias=True)}
    if isinstance(output, _CONTENT):
        return {_FORM: "content", "value": output.model_dump(mode="json")}
    if isinstance(output, (list, tuple)) and output:
        if all(isinstance(item, _CONTENT) for item in output):
            parts = [item.model_dump(mode="json") for item in output]
            return {_FORM: "contents", "value": parts}
        if all(isinstance(item, _CONTENT) or _plain(item) for item in output):
            mixed = [output_to_json(tool, item) for item in output]
            return {_FORM: "mixed", "value": mixed, "tuple": isinstance(output, tuple)}
    return {_FORM: "text", "text": str(output), "value": to_jsonable_python(output, fallback=str)}


def output_from_json(tool: FunctionTool, value: Any) -> Any:
    """The inverse of ``output_to_json``."""
    if not _marked(value):
        return value
    form, held = value[_FORM], value["value"]
    if form == "typed" and tool._output_type_adapter is not None:
        return tool._output_type_adapter.validate_python(held)
    if form == "content":
        return _BY_TYPE[held["type"]].model_validate(held)
    if form == "contents":
        return [_BY_TYPE[part["type"]].model_validate(part) for part in held]
    if form == "mixed":
        items = [output_from_json(tool, item) for item in held]
        return tuple(items) if value["tuple"] else items
    if form == "text":
        return ReplayedOutput(value["text"], held)
    return held


def json_value(output: Any) -> Any:
    """``output`` of an agent or a tool as a plain JSON value, for results."""
    if isinstance(output, ReplayedOutput):
        return output.value
    return output if _plain(output) else to_jsonable_python(output, fallback=str)


def _marked(value: Any) -> bool:
    return type(value) is dict and _FORM in value


def _plain(value: Any) -> bool:
    """Whether JSON gives ``value`` back exactly."""
    kind = type(value)
    if value is None or kind in (str, int, bool):
        return True
    if kind is float:
        return math.isfinite(value)
    if kind is list:
        return all(_plain(item) for item in value)
    if kind is dict:
        return all(type(key) is str and _plain(item) for key, item in value.items())
    return False
