"""The numbers for Prometheus, kept from committed events and from durations handed in.

Leans on prometheus-client, with a registry of its own, and on the domain's events. Refuses
labels without bound: no ids, and of names that users choose the first ones only, the rest
counted as ``other``.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from agent_server.domain import events as e
from agent_server.domain.runs import StepKind, Usage

MAX_NAMES: Final = 100
"""Distinct model, tool or route names that get a series of their own, each."""
OTHER: Final = "other"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CALLS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class _Names:
    """Lets the first ``MAX_NAMES`` names through and turns the rest into ``other``."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) >= MAX_NAMES:
            return OTHER
        self._known.add(name)
        return name


class Metrics:
    """Everything that ``/metrics`` answers.

    ``observe`` takes each event once, when it is committed, by the process that committed it:
    summed over the processes, counts are right. Not for several threads at once in ``observe``;
    the rest may be called from any thread.
    """

    def __init__(self) -> None:
        # A second series for each counter, which Prometheus has no use for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # not annotated there
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._models, self._tools, self._routes = _Names(), _Names(), _Names()
        self._active: set[str] = set()
        # The library looks a series up anew each time, under a lock.
        self._of: Callable[..., Any] = lru_cache(maxsize=None)(
            lambda metric, *labels: metric.labels(*labels)
        )

        self._runs = self._counter("runs", "Runs that ended, by how.", "status")
        self._runs_active = self._gauge("runs_active", "Runs that this process works on now.")
        self._runs_active.set_function(lambda: len(self._active))
        self._tasks = self._counter("tasks", "Tasks that ended, by how.", "status")
        self._steps = self._counter(
            "steps", "Model calls, tool calls and values, by how they ended.", "kind", "status"
        )
        self._model_s = self._histogram(
            "model_call_duration_seconds",
            "Time of a model call, retries included.",
            _CALLS,
            "model",
        )
        self._tool_s = self._histogram(
            "tool_call_duration_seconds", "Time of a tool call.", _CALLS, "tool"
        )
        self._tokens = self._counter("tokens", "Tokens read and written by models.", "direction")
        self._cost = self._counter("cost_usd", "Cost of model calls, where the price is known.")
        self._unpriced = self._counter(
            "unpriced_model_calls", "Model calls whose price is not known."
        )
        self._queue = self._gauge("queue_depth", "Tasks that wait for a worker.")
        self._streams = self._gauge("streams_open", "Event streams open in this process.")
        self._lagged = self._counter(
            "stream_lagged", "Event streams cut because their reader was too slow."
        )
        self._transaction_s = self._histogram(
            "database_transaction_duration_seconds", "Time of a database transaction.", _FAST
        )
        self._database_errors = self._counter(
            "database_errors", "Database transactions that failed."
        )
        self._blobs = self._counter(
            "blobs", "Large values kept outside their rows, by what was done with them.", "what"
        )
        self._blob_bytes = self._counter("blob_bytes", "The bytes of these values.", "what")
        self._http_s = self._histogram(
            "http_request_duration_seconds",
            "Time until the answer to an HTTP request began.",
            _FAST,
            "method",
            "route",
            "status",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"agent_server_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"agent_server_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"agent_server_{name}", text, labels, buckets=buckets, registry=self.registry
        )

    # Fed by events

    def observe(self, event: e.EventBase) -> None:
        """Count a committed event. An event that says nothing countable is passed over."""
        if isinstance(event, _BEGINNINGS):
            return
        if isinstance(event, e.StepCompleted):
            self._step(event.kind, event.name, "done", event.duration_ms)
            self._usage(event.usage)
        elif isinstance(event, e.TaskCompleted):
            self._of(self._tasks, "succeeded").inc()
        elif isinstance(event, e.StepFailed):
            self._step(event.kind, event.name, "failed", event.duration_ms)
        elif isinstance(event, e.StepInDoubt):
            self._steps.labels(event.kind, "in_doubt").inc()
        elif isinstance(event, e.TaskFailed):
            self._tasks.labels("failed").inc()
        elif isinstance(event, e.TaskSkipped):
            self._tasks.labels("skipped").inc()
        elif isinstance(event, e.RunStarted | e.RunResumed):
            self._active.add(event.run_id)
        elif isinstance(event, e.RunWaiting):
            self._active.discard(event.run_id)
        elif event.ends_run:
            self._active.discard(event.run_id)
            self._runs.labels(_ended(event)).inc()

    def _step(self, kind: StepKind, name: str, status: str, duration_ms: int) -> None:
        self._of(self._steps, kind, status).inc()
        if kind == "model":
            self._of(self._model_s, self._models(name)).observe(duration_ms / 1000)
        elif kind == "tool":
            self._of(self._tool_s, self._tools(name)).observe(duration_ms / 1000)

    def _usage(self, usage: Usage) -> None:
        if usage.input_tokens:
            self._of(self._tokens, "input").inc(usage.input_tokens)
        if usage.output_tokens:
            self._of(self._tokens, "output").inc(usage.output_tokens)
        if usage.cost_usd is not None:
            self._cost.inc(float(usage.cost_usd))
        elif usage.model_calls:
            self._unpriced.inc(usage.model_calls)

    # Fed by the parts that know

    def watch_queue(self, read: Callable[[], float]) -> None:
        """``read`` answers the number of waiting tasks; asked at each scrape, so it must be quick."""
        self._queue.set_function(read)

    def stream_opened(self) -> None:
        self._streams.inc()

    def stream_closed(self, *, lagged: bool = False) -> None:
        self._streams.dec()
        if lagged:
            self._lagged.inc()

    def transaction(self, seconds: float) -> None:
        """A database transaction ended well after ``seconds``."""
        self._transaction_s.observe(seconds)

    def database_error(self) -> None:
        """A database transaction failed."""
        self._database_errors.inc()

    def blob(self, what: str, size: int) -> None:
        """A large value of ``size`` bytes was ``written``, ``read`` or ``deleted``."""
        self._blobs.labels(what).inc()
        self._blob_bytes.labels(what).inc(size)

    def http_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. ``route`` is the pattern (``/runs/{id}``), never the path."""
        method = method if method in _METHODS else OTHER
        self._http_s.labels(method, self._routes(route), str(status)).observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """The body and the content type of ``/metrics``."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


_BEGINNINGS = (e.TaskStarted, e.StepStarted)


def _ended(event: e.EventBase) -> str:
    if isinstance(event, e.RunSucceeded):
        return "succeeded"
    if isinstance(event, e.RunFailed):
        return "failed"
    if isinstance(event, e.RunCancelled):
        return "cancelled"
    return "budget_exceeded"
