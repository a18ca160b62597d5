"""The expression language: what it can say, and what it can be made to do by an attacker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_server.domain.errors import ExpressionError
from agent_server.workflow.expressions import escape, expression, render, template, templates_in
from agent_server.workflow.functions import FUNCTIONS
from agent_server.workflow.values import MAX_CHARS, Lookup, Work


class Results(Lookup):
    def find(self, key: str) -> object:
        return {"a": {"output": 3, "status": "succeeded", "error": None}}[key]

    def known(self) -> list[str]:
        return ["a"]


SCOPE = {
    "inputs": {"text": "Hello", "items": [1, 2, 3], "the-key": 7, "nested": {"x": [{"y": 5}]}},
    "vars": {"score": 4, "big": list(range(50_000)), "long": "x" * 900_000},
    "nodes": Results(),
}


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("1 + 2 * 3 ** 2", 19),
        ("7 // 2 + 7 % 4 - 1 / 4", 5.75),
        ("-inputs.items[0] + +2", 1),
        ("inputs.text + ' world'", "Hello world"),
        ("inputs['the-key']", 7),
        ("inputs.nested.x[0].y", 5),
        ("inputs.items[-1]", 3),
        ("inputs.items[1:]", [2, 3]),
        ("inputs.items[:vars.score - 2]", [1, 2]),
        ("inputs.text[0:2]", "He"),
        ("nodes.a.output > 2 and nodes['a'].status == 'succeeded'", True),
        ("nodes.a.error == null", True),
        ("1 < vars.score <= 4", True),
        ("1 < vars.score < 4", False),
        ("'high' if vars.score > 3 else 'low'", "high"),
        ("vars.score > 9 or 'default'", "default"),
        ("not true", False),
        ("[1, 'a', {'k': null}]", [1, "a", {"k": None}]),
        ("2 in inputs.items and 'x' not in inputs.text and 'text' in inputs", True),
        ("len(inputs.items) + len('ab') + len({'a': 1})", 6),
        ("min(3, 1) + max([1, 5]) + sum([1, 2]) + abs(-2) + round(2.6)", 14),
        ("round(1.23456, 2)", 1.23),
        ("int('12') + int(3.9)", 15),
        ("float('1.5')", 1.5),
        ("str(1) + str('a') + str([1, true])", "1a[1, true]"),
        ("json('a')", '"a"'),
        ("upper('a') + lower('B')", "Ab"),
        ("contains(inputs.items, 2) and contains('abc', 'b') and startswith('abc', 'a')", True),
        ("keys({'a': 1}) + values({'a': 1})", ["a", 1]),
        ("get(inputs, 'missing')", None),
        ("get(inputs, 'missing', 5)", 5),
        ("{'a': 1}.a", 1),
        ("\n 1 +\n 2 \n", 3),
        ("{{ 1 + 1 }}", 2),
    ],
)
def test_an_expression_has_this_value(source: str, value: object) -> None:
    assert expression(source).evaluate(SCOPE) == value


ATTACKS = [
    "__import__('os').system('id')",
    "__class__",
    "inputs.__class__",
    "inputs.__init__",
    "inputs.__init__.__globals__",
    "().__class__.__mro__[1].__subclasses__()",
    "''.__class__",
    "[].__class__.__base__",
    "inputs['__class__']",
    "inputs['__class__']['__mro__']",
    "inputs.text.format('x')",
    "'{0.__class__}'.format(inputs)",
    "inputs.text.__class__",
    "inputs.items.append(1)",
    "inputs.keys()",
    "inputs.items.sort",
    "vars.score.real",
    "f'{inputs.__class__}'",
    "f'{inputs}'",
    "'%s' % inputs",
    "'%1000000000d' % 1",
    "getattr(inputs, 'x')",
    "eval('1')",
    "exec('1')",
    "type(inputs)",
    "open('/etc/passwd')",
    "globals()",
    "vars(inputs)",
    "dir()",
    "len.__self__",
    "len",
    "(lambda: 1)()",
    "[x for x in inputs.items]",
    "{x: 1 for x in inputs.items}",
    "(x for x in inputs.items)",
    "(x := 1)",
    "[*inputs.items]",
    "{**inputs}",
    "len(*[inputs])",
    "len(value=inputs)",
    "1; 2",
    "import os",
    "x = 1",
    "await inputs",
    "(yield 1)",
    "b'bytes'",
    "1j",
    "...",
    "(1, 2)",
    "{1, 2}",
    "1 is 1",
    "1 << 100000",
    "~1",
    "1 | 2",
    "inputs @ inputs",
    "9 ** 9 ** 9 ** 9",
    "2 ** 100000000",
    "2.5 ** 1000000",
    "(-8) ** 0.5",
    "10 ** 300 * 10 ** 300",
    "1e308 * 10",
    "1e999",
    "0 ** -1",
    "1 / 0",
    "1 % 0",
    "9" * 1_900,
    "'a' * 10 ** 9",
    "[0] * 10 ** 9",
    "vars.long + vars.long",
    "[vars.long, vars.long]",
    "vars.big + vars.big + vars.big",
    "[vars.big, vars.big, vars.big]",
    "[[vars.big, vars.big], [vars.big, vars.big]] == [1]",
    "str([vars.big, vars.big, vars.big])",
    "int('9' + '9')if false else int(vars.long)",
    "float('nan')",
    "float('inf')",
    "round(1, 10 ** 9)",
    "(" * 900 + "1" + ")" * 900,
    "[" * 90 + "1" + "]" * 90,
    "-" * 1_900 + "1",
    "not " * 480 + "1",
    "+".join("1" * 900),
    "inputs" + ".nested" * 200,
    "len(" * 300 + "inputs" + ")" * 300,
    "1" + " " * 3_000,
    "",
    "   ",
    "\x00",
    "1\x00",
    "inputs.＿＿class＿＿",
    "ｅｖａｌ('1')",
    "𝔤𝔢𝔱𝔞𝔱𝔱𝔯(inputs, 'x')",
    "'\\ud800'",
    "\ud800",
    "inputs.text.\u200bx",
    "constructor.constructor('return process')()",
    "$json.constructor",
    "this.process.mainModule.require('child_process')",
    "{{ inputs }",
    "nodes",
    "[nodes]",
    "{'a': nodes}",
    "str(nodes)",
    "nodes.find",
    "nodes.find('a')",
    "nodes.known",
    "nodes.missing.output",
    "inputs.missing",
    "unknown",
    "inputs.items[3]",
    "inputs.items['0']",
    "inputs.items[true]",
    "inputs.items[::2]",
    "inputs[0]",
    "1 < 'a'",
    "1 + 'a'",
    "[1] + 'a'",
    "min([])",
    "len()",
    "len(1, 2)",
    "max()",
]


@pytest.mark.parametrize("source", ATTACKS, ids=lambda source: repr(source[:40]))
def test_an_attack_is_a_clear_error_within_its_steps(source: str) -> None:
    work = Work()
    with pytest.raises(ExpressionError) as caught:
        expression(source).evaluate(SCOPE, work)
    # The step that was one too many is not taken: at most one value of the scope is counted past it.
    assert work.left >= -50_001
    assert caught.value.detail
    assert "Traceback" not in caught.value.detail and "<function" not in caught.value.detail


def test_names_of_python_look_up_json_keys_and_nothing_else() -> None:
    scope = {"inputs": {"items": 1, "keys": 2, "format": 3}}
    assert expression("[inputs.items, inputs.keys, inputs.format]").evaluate(scope) == [1, 2, 3]


def test_a_misspelt_name_is_answered_with_the_nearest_one() -> None:
    for source, meant in [
        ("input.text", "inputs"),
        ("vars.scroe", "score"),
        ("lenn([1])", "len"),
        ("inputs.txt", "text"),
    ]:
        with pytest.raises(ExpressionError) as caught:
            expression(source).evaluate(SCOPE)
        assert caught.value.hint == f"Did you mean {meant!r}?"
        assert source in caught.value.detail


@pytest.mark.parametrize(
    ("source", "word"),
    [("a && b", "'and'"), ("a || b", "'or'"), ("!a", "'not'"), ("a = 1", "'=='")],
)
def test_a_habit_from_another_language_is_answered_with_ours(source: str, word: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        expression(source)
    assert caught.value.hint and word in caught.value.hint


def test_a_variable_cannot_be_made_to_grow_without_end() -> None:
    value: object = ["seed"]
    with pytest.raises(ExpressionError, match="over|steps"):
        for _ in range(64):
            value = expression("[vars.x, vars.x]").evaluate({"vars": {"x": value}})


def test_one_template_alone_keeps_its_type_and_more_become_text() -> None:
    assert render("{{ inputs.items }}", SCOPE) == [1, 2, 3]
    assert render(" {{ inputs.items }}", SCOPE) == " [1, 2, 3]"
    assert render("{{ inputs.text }}, {{ vars.score }} {{ null }} {{ true }}", SCOPE) == (
        "Hello, 4 null true"
    )
    assert render({"a": ["{{ vars.score }}", 1, None], "{{ k }}": "x"}, SCOPE) == {
        "a": [4, 1, None],
        "{{ k }}": "x",
    }


def test_quotes_and_brackets_inside_a_template_do_not_end_it() -> None:
    assert render('{{ {"a": {"b": "}}"}} }}', SCOPE) == {"a": {"b": "}}"}}
    assert render("{{ '{{' }} and }}", SCOPE) == "{{ and }}"
    assert render(r"{{ 'it\'s }}' }}", SCOPE) == "it's }}"


def test_a_template_that_is_never_closed_says_so() -> None:
    with pytest.raises(ExpressionError, match="never closed"):
        template("Hello {{ inputs.text")


def test_a_text_made_of_templates_has_a_largest_size() -> None:
    with pytest.raises(ExpressionError, match=str(MAX_CHARS)):
        render("{{ vars.long }}{{ vars.long }}", SCOPE)


def test_the_paths_of_templates_are_found() -> None:
    found = list(templates_in({"a": ["x", "{{ 1 }}"], "b": "{{ 2 }}"}))
    assert found == [("/a/1", "{{ 1 }}"), ("/b", "{{ 2 }}")]


def test_an_expression_tells_which_names_it_uses() -> None:
    found = expression("nodes.a.output + vars['x'] + inputs[vars.k].z + nodes[0]").references
    assert [(r.root, r.keys, r.whole) for r in found] == [
        ("nodes", ("a", "output"), True),
        ("vars", ("x",), True),
        ("inputs", (), False),
        ("vars", ("k",), True),
        ("nodes", (0,), True),
    ]


@given(st.text(max_size=300))
def test_escaped_text_comes_back_unchanged(text: str) -> None:
    assert render(escape(text), {}) == text


@given(
    st.lists(
        st.sampled_from(
            [
                *FUNCTIONS,
                "inputs",
                "vars",
                "nodes",
                ".",
                "[",
                "]",
                "(",
                ")",
                "{",
                "}",
                "'",
                '"',
                ",",
            ]
            + [":", "+", "-", "*", "**", "/", "%", " and ", " if ", " else ", " in ", "not ", "=="]
            + ["0", "1", "9e99", "'a'", "_", "__class__", "a", "text", "items", "lambda ", "for "]
        ),
        max_size=25,
    ).map("".join)
)
def test_whatever_the_source_it_is_a_json_value_or_an_expression_error(source: str) -> None:
    try:
        value = expression(source).evaluate(SCOPE)
    except ExpressionError:
        return
    assert value is None or type(value) in (bool, int, float, str, list, dict)
