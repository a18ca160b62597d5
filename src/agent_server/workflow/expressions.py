"""The one small language of conditions and of ``{{ … }}`` in text: JSON in, JSON out.

Leans on ``language`` for what it is made of. A source is parsed once and shared; whatever it
is, evaluating it ends soon with a JSON value or an ``ExpressionError`` that shows it. Refuses to
know what the names of a scope stand for.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from agent_server.domain.errors import ExpressionError
from agent_server.workflow.language import Compiler, is_name, parse
from agent_server.workflow.values import (
    MAX_CHARS,
    MAX_LENGTH,
    MAX_NESTING,
    MAX_REFERRED,
    MAX_RENDERED,
    Lookup,
    Scope,
    Work,
    Wrong,
    measure,
    to_json,
)

_SIMPLE = re.compile(r"[^{}'\"]{0,2000}\}\}")
"""The rest of an expression without quotes and braces, which is most of them."""


class Expr:
    """One expression, parsed. Immutable, so that it can be shared; make it with ``expression``."""

    __slots__ = ("_run", "is_name", "references", "source")

    def __init__(self, source: str) -> None:
        """Raises ``ExpressionError`` that says what is not understood or not allowed."""
        self.source = source
        try:
            tree = parse(source)
            compiler = Compiler()
            self._run = compiler.compile(tree, MAX_NESTING)
        except Wrong as wrong:
            raise self._error(wrong) from None
        self.references = tuple(compiler.references)
        self.is_name = is_name(tree)
        """Whether it only names a value, and makes none."""

    def evaluate(self, scope: Scope, work: Work | None = None) -> Any:
        """Its JSON value. Raises ``ExpressionError``; never anything else, never for long: ``work`` is
        what it may do, and counts what it did."""
        return self._value(scope, work or Work(), MAX_CHARS)[0]

    def refer(self, scope: Scope) -> tuple[Any, int]:
        """The value that it names, which is handed on as it is and may be large, and its characters,
        roughly. Raises ``ExpressionError``."""
        return self._value(scope, Work(MAX_REFERRED), MAX_REFERRED)

    def _value(self, scope: Scope, work: Work, most: int) -> tuple[Any, int]:
        try:
            value = self._run(scope, work)
            if isinstance(value, Lookup):
                raise Wrong("it gives a whole scope", "Name one thing in it.")
            return value, measure(value, work, most)
        except Wrong as wrong:
            raise self._error(wrong) from None
        except RecursionError:
            raise self._error(Wrong("a value is nested too deeply")) from None
        except ZeroDivisionError:
            raise self._error(Wrong("it divides by zero")) from None
        except (TypeError, ValueError, OverflowError, ArithmeticError) as error:
            raise self._error(Wrong(str(error) or type(error).__name__)) from None

    def _error(self, wrong: Wrong) -> ExpressionError:
        shown = self.source if len(self.source) <= 200 else self.source[:200] + "…"
        return ExpressionError(f"Expression {shown!r}: {wrong}.", hint=wrong.hint)


@lru_cache(maxsize=8_192)
def expression(source: str) -> Expr:
    """``source`` as an ``Expr``. One that is wholly ``{{ … }}`` is taken without its braces."""
    text = source.strip()
    if text.startswith("{{") and text.endswith("}}"):
        parts = template(text).parts
        if len(parts) == 1 and isinstance(parts[0], Expr):
            return parts[0]
    return Expr(source)


class Template:
    """A text with ``{{ … }}`` in it, parsed. Make it with ``template``."""

    __slots__ = ("parts",)

    def __init__(self, source: str) -> None:
        self.parts: tuple[str | Expr, ...] = tuple(_split(source))

    @property
    def named(self) -> Expr | None:
        """The expression that it wholly is, if that only names a value."""
        only = self.parts[0] if len(self.parts) == 1 else None
        return only if isinstance(only, Expr) and only.is_name else None

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return tuple(part for part in self.parts if isinstance(part, Expr))

    def render(self, scope: Scope) -> Any:
        """One expression alone keeps its type; else a text, in which what is not text is JSON."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return part.evaluate(scope) if isinstance(part, Expr) else part
        pieces: list[str] = []
        size = 0
        for part in self.parts:
            if isinstance(part, Expr):
                value = part.evaluate(scope)
                piece = value if isinstance(value, str) else to_json(value)
            else:
                piece = part
            size += len(piece)
            if size > MAX_CHARS:
                raise ExpressionError(f"A text with templates is over {MAX_CHARS} characters.")
            pieces.append(piece)
        return "".join(pieces)


@lru_cache(maxsize=8_192)
def template(source: str) -> Template:
    """``source`` as a ``Template``. Raises ``ExpressionError``."""
    return Template(source)


def render(value: Any, scope: Scope, *, hands_on: bool = False) -> Any:
    """``value`` with every text in it rendered, at any depth. Keys stay as they are.

    ``hands_on``: what a text only names is handed on as it is, up to ``MAX_REFERRED``; it is stored
    once, however often. Raises ``ExpressionError``, also for what all of it would give together
    being too large.
    """
    return _render(value, scope, [MAX_RENDERED], [MAX_REFERRED if hands_on else 0])


def _render(value: Any, scope: Scope, left: list[int], referred: list[int]) -> Any:
    if isinstance(value, str):
        if "{{" not in value:
            return value
        named = template(value).named if referred[0] else None
        if named is not None:
            found, size = named.refer(scope)
            referred[0] -= size
            if referred[0] <= 0:
                raise ExpressionError(f"The templates name more than {MAX_REFERRED} characters.")
            return found
        made = template(value).render(scope)
        left[0] -= bounded(made, "what a template gives")
        if left[0] < 0:
            raise ExpressionError(f"The templates give more than {MAX_RENDERED} characters.")
        return made
    if isinstance(value, dict):
        return {key: _render(item, scope, left, referred) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_render(item, scope, left, referred) for item in value]
    return value


def items_of(over: Any, scope: Scope) -> Any:
    """What a map goes over: an expression, or a list with templates. Raises ``ExpressionError``."""
    if not isinstance(over, str):
        return render(over, scope)
    found = expression(over)
    return found.refer(scope)[0] if found.is_name else found.evaluate(scope)


def bounded(value: Any, what: str) -> int:
    """The characters of ``value``, roughly. Raises ``ExpressionError`` when they are too many."""
    try:
        return measure(value, Work())
    except Wrong as wrong:
        raise ExpressionError(f"{what}: {wrong}.", hint="Keep less of it.") from None


def templates_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in ``value`` that holds a template, with its path."""
    if isinstance(value, str):
        if "{{" in value:
            yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from templates_in(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from templates_in(item, f"{path}/{position}")


def escape(text: str) -> str:
    """``text`` as a template that gives it back unchanged, whatever it holds."""
    return text.replace("{{", '{{ "{{" }}')


def _split(source: str) -> Iterator[str | Expr]:
    """The texts and expressions of a template; quotes and brackets inside one are respected."""
    position = 0
    empty = True
    while (start := source.find("{{", position)) >= 0:
        end = _closing(source, start + 2)
        if end is None:
            raise ExpressionError(
                f"Template {source[start : start + 80]!r}: '{{{{' is never closed.",
                hint="Close it with '}}'; a literal '{{' is written {{ \"{{\" }}.",
            )
        if start > position:
            yield source[position:start]
        yield Expr(source[start + 2 : end])
        empty = False
        position = end + 2
    if position < len(source) or empty:
        yield source[position:]


def _closing(source: str, position: int) -> int | None:
    """Where the ``}}`` stands that ends the expression beginning at ``position``."""
    simple = _SIMPLE.match(source, position)
    if simple is not None:
        return simple.end() - 2
    depth = 0
    quote = ""
    end = min(len(source), position + MAX_LENGTH + 10)
    while position < end:
        char = source[position]
        if quote:
            if char == "\\":
                position += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "{[(":
            depth += 1
        elif char == "}" and depth == 0:
            return position if source[position : position + 2] == "}}" else None
        elif char in "}])":
            depth -= 1
        position += 1
    found = source.find("}}", end)
    return found if end < len(source) and found >= 0 else None
