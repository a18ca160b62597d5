"""What has been done is undone when the rest fails, the last first, whatever comes in between."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import delete

from agent_server.domain.base import JsonObject
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Budget, RunStatus, Usage
from agent_server.execution.budget import undoing
from agent_server.execution.halts import Halts
from agent_server.execution.ports import StepRecord
from agent_server.storage.tables import steps
from tests.execution.kit import finished, submit

from .workbench import Bench, bench, note


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling is answered at once: while nobody carries the run out, its end cannot be waited for."""
    monkeypatch.setattr("agent_server.execution.runs.CANCEL_ANSWER_S", 0)


def booking(id: str, **fields: Any) -> JsonObject:
    return note(id, compensate=[note(f"undo_{id}", f"undo {{{{ nodes.{id}.output }}}}")], **fields)


def fail(id: str = "boom", **fields: Any) -> JsonObject:
    return {"id": id, "type": "tool", "tool": "fail", **fields}


async def test_what_succeeded_is_undone_the_last_first_when_the_run_fails(url: str) -> None:
    async with bench(url) as made:
        run = await made.run(booking("car"), booking("hotel"), note("x"), fail())
        assert run.status is RunStatus.FAILED
        assert made.calls == ["car", "hotel", "x", "undo hotel", "undo car"]
        tasks = await made.tasks(run)
        assert tasks["1!.1"] == tasks["2!.1"] == "succeeded"


async def test_nothing_is_undone_when_the_run_succeeds(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.run(booking("car"), fail(on_error="continue"))
        assert run.status is RunStatus.SUCCEEDED and made.calls == ["car"]


async def test_an_undoing_that_fails_is_told_and_keeps_no_other_from_being_undone(
    sqlite_url: str,
) -> None:
    async with bench(sqlite_url) as made:
        broken = note("b", compensate=[fail("undo_b", timeout_s=5)])
        run = await made.run(booking("a"), broken, booking("c"), fail())
        assert run.status is RunStatus.FAILED and run.error is not None
        assert made.calls == ["a", "b", "c", "undo c", "undo a"]
        assert [error.path for error in run.error.errors] == ["2"]
        assert "'b' could not be undone" in run.error.errors[0].message
        assert "Undo it by hand" in (run.error.hint or "")


async def test_a_timeout_while_undoing_is_recorded_and_its_policy_applied(url: str) -> None:
    async with bench(url) as made:
        slow = {"id": "slow", "type": "tool", "tool": "hold", "timeout_s": 0.05}
        tolerant = {**slow, "id": "slow2", "on_error": "continue"}
        run = await made.run(
            note("a", compensate=[slow]), note("b", compensate=[tolerant, note("then")]), fail()
        )
        assert run.error is not None and "then" in made.calls
        assert ["was not done after" in error.message for error in run.error.errors] == [True]
        tasks = await made.tasks(run)
        assert tasks["1!.1"] == tasks["2!.1"] == "failed"


async def test_undoing_sees_what_the_node_saw_and_what_it_gave(sqlite_url: str) -> None:
    undo = note("u", "{{ [item, index, inputs.n, vars.x, nodes.first.output, nodes.b.status] }}")
    body = [note("b", output="x", compensate=[undo])]
    each = {"id": "m", "type": "map", "over": "['p', 'q']", "max_parallel": 1, "nodes": body}
    async with bench(sqlite_url) as made:
        await made.run(
            note("first"), each, fail(), inputs={"properties": {"n": {}}}, given={"n": 7}
        )
        assert made.calls[3:] == [
            ["q", 1, 7, "b", "first", "succeeded"],
            ["p", 0, 7, "b", "first", "succeeded"],
        ]


async def test_a_node_that_can_be_undone_is_not_broken_off_once_it_has_begun(
    sqlite_url: str,
) -> None:
    async with bench(sqlite_url) as made:
        hold = {"id": "h", "type": "tool", "tool": "hold", "arguments": {"value": "h"}}
        hold["compensate"] = [note("undo_h")]
        branches = [[fail()], [hold, note("next")]]
        run = await made.submit({"id": "p", "type": "parallel", "branches": branches})
        await made.reached.wait()
        await made.failed.wait()
        made.gate.set()
        assert (await finished(made.runs, run)).status is RunStatus.FAILED
        assert made.calls[0] == "h" and made.calls[-1] == "undo_h"


async def test_text_that_looks_like_a_template_is_undone_as_it_is(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        evil = "{{ 1 / 0 }}"
        await made.run(
            booking("a", output="x"),
            note("b", "{{ inputs.t }}", compensate=[note("u", "{{ [vars.x, inputs.t] }}")]),
            fail(),
            given={"t": evil},
        )
        assert made.calls == ["a", evil, ["a", evil], "undo a"]


HOLD: JsonObject = {"id": "h", "type": "tool", "tool": "hold"}


async def test_what_succeeded_is_undone_when_the_run_is_cancelled(url: str) -> None:
    inner = {"name": "inner", "nodes": [booking("room"), HOLD]}
    async with bench(url) as made:
        run = await made.submit(
            booking("car"), {"id": "sub", "type": "workflow", "workflow": inner}
        )
        await made.reached.wait()
        await made.runs.cancel(DEFAULT_TENANT, run.id, "enough")
        assert (await finished(made.runs, run)).status is RunStatus.CANCELLED
        assert made.calls == ["car", "room", "undo room", "undo car"]
        assert not set((await made.tasks(run)).values()) & {"running", "queued", "waiting"}


@pytest.mark.usefixtures("hurried")
async def test_an_undoing_that_a_stop_breaks_off_goes_on_where_it_was(sqlite_url: str) -> None:
    slow = {**HOLD, "id": "slow", "arguments": {"value": "undo b"}}
    nodes = [booking("a"), note("b", compensate=[slow]), booking("c"), {**HOLD, "id": "h2"}]
    async with bench(sqlite_url) as made:
        run = await made.submit(*nodes)
        await made.reached.wait()
        made.reached.clear()
        cancelling = asyncio.ensure_future(made.runs.cancel(DEFAULT_TENANT, run.id))
        await made.reached.wait()
        assert made.calls == ["a", "b", "c", "undo c"]
    await asyncio.gather(cancelling, return_exceptions=True)
    async with bench(sqlite_url) as again:
        await again.reached.wait()
        again.gate.set()
        assert (await finished(again.runs, run)).status is RunStatus.CANCELLED
        assert again.calls == ["undo b", "undo a"]


@pytest.mark.usefixtures("hurried")
async def test_an_undoing_that_a_stop_left_queued_is_no_task_that_cancelling_ends(url: str) -> None:
    slow = {**HOLD, "id": "slow", "arguments": {"value": "undo b"}}
    async with bench(url) as made:
        run = await made.submit(booking("a"), note("b", compensate=[slow]), fail())
        await made.reached.wait()
        assert made.calls == ["a", "b"]
    async with bench(url, role="api") as idle:
        await idle.runs.cancel(DEFAULT_TENANT, run.id)
    async with bench(url) as again:
        await again.reached.wait()
        again.gate.set()
        ended = await finished(again.runs, run)
        assert ended.status is RunStatus.CANCELLED
        assert again.calls == ["undo b", "undo a"]
        assert set((await again.tasks(run)).values()) <= {"succeeded", "failed"}


@pytest.mark.usefixtures("hurried")
async def test_a_run_that_nobody_carries_out_is_undone_when_it_is_cancelled(
    sqlite_url: str,
) -> None:
    async with bench(sqlite_url) as made:
        run = await made.submit(booking("a"), {**HOLD, "id": "h2"})
        await made.reached.wait()
    async with bench(sqlite_url, role="api") as idle:
        await idle.runs.cancel(DEFAULT_TENANT, run.id)
    async with bench(sqlite_url) as again:
        assert (await finished(again.runs, run)).status is RunStatus.CANCELLED
        assert again.calls == ["undo a"]


async def test_what_a_node_that_ran_out_of_time_had_done_is_undone(sqlite_url: str) -> None:
    inner = {"name": "inner", "nodes": [booking("room"), HOLD]}
    sub = {"id": "sub", "type": "workflow", "workflow": inner, "timeout_s": 0.3}
    async with bench(sqlite_url) as made:
        run = await made.run({**sub, "on_error": "continue"})
        assert run.status is RunStatus.SUCCEEDED
        assert made.calls == ["room", "undo room"]


# What is not known, and what comes in between ------------------------------------------------

UNDO_SEEN = "undo {{ nodes.a.status }} {{ nodes.a.output }}"


async def test_a_node_whose_time_was_up_may_have_happened_and_is_undone_as_unknown(
    sqlite_url: str,
) -> None:
    async with bench(sqlite_url) as made:
        a = {**HOLD, "id": "a", "timeout_s": 0.1, "compensate": [note("u", UNDO_SEEN)]}
        run = await made.run({**a, "on_error": "continue"}, fail())
        assert run.status is RunStatus.FAILED and made.calls == ["undo unknown null"]


async def test_a_node_that_failed_has_not_happened_and_is_not_undone(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        await made.run(fail("a", compensate=[note("u")], on_error="continue"), fail())
        assert made.calls == []


async def test_a_node_that_a_cancelled_run_breaks_off_is_undone_as_unknown(url: str) -> None:
    async with bench(url) as made:
        run = await made.submit({**HOLD, "id": "a", "compensate": [note("u", UNDO_SEEN)]})
        await made.reached.wait()
        await made.runs.cancel(DEFAULT_TENANT, run.id)
        assert (await finished(made.runs, run)).status is RunStatus.CANCELLED
        assert made.calls == ["undo unknown null"]


@pytest.mark.usefixtures("hurried")
async def test_an_end_that_was_stored_and_not_written_down_is_looked_up_and_undone(
    sqlite_url: str,
) -> None:
    """The process died, or was told to stop, between the end of a node and the record of it."""
    async with bench(sqlite_url) as made:
        run = await made.submit(booking("a", output="x"), {**HOLD, "id": "h2"})
        await made.reached.wait()
    async with bench(sqlite_url, role="api") as idle:

        def forget(connection: Any) -> None:
            found = steps.c.name == "1/ended"
            assert connection.execute(delete(steps).where(found)).rowcount == 1

        await idle.runs.database.write(forget)
        await idle.runs.cancel(DEFAULT_TENANT, run.id)
    async with bench(sqlite_url) as again:
        assert (await finished(again.runs, run)).status is RunStatus.CANCELLED
        assert again.calls == ["undo a"]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.usefixtures("hurried")
async def test_a_queued_sub_workflow_undoes_what_it_did_when_its_run_is_cancelled(
    workers: int, url: str
) -> None:
    inner = {"name": "inner", "nodes": [booking("room"), HOLD]}
    async with bench(url) as made:
        run = await made.submit(
            booking("car"), {"id": "sub", "type": "workflow", "workflow": inner}
        )
        await made.reached.wait()
    async with bench(url, role="api") as idle:
        await idle.runs.cancel(DEFAULT_TENANT, run.id)
    async with bench(url, worker_concurrency=workers) as again:
        assert (await finished(again.runs, run)).status is RunStatus.CANCELLED
        assert again.calls == ["undo room", "undo car"]
        assert not set((await again.tasks(run)).values()) & {"running", "queued", "waiting"}


async def test_a_sub_workflow_that_somebody_cancels_undoes_what_it_did(sqlite_url: str) -> None:
    inner = {"name": "inner", "nodes": [booking("room"), HOLD]}
    sub = {"id": "sub", "type": "workflow", "workflow": inner, "on_error": "continue"}
    async with bench(sqlite_url) as made:
        run = await made.submit(sub)
        await made.reached.wait()
        (task,) = [t for t in await made.runs.tasks(DEFAULT_TENANT, run.id) if t.path == "1"]
        await Halts(made.runs).cancel_task(DEFAULT_TENANT, run.id, task.id, by="test")
        assert (await finished(made.runs, run)).status is RunStatus.SUCCEEDED
        assert made.calls == ["room", "undo room"]


@pytest.mark.parametrize("limit", ["max_tool_calls", "max_tokens"])
async def test_a_run_that_has_used_up_its_budget_may_still_undo(limit: str, url: str) -> None:
    class Counted(Bench):
        async def call_tool(self, ctx: Any, name: str, arguments: JsonObject, *, key: str) -> Any:
            step = StepRecord(key=ctx.journal.key(key), kind="tool", name=name, input=arguments)
            await ctx.journal.begin(step, commit=True)
            self.calls.append(arguments["value"])
            usage = Usage(tool_calls=1, input_tokens=10)
            await ctx.journal.finish(step.done(arguments["value"], usage))
            return arguments["value"]

    most = {"max_tool_calls": 2, "max_tokens": 20}[limit]
    async with bench(url, Counted()) as made:
        nodes = [booking("a"), booking("b"), booking("c")]
        run = await submit(made.runs, workflow={"name": "w", "nodes": nodes}, budget={limit: most})
        ended = await finished(made.runs, run)
        assert ended.status is RunStatus.BUDGET_EXCEEDED and ended.error is not None
        assert made.calls == ["a", "b", "undo b", "undo a"] and ended.error.errors[1:] == ()
        assert ended.usage.tool_calls == 4


def test_what_undoes_has_the_ceilings_once_more_and_some_calls_in_any_case() -> None:
    more = undoing(Budget(max_tool_calls=1, max_model_calls=50, max_tokens=100))
    assert (more.max_tool_calls, more.max_model_calls, more.max_tokens) == (21, 100, 200)
    assert more.max_cost_usd is None
