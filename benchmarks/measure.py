"""Interleaved rounds: the same work for each contestant in turn, and the median of the ratios.

Leans on ``processes``. Refuses to compare rounds that were not neighbours.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.loader import Job
from benchmarks.processes import Field, Server

SETTLE_S = 0.3
"""What a server still writes after its last answer is its CPU too."""


@dataclass
class Row:
    """One line of the table. ``ours`` and ``bare`` are in ``unit``."""

    case: str
    unit: str
    ours: float
    bare: float | None = None
    ratio: float | None = None
    target: float | None = None
    of: str = "ratio"
    """What the target is for: the ``ratio``, ``ours`` alone, or the ``difference``."""
    errors: int = 0
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> float | None:
        if self.of == "ratio":
            return self.ratio
        if self.of == "difference":
            return None if self.bare is None else self.ours - self.bare
        return self.ours

    @property
    def verdict(self) -> str:
        if self.errors:
            return f"{self.errors} errors"
        if self.target is None or self.measured is None:
            return "-"
        return "ok" if self.measured <= self.target else "MISSED"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "measured": self.measured, "verdict": self.verdict}


@dataclass
class Sample:
    """One contestant's round, for each run: CPU of the server's tree and of its database."""

    cpu_ms: float
    database_ms: float
    latency_ms: float
    first_ms: float
    wall_s: float
    markers: int
    errors: list[str]


@dataclass(frozen=True)
class Contestant:
    """Who does the work, and how it is asked. ``job`` makes a round's job from its number."""

    name: str
    server: Server
    job: Callable[[int], Job]


def rounds(
    field_: Field, contestants: Sequence[Contestant], number: int
) -> dict[str, list[Sample]]:
    """One round each to warm up, then ``number`` rounds in turn."""
    found: dict[str, list[Sample]] = {one.name: [] for one in contestants}
    for index in range(-1, number):
        for one in contestants:
            sample = measured(field_, one.server, one.job(index))
            if index >= 0 or sample.errors:
                found[one.name].append(sample)
    return found


def measured(field_: Field, server: Server, job: Job) -> Sample:
    """Send ``job`` and say what it cost ``server``, for each request."""
    cpu, database = server.cpu_s(), server.database_cpu_s()
    report = field_.send(server, job)
    time.sleep(SETTLE_S)
    spent = server.cpu_s() - cpu
    spent_by_database = server.database_cpu_s() - database
    return Sample(
        cpu_ms=1000 * spent / job.count,
        database_ms=1000 * spent_by_database / job.count,
        latency_ms=1000 * median(report.latency_s),
        first_ms=1000 * median(report.first_s),
        wall_s=report.wall_s,
        markers=report.markers,
        errors=report.errors,
    )


def cpu_row(
    case: str,
    samples: dict[str, list[Sample]],
    name: str,
    target: float | None,
    *,
    bare: str = "bare",
    scale: float = 1.0,
    unit: str = "CPU ms/run",
) -> Row:
    """CPU of ``name`` beside the bare app: the median of the ratios of neighbouring rounds."""
    ours, theirs = samples[name], samples[bare]
    pairs = zip(ours, theirs, strict=True)
    ratio = median([one.cpu_ms / other.cpu_ms for one, other in pairs if other.cpu_ms])
    database = median([one.database_ms for one in ours])
    errors = [text for one in (*ours, *theirs) for text in one.errors]
    return Row(
        case=case,
        unit=unit,
        ours=scale * median([one.cpu_ms for one in ours]),
        bare=scale * median([one.cpu_ms for one in theirs]),
        ratio=ratio,
        target=target,
        errors=len(errors),
        note=f"and {scale * database:.2f} in PostgreSQL" if database else "",
        details={
            "rounds": len(ours),
            "ours": [asdict(one) for one in ours],
            "bare": [asdict(one) for one in theirs],
            "first_errors": errors[:3],
        },
    )


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
