"""Standing still for a signal, a moment, a decision: durably, once, and on both databases."""

import asyncio
from datetime import timedelta
from typing import Any

import anyio
import pytest

from agent_server.domain.approvals import Approval, Decide
from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    AlreadyDecided,
    Forbidden,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    RunEnded,
)
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import Run, RunStatus
from agent_server.execution.keys import Idempotency, Keyed
from agent_server.execution.ports import ApprovalAsk, TaskContext, TaskSpec
from agent_server.execution.runs import Runs
from tests.execution.kit import control, event_types, finished, running, submit
from tests.support.until import until

AGENT = {"agent": "a", "input": "x"}


async def waiting(runs: Runs, run: Run, kind: str) -> Run:
    """The run, once it stands still for that."""

    async def stands() -> Run | None:
        found = await runs.get(DEFAULT_TENANT, run.id)
        assert not found.status.ended, found
        waits = found.status is RunStatus.WAITING and found.waiting_for.kind == kind
        return found if waits else None

    found: Run = await until(stands)
    return found


async def take_two(ctx: TaskContext) -> Any:
    first = await ctx.wait_signal("go", key="first")
    second = await ctx.wait_signal("go", key="second")
    assert first is not None and second is not None
    return [first.payload, second.payload, first.by]


async def test_signals_are_taken_once_each_in_the_order_they_came(url: str) -> None:
    async with running(url, {"agent": take_two}) as runs:
        run = await submit(runs, **AGENT)
        await waiting(runs, run, "signal")
        await control(runs).signal(DEFAULT_TENANT, run.id, "other", 0, by="ann")
        await control(runs).signal(DEFAULT_TENANT, run.id, "go", {"n": 1}, by="ann")
        await control(runs).signal(DEFAULT_TENANT, run.id, "go", None, by="bob")
        assert (await finished(runs, run)).output == [{"n": 1}, None, "ann"]
        types = await event_types(runs, run)
        assert types.count("run.waiting") == types.count("run.resumed") >= 1
        assert types.count("run.started") == 1
        with pytest.raises(RunEnded):
            await control(runs).signal(DEFAULT_TENANT, run.id, "go", 1, by="ann")
        with pytest.raises(NotFound):
            await control(runs).signal(Tenant("other"), run.id, "go", 1, by="ann")


async def test_a_signal_before_the_wait_is_kept_and_one_that_never_comes_gives_none(
    url: str,
) -> None:
    begun = asyncio.Event()
    sent = asyncio.Event()

    async def handler(ctx: TaskContext) -> Any:
        begun.set()
        await sent.wait()
        early = await ctx.wait_signal("early", key="early")
        until = ctx.run.created_at + timedelta(seconds=0.1)
        never = await ctx.wait_signal("never", key="never", until=until)
        return [early and early.payload, never]

    async with running(url, {"agent": handler}) as runs:
        run = await submit(runs, **AGENT)
        await begun.wait()
        await control(runs).signal(DEFAULT_TENANT, run.id, "early", 7, by="ann")
        sent.set()
        assert (await finished(runs, run)).output == [7, None]


async def test_a_wait_survives_a_restart_and_holds_no_slot(url: str) -> None:
    async with running(url, {"agent": take_two}, worker_concurrency=1) as runs:
        run = await submit(runs, **AGENT)
        await waiting(runs, run, "signal")
        other = await submit(runs, **AGENT)
        await waiting(runs, other, "signal")
        await control(runs).signal(DEFAULT_TENANT, run.id, "go", 1, by="ann")
        await control(runs).signal(DEFAULT_TENANT, other.id, "go", 8, by="ann")
    async with running(url, {"agent": take_two}, worker_concurrency=1) as runs:
        await control(runs).signal(DEFAULT_TENANT, run.id, "go", 2, by="ann")
        await control(runs).signal(DEFAULT_TENANT, other.id, "go", 9, by="ann")
        assert (await finished(runs, run)).output == [1, 2, "ann"]
        assert (await finished(runs, other)).output == [8, 9, "ann"]


async def test_a_parent_of_a_task_that_waits_outlives_any_number_of_restarts(url: str) -> None:
    async def root(ctx: TaskContext) -> Any:
        spec = TaskSpec(path="1", node="n", kind="child", payload={})
        return (await ctx.child(spec)).output

    handlers = {"agent": root, "child": take_two}
    async with running(url, handlers, max_attempts=2) as runs:
        run = await submit(runs, **AGENT)
        await waiting(runs, run, "signal")
    for _ in range(4):
        async with running(url, handlers, max_attempts=2) as runs:
            await until(lambda: runs.engine.roster.carries_out(run.id, ""))
            await waiting(runs, run, "signal")
    async with running(url, handlers, max_attempts=2) as runs:
        for payload in (1, 2):
            await control(runs).signal(DEFAULT_TENANT, run.id, "go", payload, by="ann")
        assert (await finished(runs, run)).output == [1, 2, "ann"]


async def test_a_signal_by_one_process_wakes_a_task_of_another(postgres_url: str) -> None:
    async with running(postgres_url, {"agent": take_two}) as worker:
        async with running(postgres_url, {"agent": take_two}, role="api") as api:
            run = await submit(api, **AGENT)
            await waiting(api, run, "signal")
            for payload in (1, 2):
                await control(api).signal(DEFAULT_TENANT, run.id, "go", payload, by="ann")
            assert (await finished(worker, run)).output == [1, 2, "ann"]


async def test_many_signals_at_once_wake_every_task_that_waits(url: str) -> None:
    async def child(ctx: TaskContext) -> Any:
        got = await ctx.wait_signal(ctx.path, key="wait")
        assert got is not None
        return got.payload

    async def root(ctx: TaskContext) -> Any:
        specs = [TaskSpec(path=f"t{i}", node="t", kind="child", payload={}) for i in range(12)]
        outcomes = await asyncio.gather(*(ctx.child(spec) for spec in specs))
        return [outcome.output for outcome in outcomes]

    async with running(url, {"agent": root, "child": child}) as runs:
        run = await submit(runs, **AGENT)
        await asyncio.gather(
            *(control(runs).signal(DEFAULT_TENANT, run.id, f"t{i}", i, by="a") for i in range(12))
        )
        assert (await finished(runs, run)).output == list(range(12))
        found = await runs.get(DEFAULT_TENANT, run.id)
        assert found.waiting_for is None


async def test_a_timer_wakes_the_task_and_waits_do_not_use_up_its_attempts(url: str) -> None:
    async def handler(ctx: TaskContext) -> Any:
        for i in range(6):
            moment = ctx.run.created_at + timedelta(milliseconds=60 * (i + 1))
            await ctx.sleep_until(moment, key=f"nap/{i}")
        return ctx.attempt

    async with running(url, {"agent": handler}, max_attempts=2) as runs:
        run = await submit(runs, **AGENT)
        assert (await finished(runs, run)).output == 1


def asking(**ask: Any) -> Any:
    async def handler(ctx: TaskContext) -> Any:
        values: dict[str, Any] = {"subject": "pay", "arguments": {"eur": 5}} | ask
        if isinstance(values.get("expires_at"), timedelta):
            values["expires_at"] = ctx.run.created_at + values["expires_at"]
        decision = await ctx.ask_approval(ApprovalAsk(**values), key="ask")
        return [decision.decision, decision.arguments, decision.by, decision.reason]

    return handler


async def pending(runs: Runs, run: Run) -> Approval:
    await waiting(runs, run, "approval")
    page = await control(runs).approvals(DEFAULT_TENANT, status="pending", run_id=run.id, limit=10)
    assert len(page.data) == 1
    return page.data[0]


async def test_an_approval_is_decided_by_one_of_many_at_once(url: str) -> None:
    async with running(url, {"agent": asking()}) as runs:
        run = await submit(runs, **AGENT)
        approval = await pending(runs, run)

        async def decide(by: str) -> str:
            try:
                await control(runs).decide(
                    DEFAULT_TENANT, approval.id, Decide(decision="approve"), by=by
                )
            except AlreadyDecided:
                return "late"
            return by

        answers = await asyncio.gather(*(decide(f"p{i}") for i in range(8)))
        winners = [answer for answer in answers if answer != "late"]
        assert len(winners) == 1
        assert (await finished(runs, run)).output == ["approve", {"eur": 5}, winners[0], ""]
        types = await event_types(runs, run)
        assert types.count("approval.requested") == types.count("approval.decided") == 1


async def test_edited_arguments_fit_the_schema_and_are_a_new_approval(url: str) -> None:
    schema = {"type": "object", "properties": {"eur": {"type": "integer"}}, "required": ["eur"]}
    async with running(url, {"agent": asking(schema=schema)}) as runs:
        run = await submit(runs, **AGENT)
        asked = await pending(runs, run)
        door = control(runs)
        with pytest.raises(InvalidRequest) as refused:
            bad = Decide(decision="approve", arguments={"eur": "all of it"})
            await door.decide(DEFAULT_TENANT, asked.id, bad, by="ann")
        assert refused.value.errors[0].path == "/arguments/eur"
        edit = Decide(decision="approve", arguments={"eur": 3}, reason="too much")
        counts = await door.decide(DEFAULT_TENANT, asked.id, edit, by="ann")
        assert counts.replaces == asked.id and counts.status == "approved"
        assert counts.arguments_hash != asked.arguments_hash
        closed = await door.approval(DEFAULT_TENANT, asked.id)
        assert (closed.status, closed.replaced_by) == ("replaced", counts.id)
        assert (await finished(runs, run)).output == ["approve", {"eur": 3}, "ann", "too much"]
        for spent in (asked.id, counts.id):
            with pytest.raises(AlreadyDecided):
                await door.decide(DEFAULT_TENANT, spent, Decide(decision="approve"), by="bob")


async def test_only_who_may_decides_and_only_in_the_own_tenant(url: str) -> None:
    async with running(url, {"agent": asking(approvers=("ann",))}) as runs:
        run = await submit(runs, **AGENT)
        approval = await pending(runs, run)
        door, yes = control(runs), Decide(decision="approve")
        with pytest.raises(Forbidden):
            await door.decide(DEFAULT_TENANT, approval.id, yes, by="mallory")
        with pytest.raises(NotFound):
            await door.decide(Tenant("other"), approval.id, yes, by="ann")
        with pytest.raises(NotFound):
            await door.decide(DEFAULT_TENANT, "appr_" + "0" * 32, yes, by="ann")
        assert (await door.approvals(Tenant("other"), limit=10)).data == []
        no = Decide(decision="reject", reason="no budget")
        await door.decide(DEFAULT_TENANT, approval.id, no, by="ann")
        assert (await finished(runs, run)).output == ["reject", {"eur": 5}, "ann", "no budget"]


@pytest.mark.parametrize(
    ("on_expiry", "ends"), [("reject", "expired"), ("approve", "approve"), ("fail", None)]
)
async def test_what_nobody_decides_in_time_goes_as_it_was_asked(
    url: str, on_expiry: str, ends: str | None
) -> None:
    handler = asking(expires_at=timedelta(seconds=0.3), on_expiry=on_expiry)
    async with running(url, {"agent": handler}) as runs:
        run = await submit(runs, **AGENT)
        ended = await finished(runs, run)
        (approval,) = (await control(runs).approvals(DEFAULT_TENANT, limit=10)).data
        if ends is None:
            assert ended.error is not None and ended.error.code == "approval_expired"
        else:
            assert ended.output[0] == ends
        with pytest.raises(AlreadyDecided):
            yes = Decide(decision="approve")
            await control(runs).decide(DEFAULT_TENANT, approval.id, yes, by="ann")


async def test_a_cancelled_run_withdraws_what_it_had_asked(url: str) -> None:
    async with running(url, {"agent": asking()}) as runs:
        run = await submit(runs, **AGENT)
        approval = await pending(runs, run)
        await runs.cancel(DEFAULT_TENANT, run.id, "")
        assert (await control(runs).approval(DEFAULT_TENANT, approval.id)).status == "withdrawn"
        with pytest.raises(AlreadyDecided):
            yes = Decide(decision="approve")
            await control(runs).decide(DEFAULT_TENANT, approval.id, yes, by="ann")


async def test_the_inbox_has_pages(url: str) -> None:
    async with running(url, {"agent": asking()}) as runs:
        for _ in range(5):
            await pending(runs, await submit(runs, **AGENT))
        door, seen, cursor = control(runs), [], None
        while True:
            page = await door.approvals(DEFAULT_TENANT, status="pending", limit=2, cursor=cursor)
            seen += [approval.id for approval in page.data]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert len(seen) == len(set(seen)) == 5
        assert utcnow() > (await door.approval(DEFAULT_TENANT, seen[0])).requested_at


async def test_a_signal_and_a_decision_with_a_key_count_once_and_are_answered_again(
    url: str,
) -> None:
    async def handler(ctx: TaskContext) -> Any:
        decision = await ctx.ask_approval(ApprovalAsk(subject="pay", arguments=1), key="ask")
        first = await ctx.wait_signal("go", key="first")
        until = ctx.run.created_at
        return [
            decision.decision,
            first and first.payload,
            await ctx.wait_signal("go", key="2", until=until),
        ]

    async with running(url, {"agent": handler}) as runs:
        run = await submit(runs, **AGENT)
        asked = await pending(runs, run)
        door = control(runs)

        async def decide(fingerprint: str = "f") -> tuple[Approval, bool]:
            keyed = Keyed(Idempotency("decide", fingerprint))
            body = Decide(decision="approve")
            found = await door.decide(DEFAULT_TENANT, asked.id, body, by="ann", keyed=keyed)
            return found, keyed.replayed

        async def send() -> tuple[str, bool]:
            keyed = Keyed(Idempotency("send", "f"))
            sent = await door.signal(DEFAULT_TENANT, run.id, "go", 7, by="ann", keyed=keyed)
            return sent.id, keyed.replayed

        decided = await asyncio.gather(*(decide() for _ in range(4)))
        assert sorted(replayed for _, replayed in decided) == [False, True, True, True]
        assert {one.status for one, _ in decided} == {"approved"}
        with pytest.raises(IdempotencyMismatch):
            await decide("another body")
        with pytest.raises(AlreadyDecided):
            await door.decide(DEFAULT_TENANT, asked.id, Decide(decision="approve"), by="ann")
        sent = await asyncio.gather(*(send() for _ in range(4)))
        assert sorted(replayed for _, replayed in sent) == [False, True, True, True]
        assert len({identity for identity, _ in sent}) == 1
        assert (await finished(runs, run)).output == ["approve", 7, None]
        assert (await send())[1], "the answer outlives the run"


async def test_a_task_that_stands_still_while_its_siblings_begin_is_woken_at_its_moment(
    url: str,
) -> None:
    async def root(ctx: TaskContext) -> Any:
        outcomes: dict[str, Any] = {}

        async def one(path: str) -> None:
            outcomes[path] = await ctx.child(
                TaskSpec(path=path, node=path, kind="leaf", payload={})
            )

        async with anyio.create_task_group() as group:
            for number in range(1, 7):
                group.start_soon(one, str(number))
        return [outcomes[path].output for path in sorted(outcomes)]

    async def leaf(ctx: TaskContext) -> Any:
        if int(ctx.path) % 2:
            await ctx.sleep_until(ctx.run.created_at + timedelta(seconds=0.5), key="slept")
        return ctx.path

    async with running(url, {"goal": root, "leaf": leaf}) as runs:
        run = await submit(runs, goal="g")
        assert (await finished(runs, run)).output == ["1", "2", "3", "4", "5", "6"]
        types = await event_types(runs, run)
        assert types.count("run.waiting") == types.count("run.resumed") == 3
