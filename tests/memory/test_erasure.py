"""A person is erased: no row, no index and no page of the file holds a word of them."""

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import pytest
from sqlalchemy import Connection, inspect, select, text

from agent_server.domain.base import utcnow
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.execution import store as execution
from agent_server.memory.session_store import append_items
from agent_server.storage.tables import metadata
from tests.memory.kit import Home, home
from tests.memory.test_experience import consolidated, consolidates
from tests.memory.test_tools import script
from tests.support.durable import say
from tests.support.postgres import PostgresServer

SECRET = "zanzibarquux"
LEARN = ("remember", {"content": f"Ada lives in {SECRET}.", "key": "ada/home"})
RECALL = ("recall", {"query": f"where does Ada live? {SECRET}"})


def rows_with(connection: Connection, word: str) -> Iterator[str]:
    """Where in the database ``word`` stands, virtual tables and indexes of text included."""
    for table in inspect(connection).get_table_names():
        for row in connection.execute(text(f'SELECT * FROM "{table}"')).mappings():
            for column, value in row.items():
                held = value.decode("latin-1") if isinstance(value, bytes) else str(value)
                if word in held.lower():
                    yield f"{table}.{column}"


def files_with(folder: Path, word: str) -> list[str]:
    """The files of the database that hold ``word``, in whatever page."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and word.encode() in path.read_bytes().lower()
    ]


async def told(server: Home, word: str = SECRET) -> set[str]:
    return set(await server.parts.database.read(lambda c: list(rows_with(c, word))))


async def test_nothing_of_a_person_is_left_in_any_table_index_or_page_of_the_file(
    url: str, tmp_path: Path
) -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        spoken = [item["content"] for item in items if item.get("role") == "user"]
        plain = spoken[-1] == "Nothing of that"
        return [say("ok")] if plain else script(LEARN, RECALL)(instructions, items)

    async with home(url, tmp_path, rule=rule) as server:
        await server.run(f"I live in {SECRET}.", subject="ada", session_id="first")
        await server.run("And where do I live?", session_id="first")  # without a subject
        body = {"kind": "knowledge", "content": f"Ada moved to {SECRET}.", "subject": "ada"}
        written = await server.call("POST", "/memories", body, status=201)
        await server.call("PATCH", f"/memories/{written['id']}", {"content": f"Ada left {SECRET}."})
        other = await server.run("Who lives where?", session_id="other")  # recalls it
        kept = await server.run("Nothing of that", session_id="kept", subject="bob")
        assert {"memories.content", "steps.output", "events.data", "session_items.data"} <= (
            await told(server)
        )
        receipt = await server.call("DELETE", "/subjects/ada")
        assert receipt["subject"] == "ada"
        assert receipt["erased"]["runs"] >= 3 and receipt["erased"]["memories"] >= 2
        assert await told(server) == set()
        if url.startswith("sqlite"):
            assert receipt["files"] == "overwritten"
            assert files_with(tmp_path / "data", SECRET) == []
        await server.call("GET", f"/runs/{other['id']}", status=404)
        await server.call("GET", f"/runs/{kept['id']}")
        assert [s["id"] for s in (await server.call("GET", "/sessions"))["data"]] == ["kept"]
        assert (await server.call("DELETE", "/subjects/ada"))["erased"] == {}


@pytest.mark.parametrize("kept", ["database", "folder"])
async def test_nothing_of_a_person_is_left_where_large_values_are_kept(
    url: str, tmp_path: Path, kept: str
) -> None:
    place = "database" if kept == "database" else f"file://{tmp_path}/data/blobs"
    essay = f"Ada wrote: {SECRET} " * 8_000

    async with home(url, tmp_path, blobs=place, max_body_bytes=4_000_000) as server:
        theirs = await server.run(essay, subject="ada")
        shared = await server.run("y" * 200_000, subject="ada")
        same = await server.run("y" * 200_000, subject="bob")
        assert "blob_bytes.data" in await told(server) or files_with(tmp_path / "data", SECRET)
        receipt = await server.call("DELETE", "/subjects/ada")
        assert receipt["erased"]["blobs"] >= 1
        assert await told(server) == set()
        if url.startswith("sqlite"):
            assert files_with(tmp_path / "data", SECRET) == []
        for gone in (theirs, shared):
            await server.call("GET", f"/runs/{gone['id']}", status=404)
        other = await server.call("GET", f"/runs/{same['id']}")
        assert other["input"] == "y" * 200_000


async def test_a_run_about_a_person_who_is_erased_stops_and_stores_nothing_more(
    url: str, tmp_path: Path
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: str, items: list[Any]) -> list[Any]:
        reached.set()
        try:
            await go_on.wait()
        except asyncio.CancelledError:
            await asyncio.shield(go_on.wait())  # one that does not let itself be stopped
        return [say(SECRET)]

    async with home(url, tmp_path, rule=wait) as server:
        run = await server.client.runs.create(
            agent="clerk", input=SECRET, subject="ada", session_id="s", budget={"max_tokens": 10**6}
        )
        await asyncio.wait_for(reached.wait(), 10)
        assert "reservations.run_id" in await told(server, run.id)
        erasing = asyncio.create_task(server.client.memories.erase("ada"))
        await asyncio.wait({erasing}, timeout=0.2)
        go_on.set()
        assert (await erasing).erased["runs"] == 1
        await server.call("GET", f"/runs/{run.id}", status=404)
        assert await told(server) == await told(server, run.id) == set()


async def test_what_a_call_that_was_never_heard_of_again_holds_of_a_budget_goes_with_its_run(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:
        hers = await server.run(SECRET, subject="ada")
        other = await server.run("hello", subject="bob")
        held = {"key": "1/model/1", "task_path": "1", "epoch": 1, "kind": "model", "tokens": 9}
        held |= {"model_calls": 1, "tool_calls": 0, "cost_pico": 0, "under_way": False}
        held |= {"open_ended": False}
        for run in (hers, other):
            values = {**held, "run_id": run["id"]}
            await server.parts.database.write(lambda c, v=values: execution.reserve(c, v))
        at_another = await server.parts.database.write(
            lambda c: execution.erase_runs(c, "another", [hers["id"], other["id"]])
        )
        assert not any(at_another.values()), "a run's id is nothing to another tenant"
        receipt = await server.call("DELETE", "/subjects/ada")
        assert receipt["erased"]["reservations"] == 1
        assert await told(server, hers["id"]) == set()
        assert "reservations.run_id" in await told(server, other["id"])
        await server.parts.runs.delete(DEFAULT_TENANT, other["id"])
        assert await told(server, other["id"]) == set()


async def test_a_run_that_recalls_a_person_while_they_are_being_erased_goes_too(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path, rule=script(RECALL)) as server:
        body = {"kind": "knowledge", "content": f"Ada lives in {SECRET}.", "subject": "ada"}
        await server.call("POST", "/memories", body, status=201)
        await server.run("Where do I live?", subject="ada")
        stop = server.parts.erasure._cancel

        async def stop_late(tenant: Tenant, run_id: str, reason: str) -> object:
            await server.run("Who lives where?", session_id="other")
            return await stop(tenant, run_id, reason)

        server.parts.erasure._cancel = stop_late
        assert (await server.call("DELETE", "/subjects/ada"))["erased"]["runs"] == 2
        assert await told(server) == set()


async def test_what_was_made_of_a_persons_runs_goes_with_them(url: str, tmp_path: Path) -> None:
    """A run of their session that names no subject, its fork, and what both are consolidated by."""
    said = f"I live in {SECRET}, and have lived there since May with my dog Rex."
    fact = {"content": f"Home is {SECRET}.", "relation": "new", "key": "home"}
    async with home(url, tmp_path, rule=consolidates([fact]), memory_consolidation=True) as server:
        await server.run(
            "Hello, it is me, and we have much to talk about.", subject="ada", session_id="s"
        )
        run = await server.run(said, session_id="s")
        fork = await server.client.runs.fork(run["id"], input=f"And where is {SECRET}?")
        await server.client.runs.wait(fork.id, timeout_s=20)
        await consolidated(server, run["id"])
        assert {"steps.output", "memories.content"} <= await told(server)
        await server.call("DELETE", "/subjects/ada")
        assert await told(server) == set()
        assert (await server.call("GET", "/memories"))["data"] == []


async def test_subjects_with_any_name_are_erased(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        for subject in ("ada@example.com", "users/42", "Zoë 🙂", "items"):
            body = {"kind": "knowledge", "content": "x", "subject": subject}
            await server.call("POST", "/memories", body, status=201)
            receipt = await server.client.memories.erase(subject)
            assert (receipt.subject, receipt.erased["memories"]) == (subject, 1)


@pytest.mark.parametrize("kind", ["memory", "session"])
async def test_what_is_deleted_is_in_no_page_of_the_file(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path}/data/server.db"
    async with home(url, tmp_path) as server:
        if kind == "memory":
            many = [
                {"kind": "knowledge", "content": f"{SECRET}{n} " + "lorem ipsum " * (n * 7 % 90)}
                for n in range(300)
            ]
            written = await server.call("POST", "/memories", {"memories": many}, status=201)
            assert files_with(tmp_path / "data", SECRET)
            for memory in written["data"]:
                await server.parts.memories.delete(DEFAULT_TENANT, [memory["id"]])
        else:
            sessions = server.parts.sessions
            await server.parts.database.write(lambda c: _say(c, SECRET))
            assert files_with(tmp_path / "data", SECRET)
            await sessions.delete(DEFAULT_TENANT, "s")
        assert files_with(tmp_path / "data", SECRET) == []


def _say(connection: Connection, word: str) -> None:
    items = [{"role": "user", "content": word}]
    append_items(connection, DEFAULT_TENANT, "s", "run_0", items, utcnow())


async def test_a_person_of_the_same_name_at_another_tenant_is_left_as_they_are(
    url: str, tmp_path: Path
) -> None:
    """Both tenants use the same names for everything, and the same ids where they may choose."""
    keys = {name: {"tenant": name, "key": f"key-of-{name}"} for name in ("one", "two")}
    fact = {"kind": "knowledge", "key": "home", "subject": "ada", "session_id": "s"}
    guide = {"kind": "document", "subject": "ada", "id": f"mem_{'b' * 32}"}

    async with home(
        url, tmp_path, rule=script(LEARN, RECALL), tenant_keys=keys, max_body_bytes=4_000_000
    ) as server:

        async def call(tenant: str, method: str, path: str, body: Any = None) -> Any:
            once = sha256(repr(body).encode()).hexdigest()
            key = {"authorization": f"Bearer key-of-{tenant}", "idempotency-key": once}
            answer = await server.http.request(method, f"/api/v1{path}", json=body, headers=key)
            assert answer.status_code < 300, answer.text
            return answer.text if "export" in path else answer.json()

        async def rows(tenant: str) -> dict[str, list[tuple[Any, ...]]]:
            return await server.parts.database.read(lambda c: _rows_of(c, tenant))

        for tenant in ("one", "two"):
            for text in (SECRET, f"{SECRET} " * 20_000):
                run = {"agent": "clerk", "input": text, "subject": "ada", "session_id": "s"}
                run = await call(tenant, "POST", "/runs?wait=30", run)
                assert run["status"] == "succeeded", run
            await call(tenant, "POST", "/memories", fact | {"content": f"{tenant} is home"})
            text = f"# {tenant}\n\n" + "It is kept there. " * 500
            await call(tenant, "POST", "/memories", guide | {"content": text})
        before = await rows("two")
        assert {
            "runs", "tasks", "steps", "events", "sessions", "session_items", "memories",
            "memory_uses", "blobs", "blob_uses", "blob_bytes", "idempotency_keys",
        } <= {table for table, found in before.items() if found}  # fmt: skip
        receipt = await call("one", "DELETE", "/subjects/ada")
        assert receipt["erased"]["runs"] == 2 and receipt["erased"]["memories"] >= 2
        assert await rows("two") == before
        left = {table for table, found in (await rows("one")).items() if found}
        assert left <= {"memory_spaces", "idempotency_keys"}
        for path in ("/runs", "/sessions", "/memories", "/memories?subject=ada&replaced=true"):
            assert (await call("one", "GET", path))["data"] == []
            assert (await call("two", "GET", path))["data"]
        assert await call("one", "GET", "/memories/export") == ""
        assert len((await call("two", "GET", "/memories/export")).splitlines()) >= 4
        found = await call("two", "POST", "/memories/search", {"query": "who is home?"})
        assert "two is home" in {one["memory"]["content"] for one in found["data"]}


def _rows_of(connection: Connection, tenant: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of one tenant, by table."""
    asked = {t.name: select(t).where(t.c.tenant == tenant) for t in metadata.sorted_tables
             if "tenant" in t.c}  # fmt: skip
    return {
        name: sorted(map(tuple, connection.execute(query).all()), key=str)
        for name, query in asked.items()
    }


async def test_on_postgresql_a_full_vacuum_takes_the_last_bytes_out_of_its_files(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """As docs/memory.md tells operators: tables and indexes, but for the log."""
    if (files := postgres_server.files) is None:
        pytest.skip("the server of TEST_POSTGRES_URL keeps its files to itself")
    url = postgres_server.fresh_database()
    async with home(url, tmp_path, rule=script(LEARN, RECALL)) as server:
        await server.run(f"I live in {SECRET}.", subject="ada", session_id="first")
        connection = await asyncpg.connect(url)
        own = await connection.fetchval(
            "SELECT oid::text FROM pg_database WHERE datname = current_database()"
        )
        await connection.execute("CHECKPOINT")
        assert files_with(files / "base" / own, SECRET)
        assert (await server.call("DELETE", "/subjects/ada"))["files"] == "left to vacuum"
        await connection.execute("VACUUM FULL")
        await connection.execute("CHECKPOINT")
        await connection.close()
        assert files_with(files / "base" / own, SECRET) == []
