"""A message into a run under way: in its place, exactly once, and never lost, on both databases."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunContextWrapper,
    function_tool,
    input_guardrail,
)

from agent_server.domain.errors import IdempotencyMismatch, NotSteerable
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import RunRequest, RunStatus
from agent_server.execution.ports import FinalOutput, TaskContext
from agent_server.execution.runs import Idempotency, RunFilters, Runs, Submitted
from agent_server.memory.long_term import LongTermMemory
from agent_server.memory.session_store import SessionStore
from agent_server.memory.sessions import StagedSession
from tests.execution.kit import event_types, finished, running, submit
from tests.support.durable import Rule, call, loop_for, outputs_of, say

SECOND = Tenant("second")
FILTERS = RunFilters()


class Stage:
    """Where one agent, ``adder``, runs on sessions; ``before_end`` is awaited by its handler."""

    def __init__(self, rule: Rule, **agent: Any) -> None:
        self.agent = Agent(name="adder", instructions="adder", **agent)
        self.loop, self.model = loop_for(rule, open_session=self._open)
        self.before_end: Callable[[TaskContext], Any] | None = None
        self.runs: Runs

    def _open(self, ctx: TaskContext, session_id: str) -> StagedSession:
        return StagedSession(self.sessions.of(ctx.run.tenant), session_id)

    async def handle(self, ctx: TaskContext) -> Any:
        request = ctx.run.request
        assert request.input is not None
        result = await self.loop.run(
            ctx, self.agent, request.input, session_id=request.session_id, listener=self.agent
        )
        if self.before_end is not None:
            await self.before_end(ctx)
        return FinalOutput(result.output, request.session_id, tuple(result.session_items))

    @asynccontextmanager
    async def open(self, url: str, **settings: Any) -> AsyncIterator[Runs]:
        async def other(ctx: TaskContext) -> Any:
            await asyncio.Event().wait()

        handlers = {"agent": self.handle, "goal": other}
        async with running(url, handlers, **settings) as runs:
            self.runs = runs
            self.sessions = SessionStore(
                runs.database, LongTermMemory(runs.database, self.loop._settings).store
            )
            yield runs

    async def say(self, text: str, tenant: Tenant = DEFAULT_TENANT, **more: Any) -> Submitted:
        """Say ``text`` to the session ``s``, into what is under way there."""
        key = more.pop("key", None)
        body = {"agent": "adder", "input": text, "session_id": "s", "on_busy": "steer", **more}
        return await self.runs.submit(
            RunRequest(**body),
            tenant=tenant,
            principal="ann",
            idempotency=Idempotency(key, json.dumps(body)) if key else None,
        )

    async def told(self, session: str = "s") -> list[str]:
        """The session's history, an item a word or two."""
        page = await self.sessions.page(DEFAULT_TENANT, session, after=0, limit=10_000)
        return [shown(one.item) for one in page.data]


def shown(item: Any) -> str:
    content = item.get("content")
    if isinstance(content, list):
        content = content[0]["text"]
    return f"{item['role']}: {content}" if content is not None else str(item["type"])


class Gate:
    """Lets whoever comes wait until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.open.wait()

    async def wait_reached(self) -> None:
        with anyio.fail_after(20):
            await self.reached.wait()


def acting(gate: Gate) -> Stage:
    """An agent that calls a tool, which waits at ``gate``, and repeats then what it was told."""

    @function_tool
    async def act() -> str:
        """Act."""
        await gate()
        return "acted"

    def rule(instructions: str, items: list[Any]) -> Any:
        if not outputs_of(items):
            return [call("act", {}, "c1")]
        return [say("heard " + ", ".join(i["content"] for i in items if i.get("role") == "user"))]

    return Stage(rule, tools=[act])


async def test_a_message_is_delivered_at_the_next_turn_and_stands_there_for_good(url: str) -> None:
    gate = Gate()
    stage = acting(gate)
    async with stage.open(url) as runs:
        first = (await stage.say("one")).run
        await gate.wait_reached()
        second = await stage.say("two")
        third = await stage.say("three", input=[{"role": "user", "content": "three"}])
        assert second.run.id == third.run.id == first.id and not second.replayed
        assert second.steered is not None and second.run.status is RunStatus.RUNNING
        gate.open.set()
        run = await finished(runs, first)
        assert run.output == "heard one, two, three"
        asked = stage.model.asked[-1][1]
        assert [shown(item) for item in asked[1:]] == [
            "function_call",
            "function_call_output",
            "user: two",
            "user: three",
        ]
        assert await stage.told() == [*map(shown, asked), "assistant: heard one, two, three"]
        types = await event_types(runs, run)
        assert types.count("run.steered") == 2 and types.count("run.created") == 1
        after = (await stage.say("four")).run
        assert after.id != first.id
        assert (await finished(runs, after)).output == "heard one, two, three, four"


async def test_a_message_during_the_last_answer_is_answered_by_the_same_run(url: str) -> None:
    gate = Gate()

    async def rule(instructions: str, items: list[Any]) -> Any:
        if items[-1]["content"] == "one":
            await gate()
        return [say(f"re {items[-1]['content']}")]

    stage = Stage(rule)
    async with stage.open(url) as runs:
        first = (await stage.say("one")).run
        await gate.wait_reached()
        assert (await stage.say("two")).run.id == first.id
        gate.open.set()
        assert (await finished(runs, first)).output == "re two"
        assert await stage.told() == [
            "user: one",
            "assistant: re one",
            "user: two",
            "assistant: re two",
        ]


async def test_a_run_that_would_end_goes_on_with_what_came_in_the_last_moment(url: str) -> None:
    gate = Gate()
    stage = Stage(lambda instructions, items: [say(f"re {items[-1]['content']}")])

    async def wait_once(ctx: TaskContext) -> None:
        await gate()

    stage.before_end = wait_once
    async with stage.open(url) as runs:
        first = (await stage.say("one")).run
        await gate.wait_reached()
        assert (await stage.say("two")).run.id == first.id
        gate.open.set()
        run = await finished(runs, first)
        assert run.output == "re two" and run.usage.model_calls == len(stage.model.asked) == 2
        assert (await stage.told())[-2:] == ["user: two", "assistant: re two"]
        types = await event_types(runs, run)
        assert types.count("run.started") == types.count("run.steered") == 1


@pytest.mark.parametrize(
    "rounds", [12, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
async def test_messages_that_race_with_the_end_of_runs_are_all_answered_once(
    url: str, rounds: int
) -> None:
    stage = Stage(lambda instructions, items: [say(f"re {items[-1]['content']}")])
    chance = random.Random(7)

    async def later(text: str) -> Submitted:
        for _ in range(chance.randrange(60)):
            await asyncio.sleep(0)  # at another point of the race
        return await stage.say(text)

    async with stage.open(url) as runs:
        made: list[Submitted] = []
        for number in range(rounds):
            made.append(await stage.say(f"{number}"))
            made += await asyncio.gather(*(later(f"{number}-{n}") for n in range(3)))
        for one in made:
            assert (await finished(runs, one.run)).status is RunStatus.SUCCEEDED
        said = [text for text in await stage.told() if text.startswith("user: ")]
        wanted = [f"{n}{more}" for n in range(rounds) for more in ("", "-0", "-1", "-2")]
        assert sorted(said) == sorted(f"user: {text}" for text in wanted)
        if rounds > 100:  # else by chance there are none of one kind
            assert {one.steered is None for one in made} == {True, False}


async def test_what_a_failed_run_did_not_hear_becomes_a_run_and_a_cancelled_one_takes_it_along(
    url: str,
) -> None:
    gate = Gate()

    async def rule(instructions: str, items: list[Any]) -> Any:
        if items[-1]["content"] in ("fail", "cancel"):
            await gate()
            raise ValueError("no")
        return [say(f"re {items[-1]['content']}")]

    stage = Stage(rule)
    async with stage.open(url) as runs:
        failing = (await stage.say("fail")).run
        await gate.wait_reached()
        assert (await stage.say("kept", metadata={"n": 1})).run.id == failing.id
        gate.open.set()
        assert (await finished(runs, failing)).status is RunStatus.FAILED
        page = await runs.list(DEFAULT_TENANT, filters=FILTERS, limit=10, cursor=None)
        [kept] = [run for run in page.data if run.id != failing.id]
        kept = await finished(runs, kept)
        assert (kept.input, kept.output, kept.metadata) == ("kept", "re kept", {"n": 1})

        gate.open.clear()
        gate.reached.clear()
        stopped = (await stage.say("cancel")).run
        await gate.wait_reached()
        assert (await stage.say("dropped")).run.id == stopped.id
        await runs.cancel(DEFAULT_TENANT, stopped.id)
        page = await runs.list(DEFAULT_TENANT, filters=FILTERS, limit=10, cursor=None)
        assert {run.id for run in page.data} == {failing.id, kept.id, stopped.id}


async def test_a_key_delivers_once_and_other_tenants_agents_and_kinds_are_told_apart(
    url: str,
) -> None:
    gate = Gate()
    stage = acting(gate)
    async with stage.open(url) as runs:
        first = (await stage.say("one", subject="bo")).run
        await gate.wait_reached()
        said = await asyncio.gather(*(stage.say("two", key="k") for _ in range(5)))
        assert {one.run.id for one in said} == {first.id}
        assert sorted(one.replayed for one in said) == [False, True, True, True, True]
        assert all(one.steered == said[0].steered is not None for one in said)
        with pytest.raises(IdempotencyMismatch):
            await stage.say("three", key="k")
        for wrong in ({"agent": "other"}, {"subject": "cy"}):
            with pytest.raises(NotSteerable):
                await stage.say("no", **wrong)
        elsewhere = await stage.say("mine", tenant=SECOND)
        assert elsewhere.run.id != first.id and elsewhere.steered is None
        gate.open.set()
        assert (await finished(runs, first)).output == "heard one, two"
        busy = await submit(runs, goal="g", session_id="s")
        with pytest.raises(NotSteerable, match="goal"):
            await stage.say("no")
        await runs.cancel(DEFAULT_TENANT, busy.id)


@pytest.mark.parametrize("wrong", [{"goal": "g"}, {"start_after": "2030-01-01T00:00:00Z"}])
def test_only_an_agent_is_spoken_to_and_at_once(wrong: dict[str, Any]) -> None:
    body = {"agent": "a", "input": "x"} | wrong if "goal" not in wrong else wrong
    with pytest.raises(ValueError, match="steer"):
        RunRequest(session_id="s", on_busy="steer", **body)


async def test_input_guardrails_look_at_what_is_said_into_the_run(url: str) -> None:
    @input_guardrail
    async def no_secrets(
        context: RunContextWrapper[Any], agent: Agent[Any], given: str | list[Any]
    ) -> GuardrailFunctionOutput:
        found = "password" in json.dumps(given)
        return GuardrailFunctionOutput(output_info="secret", tripwire_triggered=found)

    gate = Gate()
    stage = acting(gate)
    stage.agent.input_guardrails = [no_secrets]
    async with stage.open(url) as runs:
        first = (await stage.say("one")).run
        await gate.wait_reached()
        await stage.say("the password is x")
        gate.open.set()
        run = await finished(runs, first)
        assert run.error is not None and run.error.code == "guardrail_tripped"
        assert len(stage.model.asked) == 1


async def test_a_message_that_was_taken_is_not_taken_again_after_the_worker_let_go(
    url: str,
) -> None:
    gate, late = Gate(), Gate()
    stage = acting(gate)
    plain = stage.model.rule

    async def rule(instructions: str, items: list[Any]) -> Any:
        if outputs_of(items):
            await late()
        return plain(instructions, items)

    stage.model.rule = rule
    async with stage.open(url):
        first = (await stage.say("one")).run
        await gate.wait_reached()
        await stage.say("two")
        gate.open.set()
        await late.wait_reached()
        await stage.say("three")
    late.open.set()
    async with stage.open(url) as runs:
        run = await finished(runs, first)
        assert (await stage.told()).count("user: two") == 1
        assert run.output == "heard one, two, three"
        assert (await event_types(runs, run)).count("run.steered") == 2


async def test_a_message_reaches_a_run_that_another_process_carries_out(postgres_url: str) -> None:
    gate = Gate()
    stage = acting(gate)
    async with stage.open(postgres_url, role="api") as api:
        sessions = stage.sessions
        async with stage.open(postgres_url, role="worker"):
            stage.runs = api
            first = (await stage.say("one")).run
            await gate.wait_reached()
            assert (await stage.say("two")).run.id == first.id
            gate.open.set()
            assert (await finished(api, first)).output == "heard one, two"
        stage.sessions = sessions
        assert (await stage.told()).count("user: two") == 1
