"""``python -m benchmarks``: run the cases and print one table.

Leans on ``cases``. Refuses to fail where a target is missed: it says so, and ends with 0 unless
there were errors.
"""

import argparse
import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Effort
from benchmarks.measure import Row
from benchmarks.processes import Field

COLUMNS = ("case", "unit", "ours", "bare", "ratio", "target", "verdict")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--case", action="append", choices=sorted(CASES), help="only this case (repeatable)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contestant")
    parser.add_argument("--quick", action="store_true", help="few runs: a look, not a figure")
    parser.add_argument("--out", type=Path, help="write everything that was measured, as JSON")
    options = parser.parse_args()
    effort = Effort(
        rounds=min(options.rounds, 2) if options.quick else options.rounds, quick=options.quick
    )
    rows: list[Row] = []
    with Field() as field:
        for name in options.case or CASES:
            print(f"… {name}", file=sys.stderr, flush=True)
            found = CASES[name](field, effort)
            rows += found
            print(table(found), file=sys.stderr, flush=True)
            if options.out is not None:
                options.out.write_text(as_json(rows, effort), encoding="utf-8")
    print(table(rows))
    return 1 if any(row.errors for row in rows) else 0


def table(rows: list[Row]) -> str:
    """The rows as text, aligned."""
    lines: list[tuple[str, ...]] = [(*COLUMNS, "")]
    for row in rows:
        lines.append(
            (
                row.case,
                row.unit,
                f"{row.ours:.2f}",
                "-" if row.bare is None else f"{row.bare:.2f}",
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                target(row),
                row.verdict,
                row.note,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = []
    for line in lines:
        cells = [
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def as_json(rows: list[Row], effort: Effort) -> str:
    """Everything that was measured so far."""
    found = {
        "machine": machine(),
        "options": {"rounds": effort.rounds, "quick": effort.quick},
        "rows": [row.to_json() for row in rows],
    }
    return json.dumps(found, indent=2) + "\n"


def target(row: Row) -> str:
    if row.target is None:
        return "-"
    sign = "+" if row.of == "difference" else ""
    return f"≤ {sign}{row.target:g}" + (f" {row.unit}" if row.of != "ratio" else "")


def machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    sys.exit(main())
