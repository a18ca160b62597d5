"""The benchmarks' own arithmetic: a verdict that flatters would be worse than none."""

import os
import subprocess
import sys

from benchmarks.__main__ import table
from benchmarks.measure import Row, Sample, cpu_row
from benchmarks.mock_model import CALLS, LONG, TOKENS
from benchmarks.processes import tree


def sample(cpu_ms: float, errors: tuple[str, ...] = ()) -> Sample:
    return Sample(cpu_ms, 0.0, 1.0, 1.0, 1.0, 0, list(errors))


def test_the_ratio_is_the_median_over_neighbouring_rounds() -> None:
    samples = {
        "bare": [sample(10), sample(20), sample(10)],
        "sqlite": [sample(11), sample(24), sample(30)],
    }
    row = cpu_row("case", samples, "sqlite", 1.2)
    assert row.ratio == 1.2
    assert row.verdict == "ok"
    assert cpu_row("case", samples, "sqlite", 1.1).verdict == "MISSED"


def test_errors_are_never_a_success() -> None:
    samples = {"bare": [sample(10)], "sqlite": [sample(1, ("500: …",))]}
    row = cpu_row("case", samples, "sqlite", 2.0)
    assert row.verdict == "1 errors"
    assert "1 errors" in table([row])


def test_a_target_may_be_for_the_figure_or_for_the_difference() -> None:
    assert Row("rest", "MB", ours=150, bare=100, target=200, of="ours").verdict == "ok"
    assert Row("first", "ms", ours=30, bare=10, target=15, of="difference").verdict == "MISSED"


def test_the_cpu_of_child_processes_is_counted() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            assert child.pid in tree(os.getpid())
        finally:
            child.communicate(b"\n")


def test_the_mock_says_the_same_streamed_or_not() -> None:
    assert LONG.stream.count(b"event: response.output_text.delta") == TOKENS
    for answer in CALLS:
        assert b"look_up" in answer.json
        assert b"look_up" in answer.stream
