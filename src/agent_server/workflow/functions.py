"""The operators and functions of the expression language: total, and bounded in time and size.

Leans on the values' bounds. Refuses to know syntax; what a function is given is a JSON value.
"""

import ast
from collections.abc import Callable
from typing import Any, Final

from agent_server.workflow.values import (
    MAX_CHARS,
    MAX_INT_BITS,
    MAX_NUMBER_TEXT,
    Work,
    Wrong,
    kind_of,
    measure,
    number,
    to_json,
)


def _add(left: Any, right: Any, work: Work) -> Any:
    if type(left) is str and type(right) is str:
        if len(left) + len(right) > MAX_CHARS:
            raise Wrong(f"a text is over {MAX_CHARS} characters")
        return left + right
    if type(left) is list and type(right) is list:
        work.spend(len(left) + len(right))
        made = left + right
        measure(made, work)
        return made
    if str in (type(left), type(right)):
        raise Wrong(f"{kind_of(left)} and {kind_of(right)} cannot be added", "Use str(…) first.")
    return number(number(left) + number(right))


def _arithmetic(operate: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Work], Any]:
    return lambda left, right, work: number(operate(number(left), number(right)))


def _power(left: Any, right: Any, work: Work) -> Any:
    base, exponent = number(left), number(right)
    if abs(exponent) > MAX_INT_BITS or (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * abs(exponent) > MAX_INT_BITS
    ):
        raise Wrong("a power is too large")
    value = base**exponent
    if isinstance(value, complex):
        raise Wrong("a power is not a real number")
    return number(value)


def _contains(left: Any, right: Any) -> bool:
    if type(right) in (list, dict) or (type(right) is str and type(left) is str):
        if type(right) is dict and type(left) is not str:
            return False
        return left in right
    raise Wrong(f"{kind_of(right)} cannot contain {kind_of(left)}")


def _sized(value: Any) -> Any:
    if type(value) not in (str, list, dict):
        raise Wrong(f"{kind_of(value)} has no length")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise Wrong(f"{kind_of(value)} is not text")
    return value


def _extreme(choose: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    def run(*values: Any) -> Any:
        items = values[0] if len(values) == 1 else list(values)
        if type(items) is not list or not items:
            raise Wrong("it needs numbers or texts, or a list of them that is not empty")
        return choose(items)

    return run


def _sum(items: Any) -> Any:
    if type(items) is not list:
        raise Wrong(f"{kind_of(items)} cannot be summed up")
    total: Any = 0
    for item in items:
        total = number(total + number(item))
    return total


def _int(value: Any) -> int:
    if type(value) is str:
        return int(_short(value))
    return int(number(value))


def _float(value: Any) -> float:
    made: float = number(float(_short(value) if type(value) is str else number(value)))
    return made


def _short(text: str) -> str:
    if len(text) > MAX_NUMBER_TEXT:
        raise Wrong("a text is too long to be a number")
    return text


def _as_text(value: Any) -> str:
    return value if type(value) is str else to_json(value)


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and (type(digits) is not int or abs(digits) > 100):
        raise Wrong("the number of digits must be a whole number up to 100")
    return number(round(number(value), digits))


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise Wrong(f"{kind_of(value)} is not an object")
    return value


FUNCTIONS: Final[dict[str, tuple[Callable[..., Any], int, int]]] = {
    "len": (lambda value: len(_sized(value)), 1, 1),
    "min": (_extreme(min), 1, 20),
    "max": (_extreme(max), 1, 20),
    "sum": (_sum, 1, 1),
    "round": (_round, 1, 2),
    "abs": (lambda value: abs(number(value)), 1, 1),
    "int": (_int, 1, 1),
    "float": (_float, 1, 1),
    "str": (_as_text, 1, 1),
    "json": (to_json, 1, 1),
    "lower": (lambda value: _text(value).lower(), 1, 1),
    "upper": (lambda value: _text(value).upper(), 1, 1),
    "contains": (lambda container, item: _contains(item, container), 2, 2),
    "startswith": (lambda text, start: _text(text).startswith(_text(start)), 2, 2),
    "keys": (lambda value: list(_object(value)), 1, 1),
    "values": (lambda value: list(_object(value).values()), 1, 1),
    "get": (lambda value, key, default=None: _object(value).get(_text(key), default), 2, 3),
}
"""Every function, with the fewest and the most arguments it takes."""


OPERATORS: Final[dict[type[ast.operator], Callable[[Any, Any, Work], Any]]] = {
    ast.Add: _add,
    ast.Sub: _arithmetic(lambda left, right: left - right),
    ast.Mult: _arithmetic(lambda left, right: left * right),
    ast.Div: _arithmetic(lambda left, right: left / right),
    ast.FloorDiv: _arithmetic(lambda left, right: left // right),
    ast.Mod: _arithmetic(lambda left, right: left % right),
    ast.Pow: _power,
}

COMPARISONS: Final[dict[type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    ast.Eq: lambda left, right: bool(left == right),
    ast.NotEq: lambda left, right: bool(left != right),
    ast.Lt: lambda left, right: bool(left < right),
    ast.LtE: lambda left, right: bool(left <= right),
    ast.Gt: lambda left, right: bool(left > right),
    ast.GtE: lambda left, right: bool(left >= right),
    ast.In: _contains,
    ast.NotIn: lambda left, right: not _contains(left, right),
}
