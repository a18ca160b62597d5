"""A workflow as text: YAML or JSON, read into JSON values that remember their lines.

Leans on PyYAML's parser alone; what a plain scalar means is the core schema of YAML 1.2 (so ``on``
and ``yes`` are texts, and a date is one too). Refuses tags, keys that are not texts or stand twice,
several documents, and aliases that would grow without measure.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from agent_server.domain.errors import FieldError, InvalidWorkflow

MAX_TEXT: Final = 2_000_000
"""Characters of a definition's text."""
MAX_VALUES: Final = 200_000
"""Values in it, aliases counted as what they stand for."""
MAX_LEVELS: Final = 100

_JSON: Final = re.compile(r'\s*\{\s*["}]')
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG: Final = "tag:yaml.org,2002:"
_CORE: Final = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
)


class _Core(_Loader):  # type: ignore[misc]  # with the C parser or without, it is the same class
    """Only composes; ``_Reader`` makes the values."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _name, _pattern, _first in _CORE:
    _Core.add_implicit_resolver(
        _TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first) + ([""] if not _name[4:] else [])
    )


@dataclass
class Source:
    """A definition's text, read."""

    data: Any
    """JSON values."""
    _text: str
    _root: Any = field(default=None, repr=False)

    def line(self, path: str) -> int | None:
        """The line, from 1, of what stands at ``path`` (a JSON pointer); of the nearest thing
        around it where there is nothing."""
        if self._root is None:
            try:
                self._root = yaml.compose(self._text, Loader=_Core)
            except yaml.YAMLError:  # JSON with a tab in it, say
                self._root = False
        if not self._root:
            return None
        node, found = self._root, self._root.start_mark.line
        for part in path.split("/")[1:]:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    break
                node, found = pair[1], pair[0].start_mark.line
            elif isinstance(node, yaml.SequenceNode) and part.isdigit():
                if int(part) >= len(node.value):
                    break
                node = node.value[int(part)]
                found = node.start_mark.line
            else:
                break
        return int(found) + 1


def read_source(text: str) -> Source:
    """``text``, YAML or JSON, as values. Raises ``InvalidWorkflow`` with the line."""
    if len(text) > MAX_TEXT:
        raise InvalidWorkflow(f"The definition is longer than {MAX_TEXT} characters.")
    if _JSON.match(text):
        try:
            return Source(json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant), text)
        except json.JSONDecodeError as error:
            raise _fault(f"it is not JSON: {error.msg}", error.lineno) from None
        except RecursionError:
            raise _fault(f"it is nested deeper than {MAX_LEVELS} levels", None) from None
        except ValueError as error:
            raise _fault(str(error), None) from None
    return _read_yaml(text)


def _read_yaml(text: str) -> Source:
    try:
        root = yaml.compose(text, Loader=_Core)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = mark.line + 1 if mark else None
        raise _fault(f"it is neither YAML nor JSON: {problem}", line) from None
    except RecursionError:
        raise _fault(f"it is nested deeper than {MAX_LEVELS} levels", None) from None
    if root is None:
        raise _fault("it is empty", None)
    return Source(_Reader().value(root, 0), text, root)


class _Reader:
    """Makes JSON values of YAML's nodes, as many as are allowed."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def value(self, node: Any, level: int) -> Any:
        line = node.start_mark.line + 1
        self._left -= 1
        if self._left < 0:
            raise _fault(f"it has more than {MAX_VALUES} values", line)
        if level > MAX_LEVELS:
            raise _fault(f"it is nested deeper than {MAX_LEVELS} levels, or in itself", line)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, level + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            made: dict[str, Any] = {}
            for key, item in node.value:
                at = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise _fault("a key must be a text", at)
                if key.value in made:
                    raise _fault(f"the key {key.value!r} stands twice", at)
                made[key.value] = self.value(item, level + 1)
            return made
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, line)
        raise _fault(f"the tag {node.tag!r} is not allowed", line)


def _scalar(node: Any, line: int) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if kind == "float":
            return float(text)
    except ValueError as error:
        raise _fault(f"{text[:40]!r} is not a number that can be read: {error}", line) from None
    raise _fault(f"the tag {node.tag!r} is not allowed", line)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _fault(message: str, line: int | None) -> InvalidWorkflow:
    where = f", line {line}" if line else ""
    return InvalidWorkflow(
        f"The definition cannot be read{where}: {message}.",
        errors=[FieldError(path="", message=message, line=line)],
    )
