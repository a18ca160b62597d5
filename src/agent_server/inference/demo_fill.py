"""Values for a JSON schema, made from a message's own words and numbers: the same every time.

Leans on the standard library. Refuses to know what the values are for: a tool's arguments and
a structured answer are filled in the same way.
"""

import re
from collections.abc import Mapping
from typing import Any

_WORD = re.compile(r"[A-Za-zÀ-ÿ][\w'’-]*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_TEXTLIKE = frozenset(
    "text query question input message content prompt topic goal description task body note "
    "summary sentence subject data instructions request".split()
)
_DATED = {
    "date": "2025-01-01",
    "date-time": "2025-01-01T00:00:00Z",
    "time": "12:00:00Z",
    "email": "demo@example.com",
    "uri": "https://example.com/",
    "url": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
}
_MAX_DEPTH = 8
_MAX_TEXT = 500


class Filler:
    """Fills schemas from one message; numbers and names are taken in the order they stand."""

    def __init__(
        self, message: str, *, hints: Mapping[str, Any] | None = None, free_text: str | None = None
    ) -> None:
        self._message = " ".join(message.split())[:_MAX_TEXT]
        self._hints = dict(hints or {})
        self._free_text = free_text
        """What an unbounded text becomes; without it, words of the message."""
        self._numbers = [float(found) for found in _NUMBER.findall(message)]
        names = _WORD.findall(message)
        self._names = [w for i, w in enumerate(names) if w[0].isupper() and i > 0] or names[-1:]

    def object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """An object for ``schema``: what is required, and what is hinted at."""
        value = self._value("", schema, schema, 0)
        return value if isinstance(value, dict) else {}

    def value(self, schema: Mapping[str, Any]) -> Any:
        return self._value("", schema, schema, 0)

    def _value(self, name: str, schema: Any, root: Mapping[str, Any], depth: int) -> Any:
        schema = resolve(schema, root)
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return None
        if name in self._hints and _admits(schema, self._hints[name]):
            return self._hints[name]
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self._choice(schema["enum"])
        if schema.get("default") is not None:
            return schema["default"]
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                variants = [resolve(variant, root) for variant in schema[key]]
                real = [v for v in variants if v.get("type") != "null"]
                return self._value(name, (real or variants)[0], root, depth + 1)
        if schema.get("allOf"):
            merged: dict[str, Any] = {}
            for part in schema["allOf"]:
                merged.update(resolve(part, root))
            return self._value(name, merged, root, depth + 1)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, root, depth)
        if kind == "array":
            return self._array(name, schema, root, depth)
        if kind in ("integer", "number"):
            return self._number(schema, kind == "integer")
        if kind == "boolean":
            return True
        if kind == "null":
            return None
        return self._text(name, schema)

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> Any:
        properties = schema.get("properties") or {}
        required = schema.get("required") or ()
        return {
            name: self._value(name, part, root, depth + 1)
            for name, part in properties.items()
            if name in required or name in self._hints
        }

    def _array(
        self, name: str, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int
    ) -> Any:
        if schema.get("prefixItems"):
            return [self._value(name, part, root, depth + 1) for part in schema["prefixItems"]]
        count = max(int(schema.get("minItems") or 0), 1)
        if schema.get("maxItems") is not None:
            count = min(count, int(schema["maxItems"]))
        items = schema.get("items", {"type": "string"})
        values = [self._value(name, items, root, depth + 1) for _ in range(count)]
        if schema.get("uniqueItems"):
            values = [v for i, v in enumerate(values) if v not in values[:i]]
        return values

    def _choice(self, options: list[Any]) -> Any:
        low = self._message.lower()
        said = [o for o in options if isinstance(o, str) and o and o.lower() in low]
        return said[0] if said else options[0]

    def _number(self, schema: Mapping[str, Any], whole: bool) -> Any:
        value = self._numbers.pop(0) if self._numbers else 1.0
        least, most = schema.get("minimum"), schema.get("maximum")
        if schema.get("exclusiveMinimum") is not None:
            least = schema["exclusiveMinimum"] + 1
        if schema.get("exclusiveMaximum") is not None:
            most = schema["exclusiveMaximum"] - 1
        if least is not None:
            value = max(value, least)
        if most is not None:
            value = min(value, most)
        step = schema.get("multipleOf")
        if step:
            value = round(value / step) * step
        return int(value) if whole or float(value).is_integer() else value

    def _text(self, name: str, schema: Mapping[str, Any]) -> str:
        low = name.lower()
        form = schema.get("format")
        if form in _DATED:
            return _DATED[form]
        least = int(schema.get("minLength") or 0)
        most = int(schema.get("maxLength") or _MAX_TEXT)
        if self._free_text is not None:
            text = self._free_text
        elif low.split("_")[-1] in _TEXTLIKE or low in _TEXTLIKE or not self._names:
            text = self._message or "demo"
        elif "zone" in low:
            text = "UTC"
        else:
            text = self._names[0] if len(self._names) == 1 else self._names.pop(0)
        pattern = schema.get("pattern")
        if pattern and not re.search(pattern, text):
            words = [*_WORD.findall(self._message), *_NUMBER.findall(self._message), "a", "A", "1"]
            text = next((w for w in words if re.search(pattern, w)), text)
        return text[:most].ljust(least, "-")


def resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """``schema``, or what its ``$ref`` inside ``root`` points at."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        target: Any = root
        for step in reference.lstrip("#").strip("/").split("/"):
            target = target.get(step, {}) if step and isinstance(target, Mapping) else target
        schema = target
    return {}


def _admits(schema: Mapping[str, Any], value: Any) -> bool:
    kinds = schema.get("type")
    if schema.get("enum") is not None:
        return value in schema["enum"]
    if kinds is None:
        return True
    names = kinds if isinstance(kinds, list) else [kinds]
    wanted = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
    return wanted.get(type(value), "object") in names
