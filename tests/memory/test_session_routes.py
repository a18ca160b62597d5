"""Sessions through the API: listed, read word for word, branched and deleted."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent_server.domain.errors import Conflict
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from tests.memory.kit import home
from tests.support.durable import say

PLAIN = "from agents import Agent\nclerk = Agent(name='Clerk')\n"


async def test_sessions_are_listed_and_their_items_read_word_for_word(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path, agents=PLAIN) as server:
        for number in range(3):
            await server.run(f"hello {number}", session_id=f"talk/{number}")
        await server.run("and again", session_id="talk/0")
        pages = [await server.call("GET", "/sessions", limit=2)]
        pages.append(await server.call("GET", "/sessions", cursor=pages[0]["next_cursor"]))
        listed = [session for page in pages for session in page["data"]]
        assert [session["id"] for session in listed] == ["talk/2", "talk/1", "talk/0"]
        assert listed[2]["item_count"] == 4
        assert await server.call("GET", "/sessions/talk%2F0") == listed[2]
        first = await server.call("GET", "/sessions/talk%2F0/items", limit=3)
        rest = await server.call("GET", "/sessions/talk%2F0/items", cursor=first["next_cursor"])
        items = first["data"] + rest["data"]
        assert [item["position"] for item in items] == [0, 1, 2, 3]
        assert items[2]["item"] == {"role": "user", "content": "and again"}
        assert rest["next_cursor"] is None


async def test_a_deleted_session_is_gone_and_another_tenants_never_was(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path, agents=PLAIN) as server:
        await server.run("hello", session_id="s")
        sessions = server.parts.sessions
        assert (await sessions.list(Tenant("other"), limit=9, cursor=None)).data == []
        gone = await server.call("DELETE", "/sessions/s")
        assert (gone["id"], gone["items"]) == ("s", 2)
        for path in ("/sessions/s", "/sessions/s/items", "/sessions/never"):
            assert (await server.call("GET", path, status=404))["code"] == "not_found"
        assert (await server.call("DELETE", "/sessions/s", status=404))["hint"]
        assert await sessions.of(DEFAULT_TENANT).items("s") == []


async def test_a_session_that_a_run_works_on_is_not_deleted_under_it(
    url: str, tmp_path: Path
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: str, items: list[Any]) -> list[Any]:
        reached.set()
        await go_on.wait()
        return [say("ok")]

    async with home(url, tmp_path, agents=PLAIN, rule=wait) as server:
        go_on.set()
        await server.run("hello", session_id="s")
        go_on.clear()
        reached.clear()
        run = await server.client.runs.create(agent="clerk", input="more", session_id="s")
        await asyncio.wait_for(reached.wait(), 10)
        problem = await server.call("DELETE", "/sessions/s", status=409)
        assert problem["code"] == "conflict" and "works on" in problem["detail"]
        go_on.set()
        await server.client.runs.wait(run.id, timeout_s=20)
        assert (await server.call("DELETE", "/sessions/s"))["items"] == 4


async def test_a_branch_begins_as_its_session_did_before_the_forked_run(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path, agents=PLAIN) as server:
        await server.run("one", session_id="s")
        second = await server.run("two", session_id="s")
        await server.run("three", session_id="s")
        sessions = server.parts.sessions
        branch = await sessions.branch(DEFAULT_TENANT, "s", "b", before_run=second["id"])
        assert branch.item_count == 2
        whole = await sessions.branch(DEFAULT_TENANT, "s", "w")
        assert whole.item_count == 6
        await server.run("other way", session_id="b")
        history = await sessions.of(DEFAULT_TENANT).items("b")
        assert [i["content"] for i in history if i["role"] == "user"] == ["one", "other way"]
        assert (await server.call("GET", "/sessions/s"))["item_count"] == 6
        with pytest.raises(Conflict):
            await sessions.branch(DEFAULT_TENANT, "s", "b")


async def test_settings_shorten_what_a_model_is_shown_and_not_what_is_kept(
    url: str, tmp_path: Path
) -> None:
    def rule(instructions: str, items: list[Any]) -> list[Any]:
        return [say("the minutes" if "minutes" in instructions else "ok")]

    knobs = {"session_max_items": 4, "session_summaries": True}
    async with home(url, tmp_path, agents=PLAIN, rule=rule, **knobs) as server:
        for number in range(4):
            await server.run(f"hello {number}", session_id="s")
        shown = server.model.asked[-1][1]
        assert "the minutes" in shown[0]["content"]
        assert [item["content"] for item in shown[1:] if item["role"] == "user"] == [
            "hello 2",
            "hello 3",
        ]
        session = await server.call("GET", "/sessions/s")
        assert (session["item_count"], session["summarised_items"]) == (8, 4)
        assert session["summary"] == "the minutes"
