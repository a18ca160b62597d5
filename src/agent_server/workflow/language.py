"""What an expression may be made of: each construct, operator and function, and their bounds.

Leans on Python's parser alone: a source is parsed, each construct that is not on the list is
refused, and what is left becomes closures that can only reach JSON values. Refuses to know
attributes, methods and anything of Python's objects: a dotted name looks up a JSON object.

Why not an evaluator from a shelf: ``docs/decisions/expressions.md``.
"""

import ast
import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_LENGTH: Final = 2_000
"""Characters of one expression."""
MAX_NESTING: Final = 60
"""Levels of one expression's tree."""
MAX_CHARS: Final = 1_000_000
"""Characters of a text, and of a value written as JSON (roughly)."""
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


@dataclass(frozen=True)
class Reference:
    """A name an expression uses, with the constant keys behind it: ``nodes.a.output``."""

    root: str
    keys: tuple[str | int, ...]
    whole: bool
    """Nothing is taken from what ``keys`` names by a key that is only known later."""


class Work:
    """What one evaluation may still do."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Wrong(f"it takes more than {MAX_WORK} steps")


class Wrong(Exception):
    """What is wrong, without the expression; ``Expr`` adds it."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__(detail)
        self.hint = hint


Evaluate = Callable[[Scope, Work], Any]


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


def measure(value: Any, work: Work) -> None:
    """Spend one step for each element of ``value``; raises when it is too large or not JSON."""
    if type(value) is str:
        if len(value) > MAX_CHARS:
            raise Wrong(f"a text is over {MAX_CHARS} characters")
        return
    if type(value) not in (list, dict):
        return
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
        if chars > MAX_CHARS:
            raise Wrong(f"a value is over {MAX_CHARS} characters of JSON")


def parse(source: str) -> ast.expr:
    if len(source) > MAX_LENGTH:
        raise Wrong(f"it is longer than {MAX_LENGTH} characters")
    text = source.strip()
    if not text:
        raise Wrong("it is empty")
    try:
        return ast.parse(f"({text}\n)" if "\n" in text else text, mode="eval").body
    except SyntaxError as error:
        raise Wrong(f"it cannot be read ({error.msg})", _syntax_hint(text)) from None
    except (ValueError, RecursionError, MemoryError, OverflowError):
        raise Wrong("it cannot be read") from None


def _syntax_hint(text: str) -> str:
    for wrong, right in (("&&", "and"), ("||", "or"), ("!", "not"), ("?", "a if condition else b")):
        if wrong in text.replace("!=", ""):
            return f"Write {right!r} instead of {wrong!r}."
    if "=" in text and "==" not in text:
        return "Compare with '=='."
    return "A key that is a keyword or holds a dash is written inputs['the-key']."


class Compiler:
    """Turns a parsed expression into closures, and notes which names it uses."""

    def __init__(self) -> None:
        self.references: list[Reference] = []

    def compile(self, node: ast.expr, depth: int) -> Evaluate:
        if depth <= 0:
            raise Wrong(f"it is nested deeper than {MAX_NESTING} levels")
        make = _FORMS.get(type(node))
        if make is None:
            raise Wrong(
                f"{_construct(node)} is not part of the language",
                "It has values, names, operators, conditions, indexes and the functions "
                + ", ".join(sorted(FUNCTIONS))
                + ".",
            )
        return make(self, node, depth - 1)

    def constant(self, node: ast.Constant, depth: int) -> Evaluate:
        value = node.value
        if isinstance(value, str):
            if any("\ud800" <= char <= "\udfff" for char in value):
                raise Wrong("a text holds half a character (a lone surrogate)")
        elif value is not None and type(value) not in (bool, int, float):
            raise Wrong(f"{value!r} is not a JSON value")
        elif value is not None:
            _number(value)
        return lambda scope, work: value

    def name(self, node: ast.Name, depth: int) -> Evaluate:
        name = node.id
        if name in _CONSTANTS:
            value = _CONSTANTS[name]
            return lambda scope, work: value
        if name.startswith("_"):
            raise Wrong(f"the name {name!r} begins with an underscore")
        self.references.append(Reference(name, (), whole=True))
        return _read_name(name)

    def attribute(self, node: ast.Attribute, depth: int) -> Evaluate:
        if node.attr.startswith("_"):
            raise Wrong(f"the name {node.attr!r} begins with an underscore")
        return self._item(node.value, node.attr, depth)

    def subscript(self, node: ast.Subscript, depth: int) -> Evaluate:
        index = node.slice
        if isinstance(index, ast.Constant) and type(index.value) in (str, int):
            return self._item(node.value, index.value, depth)
        inner = self._chain(node.value, None, depth)
        if isinstance(index, ast.Slice):
            if index.step is not None:
                raise Wrong("a slice has no step")
            low = self.compile(index.lower, depth) if index.lower else None
            high = self.compile(index.upper, depth) if index.upper else None

            def cut(scope: Scope, work: Work) -> Any:
                value = inner(scope, work)
                if type(value) not in (list, str):
                    raise Wrong(f"{_kind(value)} cannot be sliced")
                work.spend(1 if type(value) is str else len(value))
                return value[
                    _position(low(scope, work)) if low else None : (
                        _position(high(scope, work)) if high else None
                    )
                ]

            return cut
        key = self.compile(index, depth)
        return lambda scope, work: _look_up(inner(scope, work), key(scope, work))

    def _item(self, value: ast.expr, key: Any, depth: int) -> Evaluate:
        inner = self._chain(value, key, depth)
        return lambda scope, work: _look_up(inner(scope, work), key)

    def _chain(self, value: ast.expr, key: Any, depth: int) -> Evaluate:
        """``value``, whose reference grows by ``key`` (None: by a key that is not constant)."""
        before = len(self.references)
        inner = self.compile(value, depth)
        if _is_chain(value) and len(self.references) > before:
            # The first one noted is the chain itself; what comes after stands in its indexes.
            last = self.references[before]
            if last.whole:
                keys = last.keys if key is None else (*last.keys, key)
                self.references[before] = Reference(last.root, keys, whole=key is not None)
        return inner

    def unary(self, node: ast.UnaryOp, depth: int) -> Evaluate:
        inner = self.compile(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return lambda scope, work: not inner(scope, work)
        if isinstance(node.op, ast.USub):
            return lambda scope, work: -_number(inner(scope, work))
        if isinstance(node.op, ast.UAdd):
            return lambda scope, work: +_number(inner(scope, work))
        raise Wrong("the operator '~' is not part of the language")

    def binary(self, node: ast.BinOp, depth: int) -> Evaluate:
        operate = _OPERATORS.get(type(node.op))
        if operate is None:
            raise Wrong(
                f"the operator {type(node.op).__name__} is not part of the language",
                "There is + - * / // % **.",
            )
        left, right = self.compile(node.left, depth), self.compile(node.right, depth)
        return lambda scope, work: operate(left(scope, work), right(scope, work), work)

    def boolean(self, node: ast.BoolOp, depth: int) -> Evaluate:
        parts = [self.compile(value, depth) for value in node.values]
        stop = isinstance(node.op, ast.Or)

        def run(scope: Scope, work: Work) -> Any:
            value: Any = None
            for part in parts:
                value = part(scope, work)
                if bool(value) is stop:
                    break
            return value

        return run

    def compare(self, node: ast.Compare, depth: int) -> Evaluate:
        first = self.compile(node.left, depth)
        rest = []
        for sign, value in zip(node.ops, node.comparators, strict=True):
            test = _COMPARISONS.get(type(sign))
            if test is None:
                raise Wrong("'is' is not part of the language", "Compare with '=='.")
            rest.append((test, self.compile(value, depth)))

        def run(scope: Scope, work: Work) -> bool:
            left = first(scope, work)
            for test, part in rest:
                right = part(scope, work)
                measure(left, work)
                measure(right, work)
                if not test(left, right):
                    return False
                left = right
            return True

        return run

    def choice(self, node: ast.IfExp, depth: int) -> Evaluate:
        test = self.compile(node.test, depth)
        yes, no = self.compile(node.body, depth), self.compile(node.orelse, depth)
        return lambda scope, work: (yes if test(scope, work) else no)(scope, work)

    def array(self, node: ast.List, depth: int) -> Evaluate:
        parts = [self.compile(item, depth) for item in node.elts]

        def run(scope: Scope, work: Work) -> list[Any]:
            made = [part(scope, work) for part in parts]
            measure(made, work)
            return made

        return run

    def object(self, node: ast.Dict, depth: int) -> Evaluate:
        parts: list[tuple[Evaluate, Evaluate]] = []
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                raise Wrong("'**' is not part of the language")
            parts.append((self.compile(key, depth), self.compile(value, depth)))

        def run(scope: Scope, work: Work) -> dict[str, Any]:
            made: dict[str, Any] = {}
            for key, value in parts:
                name = key(scope, work)
                if type(name) is not str:
                    raise Wrong(f"a key must be text, not {_kind(name)}")
                made[name] = value(scope, work)
            measure(made, work)
            return made

        return run

    def call(self, node: ast.Call, depth: int) -> Evaluate:
        if not isinstance(node.func, ast.Name):
            raise Wrong("there are no methods", "Functions: " + ", ".join(sorted(FUNCTIONS)) + ".")
        name = node.func.id
        found = FUNCTIONS.get(name)
        if found is None:
            raise Wrong(f"there is no function {name!r}", did_you_mean(name, FUNCTIONS))
        if node.keywords:
            raise Wrong(f"{name} takes no named arguments")
        function, fewest, most = found
        if not fewest <= len(node.args) <= most:
            wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
            raise Wrong(f"{name} takes {wanted} arguments, not {len(node.args)}")
        parts = [self.compile(item, depth) for item in node.args]

        def run(scope: Scope, work: Work) -> Any:
            values = [part(scope, work) for part in parts]
            for value in values:
                measure(value, work)
            return function(*values)

        return run


def _is_chain(node: ast.expr) -> bool:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return isinstance(node, ast.Name)


def _read_name(name: str) -> Evaluate:
    def read(scope: Scope, work: Work) -> Any:
        work.spend(1)
        try:
            return scope[name]
        except KeyError:
            raise Wrong(f"there is no {name!r} here", did_you_mean(name, list(scope))) from None

    return read


def _look_up(value: Any, key: Any) -> Any:
    """``value[key]`` for JSON values; nothing of Python's objects can be reached."""
    if type(value) is dict:
        if type(key) is not str:
            raise Wrong(f"a key must be text, not {_kind(key)}")
        if key in value:
            return value[key]
        raise Wrong(f"there is no {key!r} in it", did_you_mean(key, value))
    if type(value) in (list, str):
        position = _position(key, of=value)
        if -len(value) <= position < len(value):
            return value[position]
        raise Wrong(f"position {position} is outside; the length is {len(value)}")
    if isinstance(value, Lookup):
        try:
            return value.find(str(key))
        except KeyError:
            raise Wrong(f"there is no {key!r}", did_you_mean(str(key), value.known())) from None
    raise Wrong(f"{_kind(value)} has no {key!r}")


def _position(value: Any, of: Any = None) -> int:
    if type(value) is not int:
        if type(of) is list or of is None:
            raise Wrong(f"a position must be a whole number, not {_shown(value)}")
        raise Wrong(f"{_kind(of)} has no {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 60 else _kind(value)


def _kind(value: Any) -> str:
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


def _construct(node: ast.AST) -> str:
    names: dict[type, str] = {
        ast.Lambda: "lambda",
        ast.JoinedStr: "an f-string",
        ast.Tuple: "a tuple",
        ast.Set: "a set",
        ast.NamedExpr: "':='",
        ast.Starred: "'*'",
        ast.Await: "await",
        ast.Yield: "yield",
        ast.YieldFrom: "yield",
        ast.ListComp: "a comprehension",
        ast.SetComp: "a comprehension",
        ast.DictComp: "a comprehension",
        ast.GeneratorExp: "a comprehension",
    }
    return names.get(type(node), type(node).__name__)


def _number(value: Any) -> Any:
    """``value`` if it is a number of bearable size. Raises ``Wrong``."""
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            raise Wrong("a number is too large")
    elif type(value) is float:
        if not math.isfinite(value):
            raise Wrong("a number is not finite")
    elif type(value) is not bool:
        raise Wrong(f"{_kind(value)} is not a number")
    return value


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
        raise Wrong(f"{_kind(left)} and {_kind(right)} cannot be added", "Use str(…) first.")
    return _number(_number(left) + _number(right))


def _arithmetic(operate: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Work], Any]:
    return lambda left, right, work: _number(operate(_number(left), _number(right)))


def _power(left: Any, right: Any, work: Work) -> Any:
    base, exponent = _number(left), _number(right)
    if abs(exponent) > MAX_INT_BITS or (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * abs(exponent) > MAX_INT_BITS
    ):
        raise Wrong("a power is too large")
    value = base**exponent
    if isinstance(value, complex):
        raise Wrong("a power is not a real number")
    return _number(value)


def _contains(left: Any, right: Any) -> bool:
    if type(right) in (list, dict) or (type(right) is str and type(left) is str):
        if type(right) is dict and type(left) is not str:
            return False
        return left in right
    raise Wrong(f"{_kind(right)} cannot contain {_kind(left)}")


def _sized(value: Any) -> Any:
    if type(value) not in (str, list, dict):
        raise Wrong(f"{_kind(value)} has no length")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise Wrong(f"{_kind(value)} is not text")
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
        raise Wrong(f"{_kind(items)} cannot be summed up")
    total: Any = 0
    for item in items:
        total = _number(total + _number(item))
    return total


def _int(value: Any) -> int:
    if type(value) is str:
        return int(_short(value))
    return int(_number(value))


def _float(value: Any) -> float:
    number: float = _number(float(_short(value) if type(value) is str else _number(value)))
    return number


def _short(text: str) -> str:
    if len(text) > MAX_NUMBER_TEXT:
        raise Wrong("a text is too long to be a number")
    return text


def _as_text(value: Any) -> str:
    return value if type(value) is str else to_json(value)


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and (type(digits) is not int or abs(digits) > 100):
        raise Wrong("the number of digits must be a whole number up to 100")
    return _number(round(_number(value), digits))


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise Wrong(f"{_kind(value)} is not an object")
    return value


FUNCTIONS: Final[dict[str, tuple[Callable[..., Any], int, int]]] = {
    "len": (lambda value: len(_sized(value)), 1, 1),
    "min": (_extreme(min), 1, 20),
    "max": (_extreme(max), 1, 20),
    "sum": (_sum, 1, 1),
    "round": (_round, 1, 2),
    "abs": (lambda value: abs(_number(value)), 1, 1),
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

_CONSTANTS: Final[dict[str, Any]] = {"true": True, "false": False, "null": None}

_OPERATORS: Final[dict[type[ast.operator], Callable[[Any, Any, Work], Any]]] = {
    ast.Add: _add,
    ast.Sub: _arithmetic(lambda left, right: left - right),
    ast.Mult: _arithmetic(lambda left, right: left * right),
    ast.Div: _arithmetic(lambda left, right: left / right),
    ast.FloorDiv: _arithmetic(lambda left, right: left // right),
    ast.Mod: _arithmetic(lambda left, right: left % right),
    ast.Pow: _power,
}

_COMPARISONS: Final[dict[type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    ast.Eq: lambda left, right: bool(left == right),
    ast.NotEq: lambda left, right: bool(left != right),
    ast.Lt: lambda left, right: bool(left < right),
    ast.LtE: lambda left, right: bool(left <= right),
    ast.Gt: lambda left, right: bool(left > right),
    ast.GtE: lambda left, right: bool(left >= right),
    ast.In: _contains,
    ast.NotIn: lambda left, right: not _contains(left, right),
}

_FORMS: Final[dict[type[ast.expr], Callable[[Compiler, Any, int], Evaluate]]] = {
    ast.Constant: Compiler.constant,
    ast.Name: Compiler.name,
    ast.Attribute: Compiler.attribute,
    ast.Subscript: Compiler.subscript,
    ast.UnaryOp: Compiler.unary,
    ast.BinOp: Compiler.binary,
    ast.BoolOp: Compiler.boolean,
    ast.Compare: Compiler.compare,
    ast.IfExp: Compiler.choice,
    ast.List: Compiler.array,
    ast.Dict: Compiler.object,
    ast.Call: Compiler.call,
}
