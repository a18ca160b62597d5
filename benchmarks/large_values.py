"""``python -m benchmarks.large_values``: what a result of 5 MB costs that goes to 100 children.

Leans on the parts of a server in one process, on a SQLite file. Refuses to judge: it prints the bytes
in each table with large values in their rows and outside them, and the time.
"""

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import text

from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import RunRequest
from agent_server.inference.providers import Providers
from agent_server.server import _lifespan, build_parts
from agent_server.settings import Settings

BYTES, CHILDREN, WIDTH = 5_000_000, 100, 10
TABLES = {
    "runs": ("request", "output"),
    "tasks": ("payload", "output"),
    "steps": ("input", "output"),
    "events": ("data",),
    "blob_bytes": ("data",),
}
TOOLS = f'''
from agents import function_tool

@function_tool
def make() -> str:
    """A large text."""
    return "x" * {BYTES}

@function_tool
def measure(data: str, number: int) -> int:
    """Its length."""
    return len(data) + number
'''
NODES = [
    {"id": "make", "type": "tool", "tool": "make"},
    {
        "id": "each",
        "type": "map",
        "over": list(range(CHILDREN)),
        "max_parallel": WIDTH,
        "nodes": [
            {
                "id": "measure",
                "type": "tool",
                "tool": "measure",
                "arguments": {"data": "{{ nodes.make.output }}", "number": "{{ item }}"},
            }
        ],
    },
]


async def cost(folder: Path, threshold: int) -> dict[str, float]:
    """Megabytes by table, of the file, and the seconds of the run."""
    (folder / "agents.py").write_text(TOOLS)
    settings = Settings(
        agents=str(folder / "agents.py"),
        data_dir=folder,
        model="demo",
        log_level="ERROR",
        blob_threshold_bytes=threshold,
    )
    parts = build_parts(settings, Providers(settings))
    request = RunRequest(
        workflow={"name": "fan", "nodes": NODES, "output": "{{ nodes.each.output }}"}
    )
    found: dict[str, float] = {}
    async with _lifespan(parts):
        start, cpu = time.perf_counter(), time.process_time()
        sent = await parts.runs.submit(request, tenant=DEFAULT_TENANT, principal="bench")
        run = await parts.runs.wait(DEFAULT_TENANT, sent.run.id, 600)
        assert run.output == [BYTES + number for number in range(CHILDREN)], run.error
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        for table, columns in TABLES.items():
            sums = " + ".join(f"coalesce(sum(length({column})), 0)" for column in columns)
            query = text(f"SELECT {sums} FROM {table}")
            size: Any = await parts.database.read(lambda c: c.execute(query).scalar())  # noqa: B023
            found[table] = size / 1e6
    found["file"] = (folder / "agent-server.db").stat().st_size / 1e6
    return found | {"seconds": seconds, "CPU seconds": cpu_s}


def main() -> None:
    figures = {}
    for name, threshold in (("in the rows", 0), ("outside", 65_536)):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = asyncio.run(cost(Path(folder), threshold))
    print(f"{BYTES / 1e6:g} MB to {CHILDREN} children, MB and seconds: " + ", ".join(figures))
    for row in figures["outside"]:
        print(f"{row:<12}" + "".join(f"{found[row]:>12.3f}" for found in figures.values()))


if __name__ == "__main__":
    main()
