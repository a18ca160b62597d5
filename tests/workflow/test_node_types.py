"""Every type of node on the real engine: a run, a failure, a cancel, a time that is up."""

from typing import Any

import pytest

from agent_server.domain.base import JsonObject
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run, RunStatus
from tests.execution.kit import finished

from .workbench import Bench, bench, note

HOLD = {"id": "h", "type": "tool", "tool": "hold", "arguments": {"value": "held"}}
FAIL = {"id": "h", "type": "tool", "tool": "fail"}


def around(inner: JsonObject) -> dict[str, tuple[JsonObject, Any]]:
    """Each type with ``inner`` inside, and what it gives when that gives ``held``."""
    return {
        "tool": (inner, "held"),
        "parallel": ({"type": "parallel", "branches": [[inner], [note("o")]]}, ["held", "o"]),
        "any": ({"type": "parallel", "join": "any", "branches": [[inner]]}, "held"),
        "branch": (
            {
                "type": "branch",
                "cases": [{"when": "inputs == 0", "nodes": [note("o")]}],
                "else": [inner],
            },
            "held",
        ),
        "map": ({"type": "map", "over": [1, 2], "nodes": [inner]}, ["held", "held"]),
        "loop": (
            {"type": "loop", "until": "iteration == 2", "max_iterations": 3, "nodes": [inner]},
            "held",
        ),
        "workflow": (
            {"type": "workflow", "workflow": {"name": "inner", "nodes": [inner]}},
            "held",
        ),
        "stored": ({"type": "workflow", "workflow": "stored@7"}, "held"),
    }


WAIT = {"type": "wait", "signal": "go"}
APPROVAL = {"type": "approval", "subject": "May it?", "input": {"amount": 5}}
TYPES = sorted(around(HOLD))


def stored(inner: JsonObject) -> Bench:
    return Bench({"stored": {"nodes": [inner]}})


def node(kind: str, inner: JsonObject, **fields: Any) -> JsonObject:
    return {**around(inner)[kind][0], "id": "n", **fields}


@pytest.mark.parametrize("kind", TYPES)
async def test_it_runs(kind: str, url: str) -> None:
    async with bench(url, stored(HOLD)) as made:
        made.gate.set()
        run = await made.run(node(kind, HOLD))
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, around(HOLD)[kind][1])


@pytest.mark.parametrize("kind", TYPES)
async def test_a_failure_in_it_is_its_own_and_its_policy_is_applied(
    kind: str, sqlite_url: str
) -> None:
    async with bench(sqlite_url, stored(FAIL)) as made:
        run = await made.run(node(kind, FAIL))
        assert run.status is RunStatus.FAILED and run.error is not None
        assert "It failed" in run.error.message
        after = note("z", "{{ nodes.n.status }}")
        run = await made.run(node(kind, FAIL, on_error="continue"), after)
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, "failed")


@pytest.mark.parametrize("kind", TYPES)
async def test_a_time_that_is_up_stops_what_is_in_it(kind: str, sqlite_url: str) -> None:
    async with bench(sqlite_url, stored(HOLD)) as made:
        late = node(kind, HOLD, timeout_s=0.1, on_error="continue")
        run = await made.run(late, note("z", "{{ nodes.n.error.code }}"))
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, "task_timeout")
        assert "running" not in (await made.tasks(run)).values()


@pytest.mark.parametrize("kind", TYPES)
async def test_a_cancel_stops_all_that_is_in_it(kind: str, sqlite_url: str) -> None:
    async with bench(sqlite_url, stored(HOLD)) as made:
        run = await made.submit(node(kind, HOLD))
        await made.reached.wait()
        await made.runs.cancel(DEFAULT_TENANT, run.id)
        assert (await finished(made.runs, run)).status is RunStatus.CANCELLED
        assert not set((await made.tasks(run)).values()) & {"running", "queued", "waiting"}
        assert "held" not in made.calls


async def test_a_set_runs_and_fails_by_its_own(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.run({"id": "s", "type": "set", "variables": {"x": "{{ 1 + 1 }}"}})
        assert run.output == {"x": 2}
        run = await made.run({"id": "s", "type": "set", "variables": {"x": "{{ inputs.y }}"}})
        assert run.error is not None and "there is no 'y'" in run.error.message


# Standing still -----------------------------------------------------------------------------


async def standing(made: Bench, run: Run) -> Run:
    """The run when it stands still."""
    for _ in range(200):
        found = await made.runs.wait(DEFAULT_TENANT, run.id, 0.05)
        if found.status is RunStatus.WAITING or found.status.ended:
            return found
    raise AssertionError(found)


async def test_a_wait_takes_a_signal_and_gives_its_payload(url: str) -> None:
    async with bench(url) as made:
        run = await made.submit({**WAIT, "id": "w"})
        assert (await standing(made, run)).status is RunStatus.WAITING
        await made.signal(run, "go", {"by": 7})
        assert (await finished(made.runs, run)).output == {"by": 7}


async def test_a_wait_that_nobody_ends_fails_when_its_time_is_up(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.run({**WAIT, "id": "w", "timeout_s": 0.1})
        assert run.error is not None and "was not done after 0.1 s" in run.error.message
        run = await made.run({"id": "w", "type": "wait", "duration_s": 60, "timeout_s": 0.1})
        assert run.error is not None and "was not done after 0.1 s" in run.error.message


async def test_a_wait_lasts_so_long_or_until_then(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.run(
            {"id": "w", "type": "wait", "duration_s": "inputs.s"}, given={"s": 0.05}
        )
        assert run.status is RunStatus.SUCCEEDED and run.output.endswith("Z")
        run = await made.run({"id": "w", "type": "wait", "until": "2020-01-31T09:00:00+01:00"})
        assert run.output == "2020-01-31T08:00:00Z"
        for bad in ({"duration_s": "inputs.s"}, {"until": "{{ inputs.s }}"}):
            run = await made.run({"id": "w", "type": "wait", **bad}, given={"s": "soon"})
            assert "expression_error" in await made.codes(run)


@pytest.mark.parametrize("kind", ["wait", "approval"])
async def test_a_run_that_stands_still_is_cancelled(kind: str, sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.submit({**(WAIT if kind == "wait" else APPROVAL), "id": "n"})
        assert (await standing(made, run)).status is RunStatus.WAITING
        await made.runs.cancel(DEFAULT_TENANT, run.id)
        assert (await finished(made.runs, run)).status is RunStatus.CANCELLED


@pytest.mark.parametrize("decision", ["approve", "reject"])
async def test_an_approval_is_what_a_person_decided(decision: str, sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.submit({**APPROVAL, "id": "n", "on_reject": "continue"})
        assert (await standing(made, run)).waiting_for is not None
        await made.decide(run, decision, "because")
        ended = await finished(made.runs, run)
        assert ended.output["approved"] is (decision == "approve")
        assert ended.output["input"] == {"amount": 5} and ended.output["reason"] == "because"


async def test_a_rejection_fails_the_node_unless_it_says_otherwise(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        run = await made.submit({**APPROVAL, "id": "n"})
        await standing(made, run)
        await made.decide(run, "reject", "too much")
        ended = await finished(made.runs, run)
        assert ended.error is not None and "too much" in ended.error.message


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"expires_s": 0.1, "on_reject": "continue"}, "expired"),
        ({"expires_s": 0.1, "on_expiry": "approve"}, "approve"),
        ({"expires_s": 0.1}, "approval_rejected"),
        ({"expires_s": 0.1, "on_expiry": "fail"}, "approval_expired"),
        ({"timeout_s": 0.1}, "task_timeout"),
    ],
)
async def test_an_approval_that_nobody_decides(fields: Any, output: str, sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        shown = "{{ nodes.n.error.code if nodes.n.error else nodes.n.output.decision }}"
        run = await made.run(
            {**APPROVAL, "id": "n", "on_error": "continue", **fields}, note("z", shown)
        )
        assert run.output == output


async def test_whichever_comes_first_is_the_deferred_choice(url: str) -> None:
    async with bench(url) as made:
        ways = [
            [{"id": "yes", "type": "wait", "signal": "yes"}, note("said_yes")],
            [{"id": "late", "type": "wait", "duration_s": 60}, note("too_late")],
        ]
        run = await made.submit({"id": "p", "type": "parallel", "join": "any", "branches": ways})
        await standing(made, run)
        await made.signal(run, "yes", None)
        assert (await finished(made.runs, run)).output == "said_yes"
        assert (await made.tasks(run))["1.2.1"] == "cancelled"


# Limits -------------------------------------------------------------------------------------


async def test_a_workflow_that_calls_itself_fails_saying_so(sqlite_url: str) -> None:
    again = {"id": "n", "type": "workflow", "workflow": "self"}
    async with bench(sqlite_url, Bench({"self": {"nodes": [again]}})) as made:
        run = await made.run({**again, "id": "start"})
        assert run.error is not None
        assert "calls itself: w → self@1 → self@1" in run.error.message


async def test_a_retry_waits_without_a_worker_and_tries_again(sqlite_url: str) -> None:
    async with bench(sqlite_url) as made:
        retry = {"max_attempts": 2, "backoff_s": 0.05}
        run = await made.run({**FAIL, "retry": retry})
        assert run.status is RunStatus.FAILED
        assert {path: s for path, s in (await made.tasks(run)).items()} == {
            "1": "failed",
            "1@2": "failed",
        }
