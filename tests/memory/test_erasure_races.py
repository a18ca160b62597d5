"""A person is erased while others read what is known of them: nobody keeps a word of it.

Each test lets the erasure happen at the very place: between what a run reads and what it stores.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import pytest
from sqlalchemy.util import await_only

from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.execution import store as execution
from agent_server.memory.session_store import Summary, TenantSessions
from tests.memory.kit import Home, home
from tests.memory.test_erasure import SECRET, files_with, told
from tests.memory.test_experience import GOAL, consolidates, plans
from tests.memory.test_tools import script
from tests.support.durable import say
from tests.support.until import until

ASK = ("recall", {"query": "Where does Ada live?"})
DOCUMENTS = ("search_documents", {"query": "Where does Ada live?"})
WORKFLOW = {
    "name": "asks",
    "nodes": [{"id": "ask", "type": "tool", "tool": ASK[0], "arguments": ASK[1]}],
    "output": "{{ nodes.ask.output }}",
}


async def knows(server: Home, content: Any = f"Ada lives in {SECRET}.", **more: Any) -> Any:
    body = {"kind": "knowledge", "content": content, "subject": "ada", **more}
    return await server.call("POST", "/memories", body, status=201)


class Once:
    """Erases Ada the first time that it is called; her runs are told to stop too late."""

    def __init__(self, server: Home) -> None:
        self._server = server
        self._erasing: asyncio.Task[object] | None = None
        server.parts.erasure._cancel = self._stop

    async def _stop(self, *order: object) -> None:
        return None

    async def __call__(self) -> None:
        if self._erasing is None:
            erase = self._server.parts.erasure.erase(DEFAULT_TENANT, "ada")
            self._erasing = asyncio.create_task(erase)
        while not self._erasing.done():
            try:
                await asyncio.shield(self._erasing)
            except asyncio.CancelledError:
                pass  # It is the run's own: whoever erases is another.


async def nothing_is_left(server: Home, folder: Path) -> None:
    assert await told(server) == set()
    if server.parts.database.dialect == "sqlite":
        assert files_with(folder / "data", SECRET) == []


@pytest.mark.parametrize("way", ["recall", "search_documents", "workflow", "planner"])
@pytest.mark.parametrize("when", ["found", "noted"])
async def test_what_a_run_found_and_has_not_stored_yet_goes_with_the_person(
    url: str, tmp_path: Path, way: str, when: str
) -> None:
    """Erased before the run is noted as one that uses it: the run is told nothing of it, and goes
    on. Erased behind that, and before its step is stored: the run is found, and goes."""
    fields: dict[str, Any] = {}
    rule = script(DOCUMENTS if way == "search_documents" else ASK)
    if way == "workflow":
        fields = {"workflow": WORKFLOW}
    elif way == "planner":
        rule, fields = plans, {"goal": GOAL}
    async with home(url, tmp_path, rule=rule) as server:
        await knows(server, f"Ada's garden: {GOAL}", subject="bob", kind="knowledge")
        if way == "planner":
            await knows(server, {"goal": GOAL, "outcome": SECRET}, kind="execution")
        else:
            await knows(server, kind="document" if way == "search_documents" else "knowledge")
        store, erase = server.parts.memories, Once(server)
        search, used = store.search_with, store.used
        assert search is not None
        reached = []

        async def searched(*args: Any) -> Any:
            found = await search(*args)
            if any(one.memory.subject == "ada" for one in found):
                reached.append("found")
                await erase()
            return found

        async def noted(*args: Any, **more: Any) -> Any:
            there = await used(*args, **more)
            reached.append("noted")
            await erase()
            return there

        if when == "found":
            store.search_with = searched
        else:
            store.used = noted  # type: ignore[method-assign]
        run = await server.client.runs.create(**(fields or {"agent": "clerk", "input": "hi"}))
        if when == "found":
            ended = await server.client.runs.wait(run.id, timeout_s=20)
            assert ended.status == "succeeded", ended
        else:
            await _gone(server, run.id)
        assert when in reached
        await erase()
        await nothing_is_left(server, tmp_path)


async def _gone(server: Home, run_id: str) -> None:
    """Return when there is no such run any more, and nobody works on it."""

    async def gone() -> bool:
        answer = await server.http.get(f"/api/v1/runs/{run_id}")
        return answer.status_code == 404 and not server.parts.engine.roster.runs

    await until(gone)


async def test_later_runs_of_a_session_that_heard_a_run_which_goes_go_too_and_earlier_ones_stay(
    url: str, tmp_path: Path
) -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        asked = [item["content"] for item in items if item.get("role") == "user"][-1]
        if asked == "Where?":
            return script(ASK)(instructions, items)
        return [say(f"So far: {json.dumps(items)}")]

    async with home(url, tmp_path, rule=rule) as server:
        await knows(server)
        before = await server.run("Hello", session_id="s")
        asks = await server.run("Where?", session_id="s")  # without a subject
        heard = await server.run("Tell me all again", session_id="s")
        await server.parts.sessions.branch(DEFAULT_TENANT, "s", "copy", before_run=heard["id"])
        branch = await server.run("And here?", session_id="copy")
        assert SECRET in heard["output"] and SECRET in branch["output"]
        await server.call("DELETE", "/subjects/ada")
        await nothing_is_left(server, tmp_path)
        for gone in (asks, heard, branch):
            await server.call("GET", f"/runs/{gone['id']}", status=404)
        await server.call("GET", f"/runs/{before['id']}")
        for session in ("s", "copy"):
            items = (await server.call("GET", f"/sessions/{session}/items"))["data"]
            assert {item["run_id"] for item in items} == {before["id"]}


async def test_who_recalled_what_such_a_run_wrote_goes_too(url: str, tmp_path: Path) -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        asked = [item["content"] for item in items if item.get("role") == "user"][-1]
        if asked == "note":
            note = ("remember", {"content": f"The parcel goes to {SECRET}."})
            return script(ASK, note)(instructions, items)
        return script(("recall", {"query": "Where does the parcel go?"}))(instructions, items)

    async with home(url, tmp_path, rule=rule) as server:
        await knows(server)
        wrote = await server.run("note")
        later = await server.run("parcel")
        assert (await server.call("DELETE", "/subjects/ada"))["erased"]["runs"] == 2
        await nothing_is_left(server, tmp_path)
        for gone in (wrote, later):
            await server.call("GET", f"/runs/{gone['id']}", status=404)


async def test_a_summary_of_what_a_person_said_is_not_kept_once_they_are_erased(
    url: str, tmp_path: Path
) -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        if "You keep the minutes" in instructions:
            return [say(f"They spoke of {SECRET}.")]
        asked = [item["content"] for item in items if item.get("role") == "user"][-1]
        return script(ASK)(instructions, items) if asked == "Where?" else [say("ok")]

    knobs = {"session_max_items": 4, "session_summaries": True}
    async with home(url, tmp_path, rule=rule, **knobs) as server:
        await knows(server)
        await server.run("Hello", session_id="s")
        await server.run("Where?", session_id="s")
        erase = Once(server)
        reached: list[str] = []

        class Late(TenantSessions):
            async def keep_summary(self, session_id: str, summary: Summary, **more: Any) -> None:
                assert SECRET in summary.text
                reached.append(session_id)
                await erase()
                await super().keep_summary(session_id, summary, **more)

        server.parts.sessions.of = lambda tenant: Late(  # type: ignore[method-assign]
            server.parts.database, tenant
        )
        run = await server.client.runs.create(agent="clerk", input="And?", session_id="s")
        await _gone(server, run.id)
        assert reached == ["s"]
        await erase()
        await nothing_is_left(server, tmp_path)
        assert (await server.call("GET", "/sessions/s"))["summary"] is None


async def test_a_consolidation_rewords_nothing_with_what_is_erased_meanwhile(
    url: str, tmp_path: Path
) -> None:
    fact = {"content": f"Home is {SECRET}.", "relation": "newer", "of": "home is Oslo"}

    node = {"id": "n", "type": "tool", "tool": "remember"}
    writes = {"name": "writes", "nodes": [node | {"arguments": {"content": "Their home is Oslo."}}]}
    said = f"My home is in {SECRET} since May, and no longer in Oslo."
    rule = consolidates([fact])
    async with home(url, tmp_path, rule=rule, memory_consolidation=True) as server:
        await server.run(workflow=writes)
        store, erase, reached = server.parts.memories, Once(server), asyncio.Event()
        edit = store.edit

        async def late(*args: Any, **more: Any) -> Any:
            await erase()
            try:
                return await edit(*args, **more)
            finally:
                reached.set()

        store.edit = late  # type: ignore[method-assign]
        await server.run(said, subject="ada")
        await asyncio.wait_for(reached.wait(), 20)
        await erase()
        await nothing_is_left(server, tmp_path)
        (held,) = (await server.call("GET", "/memories", replaced="true"))["data"]
        assert held["content"] == "Their home is Oslo."


async def test_a_run_is_not_forked_from_one_that_is_erased_meanwhile(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:
        run = await server.run(f"I live in {SECRET}.", subject="ada")
        runs, erase = server.parts.runs, Once(server)
        submit = runs.submit

        async def late(*args: Any, **more: Any) -> Any:
            await erase()
            return await submit(*args, **more)

        runs.submit = late  # type: ignore[method-assign]
        await server.call("POST", f"/runs/{run['id']}/fork", {}, status=404)
        await erase()
        await nothing_is_left(server, tmp_path)


@pytest.mark.parametrize("what", ["run in a session", "branch", "recall"])
async def test_on_postgresql_who_takes_words_waits_for_an_erasure_that_is_under_way(
    upgraded_postgres_url: str, tmp_path: Path, what: str
) -> None:
    async with home(upgraded_postgres_url, tmp_path, rule=script(ASK)) as server:
        await server.run("Hello", session_id="s")
        await knows(server)
        erasing, go_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        seen: list[Any] = []
        store = server.parts.memories
        erase_subject = store.erase_subject

        def late(connection: Any, *args: Any, **more: Any) -> Any:
            # In the transaction, behind the last look at whom it concerns: it stands still here.
            loop.call_soon_threadsafe(erasing.set)
            await_only(go_on.wait())
            return erase_subject(connection, *args, **more)

        store.erase_subject = late  # type: ignore[method-assign]
        erasure = asyncio.create_task(server.client.memories.erase("ada"))
        await asyncio.wait_for(erasing.wait(), 10)

        async def taken() -> Any:
            if what == "branch":
                return await server.parts.sessions.branch(DEFAULT_TENANT, "s", "copy")
            session = {"session_id": "s"} if what == "run in a session" else {}
            return await server.run("Where?", **session)

        taking = asyncio.create_task(taken())
        connection = await asyncpg.connect(upgraded_postgres_url)
        for _ in range(1_000):
            seen = await connection.fetch(
                "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
                "AND mode = 'ShareLock'"
            )
            if seen or taking.done():
                break
        await connection.close()
        assert seen and not taking.done()
        other = Tenant("other")
        await server.parts.database.write(lambda c: execution.hold_off(c, other))  # its own
        go_on.set()
        await erasure
        await taking
        await nothing_is_left(server, tmp_path)
