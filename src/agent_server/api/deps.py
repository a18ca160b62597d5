"""What the API is composed from.

Leans on the ports, the gate and the streams. Refuses to make any of them: ``server.py`` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent_server.api.ports import Catalog, Check, Metrics, Observe, RunsPort, WorkflowsPort
from agent_server.api.sse import Streams
from agent_server.auth.gate import Gate
from agent_server.settings import Settings


def _uncounted(method: str, route: str, status: int, seconds: float) -> None:
    """The observer of a server that counts nothing."""


def _no_metrics() -> tuple[bytes, str]:
    return b"", "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class ApiDeps:
    """The parts that ``build_app`` puts doors on."""

    settings: Settings
    runs: RunsPort
    catalog: Catalog
    workflows: WorkflowsPort
    gate: Gate
    streams: Streams
    checks: Mapping[str, Check] = field(default_factory=dict)
    """What ``/readyz`` asks, by name."""
    metrics: Metrics = _no_metrics
    observe: Observe = _uncounted
    version: str = "0"
    features: tuple[str, ...] = ()
