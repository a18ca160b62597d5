"""Payments that a person consents to, through SIGKILL at every boundary and by chance."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent_server.domain.approvals import arguments_hash
from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .world import World, ready

RUNS = "/api/v1/runs"
PLACES = (
    "step.before_begin:1",
    "step.before_begin:2",
    "step.after_begin:1",
    "step.after_begin:2",
    "step.before_finish:1",
    "step.before_finish:2",
    "step.after_finish:1",
    "step.after_finish:2",
    "task.claimed:1",
    "run.before_end",
    "run.after_end",
)
"""The boundaries on the way of a run that makes two payments side by side, both held."""
FEW = ("step.before_begin:1", "step.after_begin:1", "step.before_finish:2", "task.claimed:1")
ENDED = {"succeeded", "failed", "cancelled", "budget_exceeded"}
BOUNDED, WHOLE = 16, 200
BATCH = 8


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery) -> AsyncIterator[World]:
    async with ModelServer() as models:
        world = World(tmp_path, models, nursery)
        policy = world.folder / "agent-server.toml"
        policy.write_text('[tools.look_up]\neffect = "none"\n[tools.pay]\napproval = true\n')
        yield world


def script(run: str) -> dict[str, Any]:
    """Two payments and a look, side by side; then the answer."""
    calls = [{"name": "pay", "arguments": {"bill": f"{run}-{part}"}} for part in "ab"]
    calls.append({"name": "look_up", "arguments": {"key": f"{run}-k"}})
    return {"match": rf"\Ajob {run}\b", "steps": [{"tool_calls": calls}, {"text": f"{run} done"}]}


class Person:
    """Speaks to whichever server lives, and starts another when it does not."""

    def __init__(self, world: World, choose: random.Random | None = None) -> None:
        self.world = world
        self.server: Server | None = None
        self.kills = 0
        self._restarting = asyncio.Lock()
        self._choose = choose

    async def start(self, crash_at: str = "") -> None:
        self.server = self.world.start(crash_at=crash_at)
        with suppress(AssertionError):  # it may be made to die before it is ready
            await ready(self.server)

    async def kill(self) -> None:
        assert self.server is not None
        await self.server.kill()
        self.kills += 1
        await self.start()

    async def ask(self, method: str, path: str, **said: Any) -> tuple[int, Any]:
        """The answer's status and JSON; asked again of the next server where one has died."""
        while True:
            server = self.server
            assert server is not None
            try:
                async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
                    answer = await client.request(method, path, **said)
                    return answer.status_code, answer.json() if answer.content else None
            except httpx2.TransportError:
                async with self._restarting:
                    if self.server is server:
                        assert await server.ended(20), "a living server does not answer"
                        await self.start()

    async def pending(self) -> list[dict[str, Any]]:
        query = {"status": "pending", "limit": "200"}
        _, page = await self.ask("GET", "/api/v1/approvals", params=query)
        return list(page["data"])

    async def decide(self) -> None:
        """Decide about all that is asked: mostly yes, and twice at once where chance has it."""
        for approval in await self.pending():
            lot = 1.0 if self._choose is None else self._choose.random()
            said: dict[str, Any] = {"decision": "reject" if lot < 0.15 else "approve"}
            path = f"/api/v1/approvals/{approval['id']}"
            times = 2 if lot > 0.8 else 1
            answers = await asyncio.gather(
                *(self.ask("POST", path, json=said) for _ in range(times))
            )
            assert all(status in (200, 409) for status, _ in answers), answers

    async def reconcile(self, run: dict[str, Any]) -> None:
        """Say how the call in doubt went, from what the tool wrote down."""
        step = run["waiting_for"]["step"]
        ((given,),) = self.world.rows(
            "SELECT input FROM steps WHERE run_id = ? AND key = ?", run["id"], step
        )
        begun = self.world.begun()[f"pay {json.loads(given)['bill']}"]
        said: dict[str, Any] = {"step": step, "outcome": "did_not_happen"}
        if begun:
            said |= {"outcome": "happened", "result": "paid"}
        status, answer = await self.ask("POST", f"{RUNS}/{run['id']}/reconcile", json=said)
        assert status in (200, 409), answer

    async def see_through(self, run_id: str) -> dict[str, Any]:
        """The run at its end, decided and reconciled as often as it asks."""
        for _ in range(400):
            _, run = await self.ask("GET", f"{RUNS}/{run_id}", params={"wait": "0.2"})
            if run["status"] in ENDED:
                return dict(run)
            if run["status"] == "waiting":
                assert run["waiting_for"]["kind"] in ("approval", "reconciliation"), run
                if run["waiting_for"]["kind"] == "reconciliation":
                    await self.reconcile(run)
            await self.decide()
        raise AssertionError(run)


def check(world: World, run_ids: list[str]) -> None:
    """The invariants of ``run_ids``, which have all come to rest."""
    begun = world.begun()
    approved: Counter[str] = Counter()
    for given, digest in world.rows(
        "SELECT arguments, arguments_hash FROM approvals WHERE status = 'approved'"
    ):
        arguments = json.loads(given)
        assert digest == arguments_hash(arguments)
        approved[f"pay {arguments['bill']}"] += 1
    for name, times in begun.items():
        if name.startswith("pay "):  # I2
            assert times <= approved[name], f"{name}: {times} times, {approved[name]} consents"
    for run_id in run_ids:
        seqs = [r[0] for r in world.rows("SELECT seq FROM events WHERE run_id = ?", run_id)]
        assert sorted(seqs) == list(range(1, len(seqs) + 1)), "I3: a gap"
        ((status, waits, models, tools),) = world.rows(
            "SELECT status, waiting_for, model_calls, tool_calls FROM runs WHERE id = ?", run_id
        )
        assert status in ENDED or (status == "waiting" and waits), f"I1: {status}"
        live = "SELECT path FROM tasks WHERE run_id = ? AND status = 'running'"
        assert not world.rows(live, run_id), "I4"
        sums = world.rows(
            "SELECT coalesce(sum(model_calls), 0), coalesce(sum(tool_calls), 0) FROM steps "
            "WHERE run_id = ? AND NOT shared",
            run_id,
        )
        assert sums == [(models, tools)], f"I5: {sums} are not {(models, tools)}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("places", [FEW, pytest.param(PLACES, marks=pytest.mark.slow)])
async def test_an_approved_payment_is_made_once_whatever_boundary_the_server_dies_at(
    world: World, places: tuple[str, ...]
) -> None:
    waited: set[str] = set()
    for number, place in enumerate(places):
        run = f"n{number}"
        world.models.script({"rules": [script(run)]})
        person = Person(world)
        await person.start(crash_at=place)
        asked = {"agent": "worker", "input": f"job {run}"}
        _, accepted = await person.ask("POST", RUNS, json=asked, headers={"Idempotency-Key": run})
        first = person.server
        ended = await person.see_through(accepted["id"])
        assert person.server is not first, f"{place} was never reached"
        assert (ended["status"], ended["output"]) == ("succeeded", f"{run} done")
        begun = world.begun()
        assert [begun[f"pay {run}-{part}"] for part in "ab"] == [1, 1], place
        check(world, [accepted["id"]])
        if world.rows(
            "SELECT 1 FROM events WHERE run_id = ? AND type = 'step.in_doubt'", accepted["id"]
        ):
            waited.add(place)
        assert person.server is not None
        await person.server.kill()
    assert "step.after_begin:1" in waited, "a call in doubt waits"
    assert waited <= {place for place in places if place.startswith("step.")}, waited


async def by_chance(world: World, count: int) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    choose = random.Random(seed)
    person = Person(world, choose)
    await person.start()
    ids: list[str] = []
    for start in range(0, count, BATCH):
        names = [f"c{number}" for number in range(start, min(count, start + BATCH))]
        world.models.script({"rules": [script(name) for name in names]})
        batch: list[str] = []
        for name in names:
            asked: dict[str, Any] = {"agent": "worker", "input": f"job {name}"}
            if choose.random() < 0.2:
                asked["budget"] = {"max_tool_calls": choose.choice([1, 2])}
            headers = {"Idempotency-Key": name}
            status, run = await person.ask("POST", RUNS, json=asked, headers=headers)
            assert status == 202, run
            batch.append(run["id"])
        for act in choose.sample(["kill", "decide", "cancel", "kill", "decide"], 5):
            if act == "kill":
                await person.kill()
            elif act == "decide":
                await person.decide()
            else:
                chosen = choose.choice(batch)
                status, answer = await person.ask("POST", f"{RUNS}/{chosen}/cancel")
                assert status in (200, 409), answer
        for run_id in list(batch):
            ended = await person.see_through(run_id)
            if ended["status"] == "succeeded" and choose.random() < 0.3:
                steps = f"{RUNS}/{run_id}/steps"
                _, page = await person.ask("GET", steps, params={"limit": "1"})
                said = {"from": page["data"][0]["key"]}
                status, fork = await person.ask("POST", f"{RUNS}/{run_id}/fork", json=said)
                assert status == 202, fork
                batch.append(fork["id"])
                await person.see_through(fork["id"])
        ids += batch
        check(world, batch)
    assert person.kills > count // BATCH
    assert len(ids) >= count


@pytest.mark.timeout(300)
async def test_runs_under_kills_cancels_approvals_budgets_and_forks_keep_every_invariant(
    world: World,
) -> None:
    await by_chance(world, BOUNDED)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_two_hundred_runs_by_chance_keep_every_invariant(world: World) -> None:
    await by_chance(world, WHOLE)
