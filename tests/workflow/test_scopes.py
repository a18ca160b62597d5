"""What a part of a workflow has done is undone when that part fails or loses and the rest goes on."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, update

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import RunStatus
from agent_server.execution.halts import Halts
from agent_server.storage.tables import steps, tasks
from tests.execution.kit import finished

from .test_saga import HOLD, booking, fail
from .workbench import bench, note

WON = {"id": "after", "type": "tool", "tool": "note", "arguments": {"value": "after"}}
NEVER: JsonObject = {"id": "never", "type": "wait", "signal": "nobody sends it"}
HANDLED = [
    {"type": "parallel", "branches": [[booking("b"), fail()]]},
    {"type": "branch", "cases": [{"when": "1 == 1", "nodes": [booking("b"), fail()]}]},
    {"type": "map", "over": [1], "nodes": [booking("b"), fail()]},
    {"type": "loop", "until": "false", "max_iterations": 1, "nodes": [booking("b")]},
    {"type": "parallel", "branches": [[booking("b"), NEVER]], "timeout_s": 0.3},
]


@pytest.mark.parametrize("part", HANDLED)
async def test_what_a_part_did_whose_failure_is_handled_is_undone_before_the_rest_goes_on(
    part: JsonObject, sqlite_url: str
) -> None:
    async with bench(sqlite_url) as made:
        run = await made.run(booking("a"), {**part, "id": "p", "on_error": "continue"}, WON)
        assert run.status is RunStatus.SUCCEEDED
        assert made.calls == ["a", "b", "undo b", "after"]


async def test_what_a_part_did_is_undone_before_it_is_tried_again(sqlite_url: str) -> None:
    retry = {"max_attempts": 2}
    part = {"id": "p", "type": "parallel", "branches": [[booking("b"), fail()]], "retry": retry}
    async with bench(sqlite_url) as made:
        run = await made.run(booking("a"), part)
        assert run.status is RunStatus.FAILED
        assert made.calls == ["a", "b", "undo b", "b", "undo b", "undo a"]


@pytest.mark.parametrize("policy", ["continue", "drop"])
async def test_what_an_item_of_a_map_did_that_may_fail_is_undone(
    policy: str, sqlite_url: str
) -> None:
    body = [
        note("b", "{{ item }}", compensate=[note("u", "undo {{ nodes.b.output }}")]),
        fail("two", when="item == 2"),
    ]
    each = {"id": "m", "type": "map", "over": [1, 2, 3], "max_parallel": 1, "nodes": body}
    async with bench(sqlite_url) as made:
        await made.run({**each, "on_item_error": policy}, fail())
        assert made.calls == [1, 2, "undo 2", 3, "undo 3", "undo 1"]


async def test_what_a_branch_did_that_lost_is_undone_before_the_rest_goes_on(url: str) -> None:
    lost = [booking("b"), booking("c"), NEVER]
    won = [{"id": "pause", "type": "wait", "duration_s": 0.3}, booking("d")]
    race = {"id": "p", "type": "parallel", "join": "any", "branches": [lost, won]}
    async with bench(url) as made:
        run = await made.run(booking("a"), race, WON)
        assert run.status is RunStatus.SUCCEEDED
        assert made.calls == ["a", "b", "c", "d", "undo c", "undo b", "after"]


def race_of(*inner: JsonObject) -> JsonObject:
    """A race that the sub-workflow of ``inner`` loses as soon as somebody sends ``go``."""
    sub = {"id": "sub", "type": "workflow", "workflow": {"name": "in", "nodes": list(inner)}}
    go = {"id": "go", "type": "wait", "signal": "go"}
    return {"id": "p", "type": "parallel", "join": "any", "branches": [[sub], [go]]}


async def test_a_sub_workflow_that_lost_undoes_what_it_did_and_is_waited_for(url: str) -> None:
    slow = note("b", compensate=[{**HOLD, "id": "slow", "arguments": {"value": "undo b"}}])
    async with bench(url) as made:
        run = await made.submit(race_of(booking("a"), slow, {**NEVER}), WON)
        await made.until(lambda: "b" in made.calls)
        await made.signal(run, "go", 1)
        await made.reached.wait()
        assert made.calls == ["a", "b"]
        made.gate.set()
        assert (await finished(made.runs, run)).status is RunStatus.SUCCEEDED
        assert made.calls == ["a", "b", "undo b", "undo a", "after"]


async def test_a_sub_workflow_that_lost_goes_on_undoing_after_a_crash_and_does_nothing_else(
    url: str,
) -> None:
    """The process dies in the middle of the undoing, before it is written down who won."""
    slow = note("b", compensate=[{**HOLD, "id": "slow", "arguments": {"value": "undo b"}}])
    inner = [booking("a"), slow, {"id": "mine", "type": "wait", "signal": "mine"}, note("wrong")]
    async with bench(url) as made:
        run = await made.submit(race_of(*inner), WON)
        await made.until(lambda: "b" in made.calls)
        await made.signal(run, "go", 1)
        await made.reached.wait()
    async with bench(url) as again:
        await again.signal(run, "mine", 1)
        await again.reached.wait()
        again.gate.set()
        assert (await finished(again.runs, run)).status is RunStatus.SUCCEEDED
        assert again.calls == ["undo b", "undo a", "after"]


async def test_a_queued_sub_workflow_that_lost_undoes_what_it_did(url: str) -> None:
    """What decides the race came while nobody carried it out."""
    async with bench(url) as made:
        run = await made.submit(race_of(booking("a"), {**HOLD, "id": "h2"}), WON)
        await made.reached.wait()
    async with bench(url, role="api") as idle:
        await idle.signal(run, "go", 1)
    async with bench(url) as again:
        assert (await finished(again.runs, run)).status is RunStatus.SUCCEEDED
        assert not set((await again.tasks(run)).values()) & {"running", "queued", "waiting"}
        assert again.calls == ["undo a", "after"]


async def test_a_sub_workflow_whose_time_was_up_goes_on_undoing_after_a_crash(url: str) -> None:
    slow = note("b", compensate=[{**HOLD, "id": "slow", "arguments": {"value": "undo b"}}])
    inner = {"name": "in", "nodes": [booking("a"), slow, NEVER]}
    sub = {"id": "sub", "type": "workflow", "workflow": inner, "timeout_s": 0.5}
    async with bench(url) as made:
        run = await made.submit({**sub, "on_error": "continue"}, WON)
        await made.reached.wait()
        assert made.calls == ["a", "b"]
    async with bench(url) as again:
        await again.reached.wait()
        again.gate.set()
        assert (await finished(again.runs, run)).status is RunStatus.SUCCEEDED
        assert again.calls == ["undo b", "undo a", "after"]
        assert "task_timeout" in await again.codes(run)


async def test_a_timeout_that_comes_while_a_sub_workflow_undoes_breaks_nothing_off(
    sqlite_url: str,
) -> None:
    slow = note("b", compensate=[{**HOLD, "id": "slow", "arguments": {"value": "undo b"}}])
    inner = {"name": "in", "nodes": [booking("a"), slow, fail()]}
    sub = {"id": "sub", "type": "workflow", "workflow": inner, "timeout_s": 0.5}
    async with bench(sqlite_url) as made:
        run = await made.submit({**sub, "on_error": "continue"}, WON)
        await made.reached.wait()
        (task,) = [t for t in await made.runs.tasks(DEFAULT_TENANT, run.id) if t.path == "1"]
        assert task.started_at is not None
        up = task.started_at + timedelta(seconds=0.6)
        await made.until(lambda: utcnow() > up)
        assert made.calls == ["a", "b"]
        made.gate.set()
        assert (await finished(made.runs, run)).status is RunStatus.SUCCEEDED
        assert made.calls == ["a", "b", "undo b", "undo a", "after"]


async def test_a_queued_sub_workflow_that_somebody_cancels_undoes_what_it_did(url: str) -> None:
    inner = {"name": "inner", "nodes": [booking("room"), HOLD]}
    sub = {"id": "sub", "type": "workflow", "workflow": inner, "on_error": "continue"}
    async with bench(url) as made:
        run = await made.submit(sub)
        await made.reached.wait()
        (task,) = [t for t in await made.runs.tasks(DEFAULT_TENANT, run.id) if t.path == "1"]
    async with bench(url, role="api") as idle:
        await Halts(idle.runs).cancel_task(DEFAULT_TENANT, run.id, task.id, by="test")
    async with bench(url) as again:
        assert (await finished(again.runs, run)).status is RunStatus.SUCCEEDED
        assert again.calls == ["undo room"]
        assert "task_cancelled" in await again.codes(run)


async def test_two_that_ended_before_a_crash_are_undone_by_when_they_ended(url: str) -> None:
    """Their ends were stored, and neither was written down for the undoing."""
    both = {"id": "p", "type": "parallel", "branches": [[booking("a")], [booking("b")]]}
    async with bench(url) as made:
        run = await made.submit(both, {**HOLD, "id": "h2"}, fail())
        await made.reached.wait()
    async with bench(url, role="api") as idle:

        def forget(connection: Any) -> None:
            found = steps.c.name.in_(["1.1.1/ended", "1.2.1/ended"])
            assert connection.execute(delete(steps).where(found)).rowcount == 2
            moved = update(tasks).where(tasks.c.path == "1.2.1")
            connection.execute(moved.values(ended_at=run.created_at))

        await idle.runs.database.write(forget)
    async with bench(url) as again:
        again.gate.set()
        assert (await finished(again.runs, run)).status is RunStatus.FAILED
        assert [call for call in again.calls if call] == ["undo a", "undo b"]
