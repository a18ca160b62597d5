"""A long conversation is shown in part, and kept whole."""

from typing import Any

import pytest
from agents import Agent
from hypothesis import given
from hypothesis import strategies as st

from agent_server.execution.ports import TaskContext
from agent_server.memory.items import CALLS, is_output
from agent_server.memory.session_store import Summary
from agent_server.memory.sessions import StagedSession
from agent_server.memory.trimming import Trimming, Window, cut_point
from agent_server.testing.journal import memory_context, prefixes
from tests.support.durable import loop_for, say

Item = dict[str, Any]


def user(text: str) -> Item:
    return {"role": "user", "content": text}


def call(number: int) -> list[Item]:
    return [
        {"type": "function_call", "call_id": f"c{number}", "name": "n", "arguments": "{}"},
        {"type": "function_call_output", "call_id": f"c{number}", "output": "o" * number},
    ]


TURN = st.one_of(
    st.text(max_size=30).map(lambda text: [user(text)]),
    st.text(max_size=30).map(lambda text: [{"role": "assistant", "content": text}]),
    st.integers(0, 9).map(lambda n: [{"type": "reasoning", "id": str(n)}, *call(n)]),
    st.tuples(st.integers(10, 14), st.integers(15, 19)).map(
        lambda pair: [call(pair[0])[0], call(pair[1])[0], call(pair[0])[1], call(pair[1])[1]]
    ),
)


@given(st.lists(TURN, max_size=12), st.integers(1, 30), st.integers(1, 400))
def test_a_call_is_never_shown_without_its_output_nor_an_output_without_its_call(
    turns: list[list[Item]], count: int, tokens: int
) -> None:
    items = [item for turn in turns for item in turn]
    window = Window(count, tokens)
    shown = items[cut_point(items, window) :]
    assert cut_point(shown, window) == 0
    calls = [item["call_id"] for item in shown if item.get("type") in CALLS]
    outputs = [item["call_id"] for item in shown if is_output(item)]
    assert sorted(calls) == sorted(outputs)


def test_the_rest_begins_with_the_user_where_it_can() -> None:
    items = [user("a"), *call(1), {"role": "assistant", "content": "b"}, user("c"), *call(2)]
    assert cut_point(items, Window(max_items=10)) == 0
    assert cut_point(items, Window(max_items=5)) == 4
    assert cut_point(items, Window(max_items=2)) == 5


class Kept:
    """A session's store in memory."""

    def __init__(self, items: list[Item]) -> None:
        self.kept = items
        self.told: Summary | None = None

    async def items(self, session_id: str) -> list[Item]:
        return list(self.kept)

    async def summary(self, session_id: str) -> Summary | None:
        return self.told

    async def keep_summary(self, session_id: str, summary: Summary, *, fence: Any = None) -> None:
        self.told = summary


def long_talk() -> list[Item]:
    return [item for n in range(8) for item in (user(f"q{n}"), *call(n))]


def open_with(store: Kept, trimming: Trimming) -> Any:
    def opened(ctx: TaskContext, session_id: str) -> StagedSession:
        async def shorten(items: list[Item]) -> list[Item] | None:
            return await trimming.shown(ctx, store, session_id, items)

        return StagedSession(store, session_id, shorten=shorten)

    return opened


async def test_a_model_is_shown_the_newest_turns_and_the_session_keeps_all() -> None:
    store = Kept(long_talk())
    trimming = Trimming(Window(max_items=7))
    loop, model = loop_for(lambda _, items: [say("ok")], open_session=open_with(store, trimming))
    ctx, _ = memory_context()
    result = await loop.run(ctx, Agent(name="a"), "next", session_id="s")
    assert model.asked[0][1] == [*long_talk()[-6:], user("next")]
    assert [item.get("role") for item in result.session_items] == ["user", "assistant"]
    assert store.kept == long_talk()


@pytest.mark.parametrize("later", [Window(), Window(max_items=3), Window(max_items=7)])
async def test_a_replay_is_shown_the_same_whatever_the_settings_say_by_then(later: Window) -> None:
    asked: list[list[Item]] = []

    def rule(_: str, items: list[Item]) -> list[Any]:
        asked.append(items)
        return [say("ok")]

    store = Kept(long_talk())
    first = Trimming(Window(max_items=7))
    loop, _ = loop_for(rule, open_session=open_with(store, first))
    ctx, journal = memory_context()
    await loop.run(ctx, Agent(name="a"), "next", session_id="s")
    for held in prefixes(journal.writes)[1:]:
        loop, _ = loop_for(rule, open_session=open_with(store, Trimming(later)))
        ctx, _ = memory_context(recorded=held)
        await loop.run(ctx, Agent(name="a"), "next", session_id="s")
    assert all(items == asked[0] for items in asked)


async def test_what_came_before_is_told_once_and_told_on_when_it_grows() -> None:
    told: list[str] = []

    async def summarise(ctx: TaskContext, text: str) -> str:
        told.append(text)
        return f"summary {len(told)}"

    store = Kept(long_talk())
    trimming = Trimming(Window(max_items=7), summarise)

    async def shown() -> list[Item]:
        ctx, _ = memory_context()
        found = await trimming.shown(ctx, store, "s", store.kept)
        assert found is not None
        return found

    first = await shown()
    assert first[1:] == long_talk()[-3:]
    assert "summary 1" in first[0]["content"] and "not an instruction" in first[0]["content"]
    assert "user: q0" in told[0] and "tool output: o" in told[0] and "q7" not in told[0]
    store.kept += [user("more"), *call(3)]
    assert [item.get("content") for item in await shown() if item.get("role")][1:] == ["q7", "more"]
    assert len(told) == 1
    store.kept += [user("and more"), *call(3)]
    assert "summary 2" in (await shown())[0]["content"]
    assert "summary 1" in told[1] and "q7" in told[1] and "q6" not in told[1]
