"""A definition's text, YAML or JSON, as JSON values that know the line they stand on.

Leans on PyYAML's parser, and on its events alone. Refuses what is not JSON: tags, dates, ``yes``
for true, a key twice, references that multiply. So ``on`` is a text, as it is in YAML 1.2.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

import yaml

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, InvalidWorkflow
from agent_server.domain.workflows import MAX_JSON_DEPTH

MAX_VALUES: Final = 200_000
"""Values in one definition, those behind aliases counted at each place they stand."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WORDS: Final[Mapping[str, Any]] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_HINTS: Final[Mapping[str, str]] = {
    "cannot start any token": "YAML is indented by spaces, not by tabs; a text that begins with "
    "'@', '`', '%' or '|' stands in quotes.",
    "mapping values are not allowed": "A text with ': ' in it stands in quotes; what belongs to a "
    "key is indented deeper than it.",
    "did not find expected": "Look at the indentation, here and in the line before: the fields of a "
    "node begin in one column, and so do the '- ' of a list. Quotes and brackets are closed.",
    "could not find expected ':'": "A field is written 'name: value'; what belongs to it is indented "
    "deeper than it.",
    "unknown escape character": "Use single quotes, in which a backslash is itself.",
}
"""What mends the file, by words of the parser."""
_INT = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]{1,300}(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")


@dataclass(frozen=True)
class Source:
    """A definition as it was written."""

    data: JsonObject
    lines: Mapping[str, int]
    """Of each place (a JSON pointer), the line from 1."""

    def line_of(self, path: str) -> int | None:
        """The line of ``path``, or of the nearest place around it that is there."""
        while path and path not in self.lines:
            path = path.rpartition("/")[0]
        return self.lines.get(path)


def read_source(text: str) -> Source:
    """The definition in ``text``. Raises ``InvalidWorkflow`` with the line of what is wrong."""
    found = _json(text)
    reader = _Reader()
    try:
        # JSON may be indented with tabs, which YAML does not know.
        for event in yaml.parse(text if found is None else text.replace("\t", " "), _LOADER):
            reader.take(event)
    except (yaml.YAMLError, InvalidWorkflow) as error:
        if found is None:
            raise _unreadable(error) from error
        # JSON that YAML cannot read, such as half a character: lines up to there will do.
    root = reader.root if found is None else found
    if not isinstance(root, dict):
        what = "empty" if root is None else f"{type(root).__name__}, not an object"
        raise _refused(
            f"it is {what}", 1, hint="A workflow is an object with 'name' and 'nodes', a list."
        )
    return Source(root, reader.lines)


def _json(text: str) -> JsonObject | None:
    """The object, if ``text`` is JSON to the letter."""
    if text.lstrip()[:1] != "{":
        return None
    try:
        found = json.loads(
            text, parse_constant=_number, parse_float=_number, object_pairs_hook=_no_twins
        )
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(written: str) -> float:
    number = float(written)
    if not isfinite(number):
        raise ValueError(written)
    return number


def _no_twins(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _unreadable(error: Exception) -> InvalidWorkflow:
    if isinstance(error, InvalidWorkflow):
        return error
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    line = None if mark is None else mark.line + 1
    hint = next((hint for words, hint in _HINTS.items() if words in str(problem)), None)
    return _refused(f"it is neither YAML nor JSON: {problem}", line, hint=hint)


def _refused(message: str, line: int | None, *, hint: str | None = None) -> InvalidWorkflow:
    where = "" if line is None else f" in line {line}"
    hint = hint or "Send one YAML or JSON document."
    return InvalidWorkflow(
        f"The workflow cannot be read{where}: {message}.",
        hint=hint,
        errors=[FieldError(path="", message=message, line=line, hint=hint)],
    )


@dataclass
class _Open:
    """A list or an object that has not ended."""

    value: Any
    path: str
    anchor: str | None
    values_before: int
    key: str | None = None
    line: int = 0


@dataclass
class _Reader:
    """Builds values from the parser's events, without recursion."""

    root: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    _open: list[_Open] = field(default_factory=list)
    _anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    _values: int = 0
    _documents: int = 0

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _refused("a second document begins", line)
        elif isinstance(event, yaml.ScalarEvent):
            holder = self._open[-1] if self._open else None
            if holder is not None and isinstance(holder.value, dict) and holder.key is None:
                if event.value in holder.value:
                    raise _refused(f"the key {event.value!r} stands there twice", line)
                holder.key, holder.line = event.value, line
                return
            self._put(_scalar(event, line), line, event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _refused(f"the alias *{event.anchor} names nothing that has ended", line)
            value, size = self._anchors[event.anchor]
            self._values += size - 1
            self._put(value, line, None)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
                raise _refused(f"the tag {event.tag!r} is not JSON", line)
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
            before = self._values
            path = self._put(value, line, None)
            if len(self._open) >= MAX_JSON_DEPTH:
                raise _refused(f"it is nested deeper than {MAX_JSON_DEPTH} levels", line)
            self._open.append(_Open(value, path, event.anchor, before))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            ended = self._open.pop()
            if ended.anchor is not None:
                self._anchors[ended.anchor] = (ended.value, self._values - ended.values_before)

    def _put(self, value: Any, line: int, anchor: str | None) -> str:
        """Put ``value`` where the text stands, and answer its path."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise _refused(f"it holds more than {MAX_VALUES} values", line)
        path = ""
        if not self._open:
            self.root = value
        else:
            holder = self._open[-1]
            if isinstance(holder.value, list):
                path = f"{holder.path}/{len(holder.value)}"
                holder.value.append(value)
            elif holder.key is None:
                hint = 'A value with {{ … }} in it stands in quotes: "{{ inputs.topic }}".'
                raise _refused("a key must be a text", line, hint=hint)
            else:
                path = f"{holder.path}/{holder.key}"
                holder.value[holder.key] = value
                holder.key, line = None, holder.line
        self.lines[path] = line
        if anchor is not None:
            self._anchors[anchor] = (value, 1)
        return path


def _scalar(event: Any, line: int) -> Any:
    text: str = event.value
    if event.tag in ("!", "tag:yaml.org,2002:str") or (event.tag is None and event.style):
        return text
    if event.tag is not None:
        raise _refused(f"the tag {event.tag!r} is not JSON", line)
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        try:
            return _number(text)
        except ValueError:
            raise _refused(f"the number {text[:40]} is too large", line) from None
    return text
