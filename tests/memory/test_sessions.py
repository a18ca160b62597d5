"""A session as one run sees it."""

from typing import Any

import pytest
from agents import Agent, function_tool
from agents.memory import Session

from agent_server.domain.errors import ModelError
from agent_server.memory.sessions import StagedSession, complete
from agent_server.testing.journal import memory_context
from tests.support.durable import call, loop_for, outputs_of, say


class Committed:
    """A store in memory; ``commit`` is what the engine does in a run's last transaction."""

    def __init__(self) -> None:
        self.kept: dict[str, list[dict[str, Any]]] = {}

    async def items(self, session_id: str) -> list[dict[str, Any]]:
        return list(self.kept.get(session_id, []))

    def commit(self, session_id: str, items: list[dict[str, Any]]) -> None:
        self.kept.setdefault(session_id, []).extend(items)


USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c", "name": "n", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "o"}


async def test_a_session_is_one_to_the_sdk() -> None:
    session = StagedSession(Committed(), "s")
    assert isinstance(session, Session)


async def test_what_a_run_adds_is_seen_by_it_and_by_nobody_else() -> None:
    store = Committed()
    store.commit("s", [USER])
    session = StagedSession(store, "s")
    await session.add_items([CALL, OUTPUT])
    assert await session.get_items() == [USER, CALL, OUTPUT]
    assert await session.get_items(limit=2) == [CALL, OUTPUT]
    assert await session.get_items(limit=0) == []
    assert session.staged() == [CALL, OUTPUT]
    assert store.kept == {"s": [USER]}


async def test_taking_back_reaches_only_what_the_run_added() -> None:
    store = Committed()
    store.commit("s", [USER])
    session = StagedSession(store, "s")
    assert await session.pop_item() is None
    await session.add_items([CALL])
    assert await session.pop_item() == CALL
    await session.add_items([CALL])
    await session.clear_session()
    assert await session.get_items() == [USER]


@pytest.mark.parametrize(
    ("items", "kept"),
    [
        ([USER, CALL, OUTPUT], [USER, CALL, OUTPUT]),
        ([USER, CALL], [USER]),
        ([OUTPUT, USER], [USER]),
        ([{"type": "reasoning", "id": "r"}], [{"type": "reasoning", "id": "r"}]),
    ],
)
def test_a_call_is_kept_only_together_with_its_output(items: Any, kept: Any) -> None:
    assert complete(items) == kept


async def test_each_turn_of_a_session_hears_those_before_it() -> None:
    store = Committed()

    @function_tool
    def ping() -> str:
        return "pong"

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        last = items[-1]
        if last.get("type") == "function_call_output":
            text = f"{len(items)} items, {len(outputs_of(items))} outputs"
            return [say(text, item_id=f"msg_{len(items)}")]
        return [call("ping", {}, f"c{len(items)}")]

    loop, model = loop_for(rule, open_session=lambda ctx, sid: StagedSession(store, sid))
    agent = Agent(name="a", tools=[ping])
    answers = []
    for turn in range(3):
        ctx, journal = memory_context()
        result = await loop.run(ctx, agent, f"turn {turn}", session_id="s")
        store.commit("s", result.session_items)
        answers.append(result.output)
        first = next(step for step in journal.writes if step.kind == "model")
        assert [item["content"] for item in first.input["items"]] == [f"turn {turn}"]
        assert first.input["prefix"]["items"] == 4 * turn
    assert answers == ["3 items, 1 outputs", "7 items, 2 outputs", "11 items, 3 outputs"]


async def test_a_replayed_turn_of_a_session_asks_nothing_again() -> None:
    store = Committed()
    store.commit("s", [USER, {"role": "assistant", "content": "hello"}])
    loop, model = loop_for(
        lambda i, items: [say(f"after {len(items)}")],
        open_session=lambda ctx, sid: StagedSession(store, sid),
    )
    ctx, journal = memory_context()
    first = await loop.run(ctx, Agent(name="a"), "more", session_id="s")
    ctx, _ = memory_context(recorded=journal.writes)
    again = await loop.run(ctx, Agent(name="a"), "more", session_id="s")
    assert len(model.asked) == 1
    assert again.session_items == first.session_items


async def test_a_run_that_fails_leaves_the_session_as_it_was() -> None:
    store = Committed()
    sessions: list[StagedSession] = []

    def open_session(ctx: Any, session_id: str) -> StagedSession:
        sessions.append(StagedSession(store, session_id))
        return sessions[-1]

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        raise ModelError("no")

    loop, _ = loop_for(rule, open_session=open_session)
    ctx, _ = memory_context()
    with pytest.raises(ModelError):
        await loop.run(ctx, Agent(name="a"), "hi", session_id="s")
    assert sessions[0].staged() == []
