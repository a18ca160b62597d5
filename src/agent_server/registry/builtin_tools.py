"""The tools that every server has: a calculator, a clock, and statistics of a text.

Leans on the SDK's ``function_tool`` and the standard library. Refuses to touch the world: all
three only read, so a plan may repeat them freely.
"""

import ast
import math
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from agents import FunctionTool, function_tool

MAX_EXPRESSION: Final = 500
"""Characters of an expression."""
MAX_DIGITS: Final = 1_000
"""Digits of any whole number on the way to the result."""
MAX_TEXT: Final = 1_000_000
"""Characters of a text that is counted."""

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e}


def _sum(*values: Number) -> Number:
    return sum(values)


def _round(value: Number, digits: int = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > MAX_DIGITS:
        raise ValueError(f"round takes a whole number of digits, not {digits!r}")
    return round(value, digits) if digits else round(value)


_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "round": _round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "sum": _sum,
    "tan": math.tan,
}


def calculate(expression: str) -> str:
    """The value of an arithmetic ``expression``, as text.

    Walks the syntax tree and knows numbers, the operators ``+ - * / // % **``, parentheses and
    the functions above; there is nothing else it could reach. Raises ``ValueError`` that says
    what is wrong. Time and memory are bounded by the caps on length and digits.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(
            f"the expression has {len(expression)} characters; at most {MAX_EXPRESSION} are allowed"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's remarks on style, as for `1if 1else 2`
            tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    try:
        value = _value(tree.body)
    except ZeroDivisionError as error:
        raise ValueError(f"{expression!r} divides by zero") from error
    except OverflowError as error:
        raise ValueError(f"{expression!r} is too large to compute") from error
    except TypeError as error:
        raise ValueError(
            f"{expression!r} calls a function with arguments it cannot take"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{expression[:80]!r} is nested too deeply") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{expression!r} has no finite value")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _bounded(_UNARY[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            items: list[ast.expr] = []
            for arg in args:
                items += arg.elts if isinstance(arg, (ast.List, ast.Tuple)) else [arg]
            return _bounded(_call(name, [_value(item) for item in items]))
        case _:
            known = ", ".join(sorted(_FUNCTIONS))
            raise ValueError(
                f"{ast.unparse(node)[:80]!r} is not arithmetic: use numbers, + - * / // % ** and "
                f"{known}"
            )


def _call(name: str, values: list[Number]) -> Number:
    try:
        return _FUNCTIONS[name](*values)
    except ValueError as error:
        given = ", ".join(str(value)[:40] for value in values)
        raise ValueError(f"{name}({given}) has no value: {error}") from error


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and abs(base) > 1:
        if base.bit_length() * exponent > MAX_DIGITS * 4:
            raise ValueError(f"a power of more than {MAX_DIGITS} digits is too large to compute")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("the result is not a real number")
    return result


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS * 4:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits is too large to compute")
    return value


def time_in(timezone: str) -> str:
    """The present moment in ``timezone``, as RFC 3339. Raises ``ValueError`` for a bad zone."""
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{timezone!r} is not a time zone; use an IANA name such as 'UTC' or 'Europe/Berlin'"
        ) from error
    return datetime.now(zone).isoformat(timespec="seconds")


def count_text(text: str) -> dict[str, Any]:
    """Words, sentences, characters, mean word length and the ten most common words."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text)} characters; at most {MAX_TEXT} are counted")
    words = re.findall(r"\w+(?:['’-]\w+)*", text)
    sentences = [part for part in re.split(r"[.!?…。！？]+(?=\s|$)", text) if part.strip()]
    common = Counter(word.lower() for word in words).most_common(10)
    return {
        "characters": len(text),
        "words": len(words),
        "sentences": len(sentences),
        "average_word_length": round(sum(map(len, words)) / len(words), 2) if words else 0.0,
        "most_common_words": [{"word": word, "count": count} for word, count in common],
    }


@function_tool
def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: Numbers, + - * / // % **, parentheses, and abs, ceil, cos, exp, floor, log,
            log10, max, min, round, sin, sqrt, sum, tan, pi, e.
    """
    return calculate(expression)


@function_tool
def current_time(timezone: str = "UTC") -> str:
    """The current date and time.

    Args:
        timezone: An IANA time zone such as UTC or Europe/Berlin.
    """
    return time_in(timezone)


@function_tool
def text_statistics(text: str) -> dict[str, Any]:
    """Count the words, sentences and characters of a text, and find its most common words.

    Args:
        text: The text to count.
    """
    return count_text(text)


BUILTIN_TOOLS: Final[tuple[FunctionTool, ...]] = (calculator, current_time, text_statistics)
