"""What expressions work on: JSON values, the bounds they keep, and how a fault is told.

Leans on nothing of ours. Refuses to know how an expression is written.
"""

import difflib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Final

MAX_LENGTH: Final = 2_000
"""Characters of one expression."""
MAX_NESTING: Final = 60
"""Levels of one expression's tree."""
MAX_CHARS: Final = 1_000_000
"""Characters of a text, and of a value written as JSON (roughly)."""
MAX_RENDERED: Final = 4_000_000
"""Characters that all templates of one node may give together."""
MAX_REFERRED: Final = 16_000_000
"""Characters that all values may have together which one node is handed as they are, by name."""
MAX_WORK: Final = 100_000
"""Elements that one evaluation may touch."""
MAX_INT_BITS: Final = 1_024
MAX_NUMBER_TEXT: Final = 400

RESERVED: Final = frozenset(
    {"inputs", "vars", "nodes", "index", "iteration", "true", "false", "null"}
)
"""Names that the ``as`` of a map cannot take."""


class Lookup:
    """A read-only object of the scope whose fields are found on demand. Subclass it."""

    def find(self, key: str) -> Any:
        """The JSON value under ``key``; raises ``KeyError``."""
        raise KeyError(key)

    def known(self) -> Collection[str]:
        """The keys, for a suggestion."""
        return ()


Scope = Mapping[str, Any]
"""Names to JSON values or ``Lookup``."""


class Work:
    """What one evaluation may still do."""

    __slots__ = ("left", "most")

    def __init__(self, most: int = MAX_WORK) -> None:
        self.most = self.left = most

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Wrong(f"it takes more than {self.most} steps")


class Wrong(Exception):
    """What is wrong, without the expression; ``Expr`` adds it."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__(detail)
        self.hint = hint


def nearest(name: str, known: Collection[str]) -> str | None:
    """The name among ``known`` that ``name`` was most likely meant to be."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Collection[str]) -> str | None:
    """A hint that suggests the nearest name, or lists them when they are few."""
    near = nearest(name, known)
    if near is not None:
        return f"Did you mean {near!r}?"
    if known and len(known) <= 10:
        return "There is: " + ", ".join(sorted(str(k) for k in known)) + "."
    return None


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def measure(value: Any, work: Work, most: int = MAX_CHARS) -> int:
    """Spend one step for each element of ``value`` and answer its characters, roughly; raises when
    it is too large or not JSON."""
    if type(value) is str:
        if len(value) > most:
            raise Wrong(f"a text is over {most} characters")
        return len(value)
    if type(value) not in (list, dict):
        return 8
    chars = 0
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            chars += len(item) + 2
        elif isinstance(item, dict):
            work.spend(len(item) + 1)
            chars += sum(map(len, item)) + 4 * len(item)
            todo.extend(item.values())
        elif isinstance(item, list):
            work.spend(len(item) + 1)
            chars += len(item)
            todo.extend(item)
        elif isinstance(item, Lookup):
            raise Wrong("it gives a whole scope", "Name one thing in it.")
        if chars > most:
            raise Wrong(f"a value is over {most} characters of JSON")
    return chars


def look_up(value: Any, key: Any) -> Any:
    """``value[key]`` for JSON values; nothing of Python's objects can be reached."""
    if type(value) is dict:
        if type(key) is not str:
            raise Wrong(f"a key must be text, not {kind_of(key)}")
        if key in value:
            return value[key]
        raise Wrong(f"there is no {key!r} in it", did_you_mean(key, value))
    if type(value) in (list, str):
        position = position_of(key, of=value)
        if -len(value) <= position < len(value):
            return value[position]
        raise Wrong(f"position {position} is outside; the length is {len(value)}")
    if isinstance(value, Lookup):
        try:
            return value.find(str(key))
        except KeyError:
            raise Wrong(f"there is no {key!r}", did_you_mean(str(key), value.known())) from None
    raise Wrong(f"{kind_of(value)} has no {key!r}")


def position_of(value: Any, of: Any = None) -> int:
    if type(value) is not int:
        if type(of) is list or of is None:
            raise Wrong(f"a position must be a whole number, not {_shown(value)}")
        raise Wrong(f"{kind_of(of)} has no {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 60 else kind_of(value)


def kind_of(value: Any) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "a scope")


def number(value: Any) -> Any:
    """``value`` if it is a number of bearable size. Raises ``Wrong``."""
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            raise Wrong("a number is too large")
    elif type(value) is float:
        if not math.isfinite(value):
            raise Wrong("a number is not finite")
    elif type(value) is not bool:
        raise Wrong(f"{kind_of(value)} is not a number")
    return value
