"""``python -m benchmarks.workflows``: what a workflow of a thousand nodes costs.

Leans on the parts of a server in one process, on a SQLite file. Refuses to judge: it prints each
figure beside its target.
"""

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from agent_server.cli.loading import loading
from agent_server.domain.base import utcnow
from agent_server.domain.ids import DEFAULT_TENANT, new_run_id
from agent_server.domain.runs import RunRequest
from agent_server.execution.ephemeral import EphemeralContext
from agent_server.execution.ports import RunSnapshot, TaskContext
from agent_server.inference.providers import Providers
from agent_server.server import _lifespan, build_parts
from agent_server.settings import Settings
from agent_server.workflow.expressions import expression, template
from agent_server.workflow.interpreter import run_workflow
from agent_server.workflow.validation import validate

COUNT, ROUNDS, WIDTH, NAP_S = 1_000, 5, 100, 0.05
TOOLS = '''
import asyncio
from agents import function_tool

@function_tool
async def nap(n: int) -> int:
    """Sleep for 50 ms."""
    await asyncio.sleep(0.05)
    return n
'''


def chain() -> dict[str, Any]:
    """Each node uses the result of the one before."""
    nodes = [
        {
            "id": f"n{i}",
            "type": "tool",
            "tool": "nap",
            "depends_on": [f"n{i - 1}"] if i else [],
            "arguments": {"n": f"{{{{ nodes.n{i - 1}.output.n + {i} }}}}" if i else 1},
        }
        for i in range(COUNT)
    ]
    return {"name": "chain", "nodes": nodes}


def mapped() -> dict[str, Any]:
    nap = {"id": "t", "type": "tool", "tool": "nap", "arguments": {"n": "{{ item }}"}}
    each = {"id": "m", "type": "map", "over": "inputs.items", "max_parallel": WIDTH, "nodes": [nap]}
    return {"name": "map", "nodes": [each], "output": "{{ len(nodes.m.output) }}"}


def validation_ms() -> float:
    definition, took = chain(), []
    for _ in range(ROUNDS):
        expression.cache_clear()
        template.cache_clear()
        start = time.process_time()
        validate(definition)
        took.append((time.process_time() - start) * 1000)
    return median(took)


def interpreter_ms() -> float:
    """CPU of the interpreter for each node, with tasks that end at once."""

    async def at_once(ctx: TaskContext) -> Any:
        return {"n": 1}

    definition, took = validate(chain()), []
    for _ in range(ROUNDS):
        run = RunSnapshot(new_run_id(), DEFAULT_TENANT, RunRequest(workflow="w"), utcnow())
        context = EphemeralContext(run, handlers={"tool": at_once})
        start = time.process_time()
        asyncio.run(run_workflow(context, definition, {}))
        took.append((time.process_time() - start) * 1000 / COUNT)
    return median(took)


async def map_ratio(folder: Path, policy: str) -> float:
    """Wall time of the map over the ideal."""
    (folder / "agents.py").write_text(TOOLS)
    (folder / "agent-server.toml").write_text(policy)
    settings = Settings(
        agents=str(folder / "agents.py"), data_dir=folder, model="demo", log_level="ERROR"
    )
    parts = build_parts(settings, Providers(settings))
    took = []
    async with _lifespan(parts):
        for _ in range(ROUNDS):
            request = RunRequest(workflow=mapped(), variables={"items": list(range(COUNT))})
            start = time.perf_counter()
            sent = await parts.runs.submit(request, tenant=DEFAULT_TENANT, principal="bench")
            run = await parts.runs.wait(DEFAULT_TENANT, sent.run.id, 120)
            assert run.output == COUNT, run
            took.append(time.perf_counter() - start)
    return median(took) / (COUNT / WIDTH * NAP_S)


def main() -> None:
    with loading():
        pass  # As the server does, whose event loop it is, too.
    print(f"validation of {COUNT} nodes: {validation_ms():.0f} ms (target < 100)")
    print(f"the interpreter's own work: {interpreter_ms():.3f} ms a node (target < 0.3)")
    for effect in ("once", "none"):
        policy = f'[tools.nap]\neffect = "{effect}"\n'
        with tempfile.TemporaryDirectory() as folder:
            ratio = uvloop.run(map_ratio(Path(folder), policy))
        print(
            f"map of {COUNT} x {NAP_S * 1000:.0f} ms, {WIDTH} at a time, tool with effect "
            f"{effect!r}: {ratio:.1f} x the ideal (target 1.5)"
        )


if __name__ == "__main__":
    main()
