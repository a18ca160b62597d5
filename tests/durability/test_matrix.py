"""The fault matrix names tests that there are, and its report hides nothing."""

import ast
from pathlib import Path

import pytest

from tests.durability.matrix import MATRIX, Outcomes, report

ROOT = Path(__file__).resolve().parents[2]


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("fault", sorted(MATRIX))
def test_every_fault_has_a_test_that_exists(fault: str) -> None:
    assert MATRIX[fault]
    for test in MATRIX[fault]:
        path, _, name = test.partition("::")
        assert name in functions(path), test


def test_the_report_says_what_failed_and_what_was_not_run() -> None:
    outcomes = Outcomes()
    first, second, *_ = dict.fromkeys(test for tests in MATRIX.values() for test in tests)
    outcomes.seen = {first: ["passed", "failed"], second: ["passed"]}
    text = report(outcomes, 1.0)
    rows = {line.split("`")[1]: line for line in text.splitlines() if "`test_" in line}
    assert "| failed |" in rows[first.rpartition("::")[2]]
    assert text.count("was not run") == sum(
        test not in (first, second) for tests in MATRIX.values() for test in tests
    )
