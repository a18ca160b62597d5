"""Random workflows of every cheap type of node on the real engine: however many workers there are
and whoever is faster, the same result, and each branch goes the same way."""

import asyncio
import json
from collections import Counter
from random import Random
from typing import Any

import pytest

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ToolError
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run
from agent_server.execution.ports import TaskContext
from tests.execution.kit import finished, submit

from .branches import branches_of, in_order, same_branches, timeless, undone
from .drafts import Draft, seeded
from .workbench import Bench, bench

Told = tuple[JsonObject, list[JsonObject]]


class Uneven(Bench):
    """Tools that take a moment, longer or shorter by where they stand and by ``pace``."""

    def __init__(self, pace: int) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()
        self._pace = pace

    async def call_tool(
        self, ctx: TaskContext, name: str, arguments: JsonObject, *, key: str
    ) -> Any:
        if self._pace:
            await asyncio.sleep(Random(f"{self._pace} {ctx.path}").random() * 0.01)
        self.made[f"{ctx.run.id} {ctx.path}"] += 1
        first = "@" not in ctx.path.rpartition(".")[2]
        if name == "fail" or (name == "fail_until" and first):
            raise ToolError(f"{ctx.path} failed")
        return arguments.get("value")


async def carried_out(
    url: str, drafts: list[tuple[Draft, JsonObject]], pace: int, workers: int
) -> list[Told]:
    """Each workflow's run at its end, and its events."""
    tools = Uneven(pace)
    async with bench(url, tools, worker_concurrency=workers) as made:
        runs = [await submit(made.runs, workflow=definition) for _, definition in drafts]
        found = []
        for run, (draft, _) in zip(runs, drafts, strict=True):
            ended = await finished(made.runs, run, 60)
            events = await made.runs.events(DEFAULT_TENANT, run.id, 0, 10_000)
            facts = [json.loads(event.data) for event in events]
            tasks = await made.runs.tasks(DEFAULT_TENANT, run.id)
            in_order(facts, draft)
            stored = [task.model_dump() for task in tasks]
            undone(facts, stored, ended.status, ended.output, draft)
            found.append((result_of(ended), facts))
    assert set(tools.made.values()) <= {1}
    return found


def result_of(run: Run) -> JsonObject:
    error = None if run.error is None else run.error.message
    return {"status": run.status, "output": timeless(run.output), "error": error}


async def same_in_any_order(url: str, seeds: range, calm: bool) -> None:
    drafts = [seeded(seed, calm=calm) for seed in seeds]
    first = await carried_out(url, drafts, 0, 1)
    other = await carried_out(url, drafts, 1, 7)
    for seed, (draft, _), one, two in zip(seeds, drafts, first, other, strict=True):
        assert one[0] == two[0], f"seed {seed}"
        same_branches(branches_of(one[1]), branches_of(two[1]), draft)


@pytest.mark.parametrize("calm", [True, False])
async def test_it_ends_the_same_and_each_branch_goes_the_same_way_in_any_order(
    calm: bool, url: str
) -> None:
    await same_in_any_order(url, range(8), calm)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_five_hundred_end_the_same_and_each_branch_goes_the_same_way(
    sqlite_url: str,
) -> None:
    begin = Random().randrange(1_000_000)
    print("seeds from", begin)  # shown when the test fails
    for calm in (True, False):
        for part in range(begin, begin + 250, 50):
            await same_in_any_order(sqlite_url, range(part, part + 50), calm)
