"""Three workers on one PostgreSQL, killed again and again under mixed runs: every invariant holds."""

import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .shared import SharedWorld
from .world import ready, script, settled

WORKERS = 3
WORKFLOW = {
    "name": "mixed",
    "inputs": {"type": "object", "properties": {"run": {"type": "string"}}},
    "nodes": [
        {
            "id": "each",
            "type": "map",
            "over": "[1, 2, 3, 4]",
            "as": "n",
            "nodes": [
                {
                    "id": "look",
                    "type": "tool",
                    "tool": "look_up",
                    "arguments": {"key": "{{ inputs.run }}-w{{ n }}"},
                }
            ],
        },
        {"id": "pay", "type": "tool", "tool": "pay", "arguments": {"bill": "{{ inputs.run }}-w"}},
    ],
    "output": "{{ nodes.pay.output }}",
}


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        yield SharedWorld(tmp_path, models, nursery, url=postgres_url)


def body_of(number: int, run: str) -> tuple[dict[str, Any], str]:
    """A goal, an agent or a workflow in turn, and the answer it must have."""
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"goal": f"goal {run}"}, f"all of {run} done"),
        ({"agent": "worker", "input": f"alpha of {run}"}, "alpha done"),
        ({"workflow": WORKFLOW, "variables": {"run": run}}, f"paid {run}-w"),
    ]
    return kinds[number % len(kinds)]


async def submit(api: Server, body: dict[str, Any], key: str) -> str:
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(
            f"{api.url}/api/v1/runs", json=body, headers={"Idempotency-Key": key}
        )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def finished_calls(world: SharedWorld) -> set[str]:
    """The tool calls that the ledger holds as done, as the tools count them."""
    rows = await world.look(
        'SELECT name, substring(input from \':\\s*"([^"]+)"\') FROM steps'
        " WHERE kind = 'tool' AND status = 'done'"
    )
    return {f"{name} {given}" for name, given in rows}


async def kill_and_check(world: SharedWorld, kills: int) -> Counter[str]:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    choose = random.Random(seed)
    settings = {"max_attempts": "10000", "worker_concurrency": "8"}
    names = [f"q{number}" for number in range(kills)]
    world.models.script({"rules": [rule for name in names for rule in script(name)]})
    api = world.join(role="api")
    workers = [world.join(role="worker", **settings) for _ in range(WORKERS)]
    await ready(api)
    for worker in workers:
        await ready(worker)
    submitted: dict[str, tuple[str, str]] = {}
    counted: dict[str, int] = {}

    async def note() -> None:
        """From the moment a call is seen to be finished, it must not begin again."""
        done = await finished_calls(world)
        begun = world.begun()
        for call in done - counted.keys():
            counted[call] = begun[call]

    for number, name in enumerate(names):
        body, answer = body_of(number, name)
        submitted[name] = (await submit(api, body, name), answer)
        assert await submit(api, body, name) == submitted[name][0]
        victim = choose.randrange(WORKERS)
        if not await workers[victim].ended(choose.uniform(0.0, 0.6)):
            await workers[victim].kill()
        await note()
        workers[victim] = world.join(role="worker", **settings)
    statuses: Counter[str] = Counter()
    for name, (run_id, answer) in submitted.items():
        run = await settled(api, run_id)
        statuses[run["status"]] += 1
        if run["status"] == "waiting":
            assert run["waiting_for"]["kind"] == "reconciliation", run
        else:
            assert run["status"] == "succeeded" and run["output"] == answer, (name, run)
    await note()
    await everything_holds(world, counted)
    for server in (api, *workers):
        await server.kill()
    return statuses


async def everything_holds(world: SharedWorld, counted: dict[str, int]) -> None:
    begun = world.begun()
    for call, number in counted.items():
        assert begun[call] == number, f"{call} was finished and ran again"
    for call, number in begun.items():
        assert number == 1 or not call.startswith("pay "), f"{call} happened {number} times"
    gaps = await world.look(
        "SELECT run_id FROM events GROUP BY run_id"
        " HAVING count(*) <> max(seq) OR min(seq) <> 1 OR count(*) <> count(DISTINCT seq)"
    )
    assert not gaps, "event numbers have a gap"
    behind = await world.look(
        "SELECT id FROM runs WHERE last_seq <>"
        " (SELECT max(seq) FROM events WHERE run_id = runs.id)"
    )
    assert not behind
    twice = await world.look(
        "SELECT run_id FROM events WHERE type IN ('run.created', 'run.succeeded', 'plan.created')"
        " GROUP BY run_id, type HAVING count(*) > 1"
    )
    assert not twice
    orphans = await world.look(
        "SELECT t.run_id, t.path FROM tasks t JOIN runs r ON r.id = t.run_id"
        " WHERE t.status = 'running' AND (r.status NOT IN ('running', 'waiting', 'queued')"
        " OR t.owner NOT IN (SELECT id FROM nodes))"
    )
    assert not orphans, "something runs without a living owner"
    for total in ("model_calls", "tool_calls", "input_tokens", "output_tokens", "cost_pico"):
        wrong = await world.look(
            f"SELECT r.id, r.{total}, sum(s.{total}) FROM runs r JOIN steps s ON s.run_id = r.id"
            f" GROUP BY r.id HAVING r.{total} <> sum(s.{total})"
        )
        assert not wrong, (total, wrong)


@pytest.mark.timeout(120)
async def test_twelve_kills_under_mixed_runs_on_three_workers_lose_and_repeat_nothing(
    world: SharedWorld,
) -> None:
    statuses = await kill_and_check(world, 12)
    assert statuses["succeeded"] >= 6, statuses


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_two_hundred_kills_under_mixed_runs_on_three_workers_lose_and_repeat_nothing(
    world: SharedWorld,
) -> None:
    statuses = await kill_and_check(world, 200)
    assert statuses["succeeded"] >= 100, statuses
    assert sum(statuses.values()) == 200
