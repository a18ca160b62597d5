"""What an expression may be made of: each construct, operator and function, and their bounds.

Leans on Python's parser alone: a source is parsed, each construct that is not on the list is
refused, and what is left becomes closures that can only reach JSON values. Refuses to know
attributes, methods and anything of Python's objects: a dotted name looks up a JSON object.

Why not an evaluator from a shelf: ``docs/decisions/0003-expressions-of-our-own.md``.
"""

import ast
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from agent_server.workflow.functions import COMPARISONS, FUNCTIONS, OPERATORS
from agent_server.workflow.values import (
    MAX_LENGTH,
    MAX_NESTING,
    Scope,
    Work,
    Wrong,
    did_you_mean,
    kind_of,
    look_up,
    measure,
    number,
    position_of,
)


class Reference(NamedTuple):
    """A name an expression uses, with the constant keys behind it: ``nodes.a.output``."""

    root: str
    keys: tuple[str | int, ...]
    whole: bool
    """Nothing is taken from what ``keys`` names by a key that is only known later."""


Evaluate = Callable[[Scope, Work], Any]


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
            hint = "It has values, names, operators, conditions, indexes and the functions "
            raise Wrong(
                f"{_construct(node)} is not part of the language",
                _INSTEAD.get(type(node)) or hint + ", ".join(sorted(FUNCTIONS)) + ".",
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
            number(value)
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
                    raise Wrong(f"{kind_of(value)} cannot be sliced")
                work.spend(1 if type(value) is str else len(value))
                return value[
                    position_of(low(scope, work)) if low else None : (
                        position_of(high(scope, work)) if high else None
                    )
                ]

            return cut
        key = self.compile(index, depth)
        return lambda scope, work: look_up(inner(scope, work), key(scope, work))

    def _item(self, value: ast.expr, key: Any, depth: int) -> Evaluate:
        inner = self._chain(value, key, depth)
        return lambda scope, work: look_up(inner(scope, work), key)

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
            return lambda scope, work: -number(inner(scope, work))
        if isinstance(node.op, ast.UAdd):
            return lambda scope, work: +number(inner(scope, work))
        raise Wrong("the operator '~' is not part of the language")

    def binary(self, node: ast.BinOp, depth: int) -> Evaluate:
        operate = OPERATORS.get(type(node.op))
        if operate is None:
            sign = _SIGNS.get(type(node.op), type(node.op).__name__)
            hint = "There is + - * / // % **, and there are functions: upper(a), not a | upper."
            raise Wrong(f"the operator {sign!r} is not part of the language", hint)
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
            test = COMPARISONS.get(type(sign))
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
                    raise Wrong(f"a key must be text, not {kind_of(name)}")
                made[name] = value(scope, work)
            measure(made, work)
            return made

        return run

    def call(self, node: ast.Call, depth: int) -> Evaluate:
        if not isinstance(node.func, ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            known = "Functions: " + ", ".join(sorted(FUNCTIONS)) + "."
            raise Wrong("there are no methods", f"Write {name}(…)." if name in FUNCTIONS else known)
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


def is_name(node: ast.expr) -> bool:
    """Whether it names a value by a name and keys that are written out."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant):
            return False
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


_INSTEAD: Final[dict[type, str]] = {
    ast.JoinedStr: "Write the text with {{ … }} in it, or add texts with +.",
    ast.ListComp: "A 'map' node does something for each item of a list.",
    ast.GeneratorExp: "A 'map' node does something for each item of a list.",
}
_SIGNS: Final[dict[type[ast.operator], str]] = {
    ast.BitOr: "|",
    ast.BitAnd: "&",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.MatMult: "@",
}
_CONSTANTS: Final[dict[str, Any]] = {"true": True, "false": False, "null": None}


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
