"""Payments that a person consents to, through SIGKILL at every boundary and by chance, on both databases."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent_server.domain.approvals import arguments_hash
from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .shared import SharedWorld
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
FEW = ("step.after_begin:1", "step.before_finish:2", "task.claimed:1")
ENDED = {"succeeded", "failed", "cancelled", "budget_exceeded"}
BOUNDED, WHOLE = 8, 200
BATCH = 8


@pytest.fixture(params=["sqlite", "postgresql"])
async def world(
    request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery
) -> AsyncIterator[World]:
    """On SQLite with one process, on PostgreSQL with three."""
    async with ModelServer() as models:
        if request.param == "sqlite":
            world = World(tmp_path, models, nursery)
        else:
            url = request.getfixturevalue("postgres_url")
            world = SharedWorld(tmp_path, models, nursery, url=url)
        policy = world.folder / "agent-server.toml"
        policy.write_text('[tools.look_up]\neffect = "none"\n[tools.pay]\napproval = true\n')
        yield world


def script(run: str) -> dict[str, Any]:
    """Two payments and a look, side by side; then the answer."""
    calls = [{"name": "pay", "arguments": {"bill": f"{run}-{part}"}} for part in "ab"]
    calls.append({"name": "look_up", "arguments": {"key": f"{run}-k"}})
    return {"match": rf"\Ajob {run}\b", "steps": [{"tool_calls": calls}, {"text": f"{run} done"}]}


class Person:
    """Speaks to any server that lives, and starts another for each that does not."""

    def __init__(self, world: World, choose: random.Random | None = None) -> None:
        self.world = world
        self.servers: list[Server] = []
        self.kills = 0
        self._restarting = asyncio.Lock()
        self._choose = choose

    async def start(self, crash_at: str = "", number: int = 1) -> None:
        """Start ``number`` servers, the first of which may be made to die."""
        started = [self.world.start(crash_at=crash_at)]
        started += [self.world.start() for _ in range(number - 1)]
        for server in started:
            with suppress(AssertionError):  # it may die before it is ready
                await ready(server)
        self.servers += started

    async def kill(self) -> None:
        """Kill a server by chance, and start another."""
        assert self._choose is not None
        async with self._restarting:
            victim = self._choose.choice(self.servers)
            await victim.kill()
            self.kills += 1
            self.servers.remove(victim)
            await self.start()

    async def leave(self) -> None:
        for server in self.servers:
            await server.kill()

    async def ask(self, method: str, path: str, **said: Any) -> tuple[int, Any]:
        """The answer's status and JSON; asked again of another server where one has died."""
        while True:
            server = self._choose.choice(self.servers) if self._choose else self.servers[0]
            try:
                async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
                    answer = await client.request(method, path, **said)
                    return answer.status_code, answer.json() if answer.content else None
            except httpx2.TransportError:
                async with self._restarting:
                    if server in self.servers:
                        assert await server.ended(20), "a living server does not answer"
                        self.servers.remove(server)
                        await self.start()

    async def pending(self) -> list[dict[str, Any]]:
        query = {"status": "pending", "limit": "200"}
        _, page = await self.ask("GET", "/api/v1/approvals", params=query)
        return list(page["data"])

    async def decide(self) -> None:
        """Decide about all that is asked: mostly yes, sometimes with another bill, and twice at once
        where chance has it."""
        for approval in await self.pending():
            lot = 1.0 if self._choose is None else self._choose.random()
            said: dict[str, Any] = {"decision": "reject" if lot < 0.15 else "approve"}
            if 0.15 <= lot < 0.25:
                said["arguments"] = {"bill": f"{approval['arguments']['bill']}-edited"}
            path = f"/api/v1/approvals/{approval['id']}"
            times = 2 if lot > 0.8 and self._choose else 1
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
        # Of equal calls, which a fork may make too, one that began may be this one.
        begun = self.world.begun()[f"pay {json.loads(given)['bill']}"]
        said: dict[str, Any] = {"step": step, "outcome": "did_not_happen"}
        if begun:
            said |= {"outcome": "happened", "result": "paid"}
        status, answer = await self.ask("POST", f"{RUNS}/{run['id']}/reconcile", json=said)
        assert status in (200, 409), answer

    async def see_through(self, run_id: str) -> dict[str, Any]:
        """The run at its end, decided, reconciled and resumed as often as it asks."""
        for _ in range(400):
            _, run = await self.ask("GET", f"{RUNS}/{run_id}", params={"wait": "0.2"})
            if run["status"] in ENDED:
                return dict(run)
            if run["status"] == "waiting":
                waits = run["waiting_for"]
                if waits["kind"] == "reconciliation":
                    await self.reconcile(run)
                elif waits["paused_by"]:
                    status, answer = await self.ask("POST", f"{RUNS}/{run_id}/resume")
                    assert status in (200, 409), answer
                else:
                    assert waits["kind"] == "approval", run
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
        assert sums == [(models, tools)], (
            f"I5: {sums} are not {(models, tools)} of the run {run_id}",
            world.rows("SELECT key, status, attempts, shared FROM steps WHERE run_id = ?", run_id),
            world.rows("SELECT seq, type FROM events WHERE run_id = ? ORDER BY seq", run_id),
        )


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
        (first,) = person.servers
        asked = {"agent": "worker", "input": f"job {run}"}
        _, accepted = await person.ask("POST", RUNS, json=asked, headers={"Idempotency-Key": run})
        ended = await person.see_through(accepted["id"])
        assert person.servers != [first], f"{place} was never reached"
        assert (ended["status"], ended["output"]) == ("succeeded", f"{run} done")
        begun = world.begun()
        assert [begun[f"pay {run}-{part}"] for part in "ab"] == [1, 1], place
        check(world, [accepted["id"]])
        doubt = "SELECT 1 FROM events WHERE run_id = ? AND type = 'step.in_doubt'"
        if world.rows(doubt, accepted["id"]):
            waited.add(place)
        await person.leave()
    assert "step.after_begin:1" in waited, "a call in doubt waits"
    assert waited <= {place for place in places if place.startswith("step.")}, waited


@pytest.mark.parametrize(
    "world",
    ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)],
    indirect=True,
)
async def test_what_was_said_about_a_call_in_doubt_is_not_taken_for_the_call_of_its_retry(
    world: World,
) -> None:
    calls = [{"name": "pay", "arguments": {"bill": "z-a"}}]
    steps = [{"tool_calls": calls}, {"text": "z done"}]
    world.models.script({"rules": [{"match": r"\Ajob z\b", "steps": steps}]})
    person = Person(world)
    await person.start(crash_at="step.after_begin:1")
    asked = {"agent": "worker", "input": "job z"}
    _, first = await person.ask("POST", RUNS, json=asked, headers={"Idempotency-Key": "z"})

    async def stands_still(run_id: str, kind: str) -> dict[str, Any]:
        for _ in range(100):
            _, run = await person.ask("GET", f"{RUNS}/{run_id}", params={"wait": "0.2"})
            if run["status"] == "waiting" and run["waiting_for"]["kind"] == kind:
                return dict(run)
            assert run["status"] not in ENDED, run
        raise AssertionError(run)

    async def retried(run_id: str) -> str:
        status, made = await person.ask("POST", f"{RUNS}/{run_id}/retry")
        assert status == 202, made
        return str(made["id"])

    await stands_still(first["id"], "approval")
    await person.decide()
    await stands_still(first["id"], "reconciliation")
    assert (await person.ask("POST", f"{RUNS}/{first['id']}/cancel"))[0] == 200
    second = await retried(first["id"])
    doubt = (await stands_still(second, "reconciliation"))["waiting_for"]["step"]
    said = {"step": doubt, "outcome": "fail", "reason": "nobody knows"}
    assert (await person.ask("POST", f"{RUNS}/{second}/reconcile", json=said))[0] == 200
    assert (await person.see_through(second))["status"] == "failed"
    third = await retried(second)
    await stands_still(third, "approval")
    await person.leave()
    person.servers.clear()
    await person.start(crash_at="step.after_begin:1")
    await stands_still(third, "approval")
    await person.decide()
    await stands_still(third, "reconciliation")
    ended = await person.see_through(third)
    assert ended["output"] == "z done" and world.begun()["pay z-a"] == 1
    check(world, [first["id"], second, third])
    await person.leave()


async def by_chance(world: World, count: int) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    choose = random.Random(seed)
    person = Person(world, choose)
    await person.start(number=3 if isinstance(world, SharedWorld) else 1)
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
        acts = ["kill", "decide", "cancel", "pause", "kill", "decide"]
        for act in choose.sample(acts, len(acts)):
            if act == "kill":
                await person.kill()
            elif act == "decide":
                await person.decide()
            else:
                chosen = choose.choice(batch)
                status, answer = await person.ask("POST", f"{RUNS}/{chosen}/{act}")
                assert status in (200, 409), answer
        for run_id in list(batch):
            ended = await person.see_through(run_id)
            fate = choose.random()
            said: dict[str, Any] = {}
            if ended["status"] == "succeeded" and fate < 0.3:
                steps = f"{RUNS}/{run_id}/steps"
                _, page = await person.ask("GET", steps, params={"limit": "200"})
                calls = [step["key"] for step in page["data"] if step["kind"] != "value"]
                verb, said = "fork", {"from": choose.choice(calls)}
            elif ended["status"] != "succeeded" and fate < 0.6:
                verb, said = "retry", {"budget": {"max_tool_calls": 50}}
            if said:
                key = {"Idempotency-Key": f"{verb}-{run_id}"} if verb == "fork" else {}
                status, new = await person.ask(
                    "POST", f"{RUNS}/{run_id}/{verb}", json=said, headers=key
                )
                assert status in (200, 202), new
                batch.append(new["id"])
                await person.see_through(new["id"])
        ids += batch
        check(world, batch)
    assert person.kills > count // BATCH
    assert len(ids) >= count
    await person.leave()


@pytest.mark.timeout(300)
async def test_runs_under_kills_cancels_pauses_approvals_budgets_forks_and_retries_keep_every_invariant(
    world: World,
) -> None:
    await by_chance(world, BOUNDED)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_two_hundred_runs_by_chance_keep_every_invariant(world: World) -> None:
    await by_chance(world, WHOLE)
