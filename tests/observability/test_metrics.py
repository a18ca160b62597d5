"""The metrics: that they count what happened and that Prometheus accepts their names."""

import re
import shutil
import subprocess
from decimal import Decimal

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent_server.domain import events as e
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.runs import Usage, WaitingFor
from agent_server.observability import Metrics
from agent_server.observability.metrics import MAX_NAMES

ERROR = ErrorInfo(code="tool_error", message="no")


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample as ``name{label=value,…}`` without the common prefix."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            name = sample.name.removeprefix("agent_server_")
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


def busy() -> Metrics:
    """Metrics that have something in every family."""
    metrics = Metrics()
    for event in (
        e.RunStarted(run_id="r1"),
        e.RunStarted(run_id="r2"),
        e.TaskCompleted(run_id="r1", path="1", node="a"),
        e.TaskFailed(run_id="r1", path="2", node="b", error=ERROR),
        e.TaskSkipped(run_id="r1", path="3", node="c", reason="when"),
        e.StepCompleted(
            run_id="r1",
            step="1/model/1",
            kind="model",
            name="demo",
            duration_ms=1500,
            usage=Usage(model_calls=1, input_tokens=10, output_tokens=5, cost_usd=Decimal("0.25")),
        ),
        e.StepCompleted(
            run_id="r1", step="1/model/2", kind="model", name="new", usage=Usage(model_calls=1)
        ),
        e.StepFailed(run_id="r1", step="1/tool/x", kind="tool", name="add", error=ERROR),
        e.StepInDoubt(run_id="r1", step="1/tool/y", kind="tool", name="pay", detail="?"),
        e.MessageDelta(run_id="r1", step="1/model/1", text="hi"),
        e.RunWaiting(run_id="r2", waiting_for=WaitingFor(kind="reconciliation")),
    ):
        metrics.observe(event)
    metrics.transaction(0.002)
    metrics.database_error()
    metrics.http_request("GET", "/api/v1/runs/{id}", 200, 0.01)
    metrics.stream_opened()
    metrics.stream_closed(lagged=True)
    return metrics


def test_events_become_counts_of_runs_tasks_steps_tokens_and_cost() -> None:
    metrics = busy()
    before = samples(metrics)
    assert before["runs_active"] == 1
    assert before["tasks_total{status=succeeded}"] == 1
    assert before["tasks_total{status=failed}"] == 1
    assert before["tasks_total{status=skipped}"] == 1
    assert before["steps_total{kind=model,status=done}"] == 2
    assert before["steps_total{kind=tool,status=failed}"] == 1
    assert before["steps_total{kind=tool,status=in_doubt}"] == 1
    assert before["tokens_total{direction=input}"] == 10
    assert before["tokens_total{direction=output}"] == 5
    assert before["cost_usd_total"] == 0.25
    assert before["unpriced_model_calls_total"] == 1
    assert before["model_call_duration_seconds_sum{model=demo}"] == 1.5

    metrics.observe(e.RunSucceeded(run_id="r1"))
    metrics.observe(e.RunResumed(run_id="r2", reason="decided"))
    metrics.observe(e.RunBudgetExceeded(run_id="r2", error=ERROR))
    after = samples(metrics)
    assert after["runs_active"] == 0
    assert after["runs_total{status=succeeded}"] == 1
    assert after["runs_total{status=budget_exceeded}"] == 1


def test_a_run_that_another_process_began_does_not_make_the_active_runs_negative() -> None:
    metrics = Metrics()
    metrics.observe(e.RunFailed(run_id="elsewhere", error=ERROR))
    assert samples(metrics)["runs_active"] == 0


def test_gauges_of_the_queue_and_the_streams_ask_those_who_know() -> None:
    metrics = Metrics()
    metrics.watch_queue(lambda: 7)
    metrics.stream_opened()
    metrics.stream_opened()
    metrics.stream_closed()
    assert samples(metrics)["queue_depth"] == 7
    assert samples(metrics)["streams_open"] == 1


def test_names_beyond_the_limit_share_one_series_and_methods_are_a_closed_set() -> None:
    metrics = Metrics()
    for number in range(MAX_NAMES + 50):
        metrics.observe(e.StepCompleted(run_id="r", step="s", kind="tool", name=f"tool{number}"))
        metrics.http_request(f"VERB{number}", "/x", 200, 0.1)
    found = samples(metrics)
    tools = [name for name in found if name.startswith("tool_call_duration_seconds_count")]
    assert len(tools) == MAX_NAMES + 1
    assert found["tool_call_duration_seconds_count{tool=other}"] == 50
    assert found["http_request_duration_seconds_count{method=other,route=/x,status=200}"] == 150


NOT_BASE_UNITS = set(
    "milliseconds microseconds nanoseconds minutes hours days weeks kilobytes megabytes gigabytes "
    "bits percent celcius fahrenheit".split()
)
ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}


def test_names_keep_the_rules_that_promtool_lints() -> None:
    for family in text_string_to_metric_families(busy().render()[0].decode()):
        name, kind = family.name, family.type
        exposed = f"{name}_total" if kind == "counter" else name
        assert family.documentation, f"{name} has no help text"
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        words = set(name.split("_"))
        assert not words & {"counter", "gauge", "histogram", "summary"}, f"{name} names its type"
        assert not words & ABBREVIATED, f"{name} abbreviates a unit"
        assert not words & NOT_BASE_UNITS, f"{name} is not in a base unit"
        if kind != "counter":
            assert not exposed.endswith("_total"), name
        if kind != "histogram":
            assert not exposed.endswith(("_count", "_sum", "_bucket")), name
            assert all("le" not in sample.labels for sample in family.samples)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_metrics() -> None:
    answer = subprocess.run(
        ["promtool", "check", "metrics"],
        input=busy().render()[0],
        capture_output=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
