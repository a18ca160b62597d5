"""Large values stand outside the hot rows, once, and nobody who reads them notices."""

import asyncio
import errno
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select, text

from agent_server.cli.database import move_blobs
from agent_server.domain.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InternalError,
    StorageFull,
)
from agent_server.domain.history import ForkRequest
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import RunRequest
from agent_server.execution import retention, store
from agent_server.execution.ports import LostLease, StepRecord, TaskContext, TaskSpec
from agent_server.execution.runs import RunFilters, Runs
from agent_server.settings import Settings
from agent_server.storage.blobs import (
    PROBE,
    BlobStore,
    DatabaseBlobs,
    DirectoryBlobs,
    blob_store,
    check,
)
from agent_server.storage.database import Database, database_at
from agent_server.storage.migrate import upgrade
from agent_server.storage.outside import GRACE, Moved, Outside, owned
from agent_server.storage.references import MARK, Cut, Opening, _open
from agent_server.storage.tables import blob_bytes, blob_uses, blobs, metadata
from agent_server.testing.blobs import BlobStoreContract

from .kit import finished, running, submit
from .test_history import history_of

BIG = {"rows": [{"number": n, "text": "é" * 40} for n in range(1_200)]}
SMALL = "x" * 60_000


@pytest.fixture(params=["database", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "database" if request.param == "database" else f"file://{tmp_path}/blobs"


async def fan_out(ctx: TaskContext) -> Any:
    """Makes a large value in a step and hands it to ten children, which hand it back."""
    if ctx.path:
        assert ctx.payload["data"] == BIG
        return {"number": ctx.payload["number"], "data": ctx.payload["data"]}
    made = StepRecord(key=ctx.journal.key("tool", "a"), kind="tool", name="t", input=BIG)
    await ctx.journal.finish(made.done(BIG))

    async def child(number: int) -> Any:
        payload = {"number": number, "data": BIG}
        spec = TaskSpec(path=str(number + 1), node=f"n{number}", kind="agent", payload=payload)
        return (await ctx.child(spec)).output

    outputs = await asyncio.gather(*(child(number) for number in range(10)))
    return {"first": outputs[0], "all": len(outputs)}


def row_bytes(connection: Connection) -> int:
    """Bytes of every text in every table."""
    total = 0
    for table in metadata.sorted_tables:
        texts = [c.name for c in table.columns if "TEXT" in str(c.type) or "Json" in repr(c.type)]
        for name in texts:
            query = text(f'SELECT coalesce(sum(length("{name}")), 0) FROM {table.name}')
            total += int(connection.execute(query).scalar() or 0)
    return total


def count(connection: Connection, table: Any) -> int:
    return connection.execute(select(func.count()).select_from(table)).scalar() or 0


async def counted(runs: Runs) -> tuple[int, int]:
    """Blobs, and uses of them."""
    return await runs.database.read(lambda c: (count(c, blobs), count(c, blob_uses)))


def outside(runs: Runs) -> Outside:
    found = runs.database.outside
    assert isinstance(found, Outside)
    return found


async def collected(runs: Runs) -> int:
    """What goes when nothing has any grace."""
    keys = await runs.database.read(lambda c: c.execute(select(blobs.c.key)).scalars().all())
    return await outside(runs).forget(DEFAULT_TENANT, keys)


async def test_a_large_value_stands_once_and_is_read_everywhere_as_it_was(
    url: str, place: str
) -> None:
    async with running(url, {"agent": fan_out}, blobs=place) as runs:
        run = await finished(runs, await submit(runs, agent="a", input="go"))
        assert run.output == {"first": {"number": 0, "data": BIG}, "all": 10}, run.error
        assert await runs.database.read(row_bytes) < 40_000
        assert (await counted(runs))[0] == 1
        tasks = await runs.tasks(DEFAULT_TENANT, run.id)
        assert [task.output["data"] for task in tasks] == [BIG] * 10
        steps = await runs.steps(DEFAULT_TENANT, run.id, limit=10, cursor=None)
        assert [(step.input, step.output) for step in steps.data] == [(BIG, BIG)]
        said = [
            json.loads(event.data) for event in await runs.events(DEFAULT_TENANT, run.id, 0, 1_000)
        ]
        assert [e["output"] for e in said if e["type"] == "run.succeeded"] == [run.output]
        assert [e["input"] for e in said if e["type"] == "step.started"] == []
        assert [e["output"]["data"] for e in said if e["type"] == "task.completed"] == [BIG] * 10
        held = await runs.database.read(lambda c: count(c, blob_bytes))
        assert held == (1 if place == "database" else 0)


async def test_a_run_goes_on_after_a_crash_with_what_it_had(url: str, place: str) -> None:
    seen: list[Any] = []
    reached, never = asyncio.Event(), asyncio.Event()

    async def agent(ctx: TaskContext) -> Any:
        if not ctx.path:
            outcome = await ctx.child(
                TaskSpec(path="1", node="n", kind="agent", payload={"data": BIG})
            )
            made = StepRecord(key=ctx.journal.key("tool", "a"), kind="tool", name="t")
            done = ctx.journal.step(made.key)
            if done is None:
                await ctx.journal.finish(made.done(BIG))
                reached.set()
                await never.wait()
            seen.append((outcome.output, done and done.output))
        return ctx.payload.get("data")

    async with running(url, {"agent": agent}, dies=True, blobs=place) as runs:
        run = await submit(runs, agent="a", input="go")
        await asyncio.wait_for(reached.wait(), 20)
    async with running(url, {"agent": agent}, blobs=place, lease_s=1) as runs:
        await finished(runs, run)
    assert seen == [(BIG, BIG)]


async def test_small_values_stay_in_their_rows(url: str) -> None:
    async def agent(ctx: TaskContext) -> Any:
        return SMALL

    async with running(url, {"agent": agent}) as runs:
        run = await finished(runs, await submit(runs, agent="a", input="go"))
        assert run.output == SMALL
        assert await counted(runs) == (0, 0)
    async with running(url, {"agent": agent}, blob_threshold_bytes=0) as runs:
        await finished(runs, await submit(runs, agent="a", input="y" * 900_000))
        assert await counted(runs) == (0, 0)


async def test_writers_of_one_content_at_once_and_a_collector_lose_nothing(
    url: str, place: str
) -> None:
    async def agent(ctx: TaskContext) -> Any:
        return BIG

    async with running(url, {"agent": agent}, blobs=place) as runs:
        stop = False

        async def collect() -> None:
            while not stop:
                await collected(runs)
                await asyncio.sleep(0)  # the writers have their turn

        collector = asyncio.create_task(collect())
        for _ in range(2):
            made = await asyncio.gather(*(submit(runs, agent="a", input="go") for _ in range(6)))
            for run in made:
                assert (await finished(runs, run)).output == BIG
                await runs.delete(DEFAULT_TENANT, run.id)
        last = await finished(runs, await submit(runs, agent="a", input="go"))
        stop = True
        await collector
        await collected(runs)
        assert (await counted(runs))[0] <= 1
        assert (await runs.get(DEFAULT_TENANT, last.id)).output == BIG


async def test_two_tenants_share_no_blob(url: str, place: str) -> None:
    async def agent(ctx: TaskContext) -> Any:
        return BIG

    async with running(url, {"agent": agent}, blobs=place) as runs:
        made = []
        for tenant in (Tenant("one"), Tenant("two")):
            request = RunRequest(agent="a", input="go")
            sent = await runs.submit(request, tenant=tenant, principal="test")
            made.append(await runs.wait(tenant, sent.run.id, 30))
        assert [run.output for run in made] == [BIG, BIG]
        assert (await counted(runs))[0] == 2
        await runs.delete(Tenant("one"), made[0].id)
        assert (await counted(runs))[0] == 1
        assert (await runs.get(Tenant("two"), made[1].id)).output == BIG


async def test_a_transaction_that_is_refused_leaves_no_blob(url: str, place: str) -> None:
    async with running(url, {}, blobs=place) as runs:

        def refused(connection: Connection) -> None:
            store.insert_events(connection, "one", "run_x", 1, [("t", json.dumps({"x": BIG}))])
            raise LostLease("taken over")

        with pytest.raises(LostLease):
            await runs.database.write(owned(refused, "one", "run_x"))
        assert await counted(runs) == (0, 0)
        assert await runs.database.read(lambda c: count(c, blob_bytes)) == 0


async def test_nothing_goes_that_a_fork_still_refers_to(url: str, place: str) -> None:
    async with running(url, {"agent": fan_out}, blobs=place) as runs:
        origin = await finished(runs, await submit(runs, agent="a", input="go"))
        task = (await runs.tasks(DEFAULT_TENANT, origin.id))[-1]
        forked, _ = await history_of(runs).fork(
            DEFAULT_TENANT, origin.id, ForkRequest(start=task.id), principal="test"
        )
        await finished(runs, await runs.get(DEFAULT_TENANT, forked.id))
        await runs.delete(DEFAULT_TENANT, origin.id)
        await collected(runs)
        tasks = await runs.tasks(DEFAULT_TENANT, forked.id)
        assert [one.output["data"] for one in tasks] == [BIG] * 10
        await runs.delete(DEFAULT_TENANT, forked.id)
        assert await counted(runs) == (0, 0)


async def test_blobs_go_with_the_rows_that_retention_deletes(url: str, tmp_path: Path) -> None:
    async def agent(ctx: TaskContext) -> Any:
        made = StepRecord(key=ctx.journal.key("tool", "a"), kind="tool", name="t")
        await ctx.journal.finish(made.done("s" * 100_000))
        return "o" * 100_000

    folder = tmp_path / "blobs"
    async with running(url, {"agent": agent}, blobs=f"file://{folder}") as runs:
        run = await finished(runs, await submit(runs, agent="a", input="go"))
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == (await counted(runs))[0] == 2
        details, whole = retention.rules(
            Settings(retention_days=1, retention_detail_days=1)  # type: ignore[call-arg]
        )
        await retention.forget(runs.database, replace(whole, age=timedelta(0)))
        assert await collected(runs) == 1
        assert (await runs.get(DEFAULT_TENANT, run.id)).output == "o" * 100_000
        await retention.forget(runs.database, replace(details, age=timedelta(0)))
        assert await collected(runs) == 1
        assert [path for path in folder.rglob("*") if path.is_file()] == []


async def test_a_value_whose_blob_is_lost_or_was_changed_is_a_marker_that_says_so(
    url: str, tmp_path: Path
) -> None:
    async def agent(ctx: TaskContext) -> Any:
        return BIG if ctx.run.request.input == "go" else "small"

    folder = tmp_path / "blobs"
    async with running(url, {"agent": agent}, blobs=f"file://{folder}") as runs:
        other = await finished(runs, await submit(runs, agent="a", input="no"))
        run = await finished(runs, await submit(runs, agent="a", input="go"))
        (path,) = (path for path in folder.rglob("*") if path.is_file())
        kept = path.read_bytes()

        async def told() -> Any:
            page = await runs.list(DEFAULT_TENANT, filters=RunFilters(), limit=10, cursor=None)
            found = {one.id: one.output for one in page.data}
            assert found[other.id] == "small"
            return found[run.id]

        path.write_bytes(kept[:-1] + b"!")
        assert "is not what was stored" in (await told())["unreadable"]
        path.unlink()
        assert "is not in the folder" in (await told())["unreadable"]
        said = await runs.events(DEFAULT_TENANT, run.id, 0, 100)
        assert [event.type for event in said][-1] == "event.unreadable"
        path.write_bytes(kept)
        assert await told() == BIG


async def test_what_was_kept_in_the_database_is_found_after_the_place_was_changed(
    url: str, tmp_path: Path
) -> None:
    async def agent(ctx: TaskContext) -> Any:
        return BIG

    async with running(url, {"agent": agent}) as runs:
        first = await finished(runs, await submit(runs, agent="a", input="go"))
    async with running(url, {"agent": agent}, blobs=f"file://{tmp_path}/blobs") as runs:
        assert (await runs.get(DEFAULT_TENANT, first.id)).output == BIG
        await runs.delete(DEFAULT_TENANT, first.id)
        assert await runs.database.read(lambda c: count(c, blob_bytes)) == 0


async def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True
    refused = asyncio.Event()

    async def agent(ctx: TaskContext) -> Any:
        return BIG

    def sync(descriptor: int) -> None:
        if full:
            refused.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with running(url, {"agent": agent}, blobs=f"file://{tmp_path}/blobs") as runs:
        monkeypatch.setattr("agent_server.storage.blobs.os.fsync", sync)
        with pytest.raises(StorageFull, match="folder"):
            await submit(runs, agent="a", input="y" * 200_000)
        assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []
        run = await submit(runs, agent="a", input="go")
        refused.clear()
        await asyncio.wait_for(refused.wait(), 20)
        full = False
        assert (await finished(runs, run)).output == BIG


class Meddled(DirectoryBlobs):
    """Lets a test do something right after a blob was put."""

    def __init__(self, root: Path, then: Callable[[], Awaitable[None]]) -> None:
        super().__init__(root)
        self._then = then

    async def put(self, tenant: str, key: str, data: bytes) -> None:
        await super().put(tenant, key, data)
        if data != PROBE:
            await self._then()


def files_in(folder: Path) -> int:
    return len([path for path in folder.rglob("*") if path.is_file()])


async def large(ctx: TaskContext) -> Any:
    return [str(ctx.run.request.input) * 90_000]


@pytest.mark.parametrize(("before", "after"), [("database", "b"), ("a", "database"), ("a", "b")])
async def test_large_values_move_to_another_place_while_runs_are_made_read_and_deleted(
    url: str, tmp_path: Path, before: str, after: str
) -> None:
    """Two engines on one database is what several servers are; here one, which is asked at once."""
    old, new = (one if one == "database" else f"file://{tmp_path}/{one}" for one in (before, after))
    async with running(url, {"agent": large}, blobs=old) as runs:
        made = [await submit(runs, agent="a", input=letter) for letter in "abcdef"]
        for run in made:
            await finished(runs, run)
    async with running(url, {"agent": large}, blobs=new, blobs_also=old) as runs:

        async def read() -> None:
            for run in made[:4]:
                found = (await runs.get(DEFAULT_TENANT, run.id)).output
                assert found == [str(run.input) * 90_000]

        async def more() -> None:
            made.append(await finished(runs, await submit(runs, agent="a", input="g")))
            await runs.delete(DEFAULT_TENANT, made[5].id)

        moves = await asyncio.gather(
            outside(runs).move(), outside(runs).move(), read(), more(), read()
        )
        assert sum(one.blobs for one in moves[:2] if one is not None) >= 5
        await read()
        assert await outside(runs).move() == Moved()
        left = await runs.database.read(lambda c: count(c, blob_bytes))
        blobs_now, _ = await counted(runs)
        assert blobs_now == 6
        assert left == (6 if after == "database" else 0)
        assert [files_in(tmp_path / name) for name in "ab"] == [0, 6 if after == "b" else 0]
    async with running(url, {"agent": large}, blobs=new) as runs:
        for run in (*made[:5], made[6]):
            assert (await runs.get(DEFAULT_TENANT, run.id)).output == [str(run.input) * 90_000]


async def test_a_move_that_is_cut_off_loses_nothing_and_is_gone_on_with(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(url, {"agent": large}) as runs:
        made = [await finished(runs, await submit(runs, agent="a", input=x)) for x in "abcdef"]
    place = f"file://{tmp_path}/blobs"
    async with running(url, {"agent": large}, blobs=place) as runs:
        synced, sync = 0, os.fsync

        def full(descriptor: int) -> None:
            nonlocal synced
            synced += 1
            if synced > 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr("agent_server.storage.blobs.os.fsync", full)
        with pytest.raises(StorageFull):
            await outside(runs).move()
        monkeypatch.setattr("agent_server.storage.blobs.os.fsync", sync)
        for run in made:
            assert (await runs.get(DEFAULT_TENANT, run.id)).output == run.output
        await outside(runs).move()
        assert await runs.database.read(lambda c: count(c, blob_bytes)) == 0
        for run in made:
            assert (await runs.get(DEFAULT_TENANT, run.id)).output == run.output
        assert files_in(tmp_path / "blobs") == 6


async def test_what_is_deleted_while_it_is_moved_stays_deleted(url: str, tmp_path: Path) -> None:
    async with running(url, {"agent": large}) as runs:
        run = await finished(runs, await submit(runs, agent="a", input="a"))

        async def delete() -> None:
            # By another server, which does not know the new place.
            await runs.delete(DEFAULT_TENANT, run.id)

        moving = Outside(runs.database, Meddled(tmp_path / "blobs", delete), 65_536)
        assert await moving.move() == Moved()
        assert files_in(tmp_path / "blobs") == 0 and await counted(runs) == (0, 0)


async def test_the_command_moves_what_the_settings_say_and_tells_how_much(
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running(sqlite_url, {"agent": large}) as runs:
        await finished(runs, await submit(runs, agent="a", input="a"))
    monkeypatch.setenv("AGENT_SERVER_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("AGENT_SERVER_BLOBS", f"file://{tmp_path}/blobs")
    for number in (1, 0):
        await move_blobs()
        assert f"{number} large values" in capsys.readouterr().out
    assert files_in(tmp_path / "blobs") == 1
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(InternalError, match="1 large values are in none of the places"):
        await move_blobs()


async def test_a_place_is_not_moved_into_itself_and_what_is_lost_is_said(
    sqlite_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "blobs"
    (tmp_path / "alias").symlink_to(folder)
    async with running(sqlite_url, {"agent": large}, blobs=f"file://{folder}") as runs:
        run = await finished(runs, await submit(runs, agent="a", input="a"))
    both = {"blobs": f"file://{folder}", "blobs_also": f"file://{tmp_path}/alias"}
    async with running(sqlite_url, {"agent": large}, **both) as runs:
        with pytest.raises(ConfigurationError, match="nothing can be moved"):
            await outside(runs).move()
        assert (await runs.get(DEFAULT_TENANT, run.id)).output == run.output
    async with running(sqlite_url, {"agent": large}, blobs=f"file://{tmp_path}/new") as runs:
        assert await outside(runs).move() == Moved(lost=1)
        assert files_in(folder) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=6)
    | st.dictionaries(
        st.text(max_size=8) | st.sampled_from(["$blob", "$blob$"]), inner, max_size=6
    ),
    max_leaves=30,
)


@given(JSON, st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_any_value_is_cut_and_put_together_again(value: Any, limit: int) -> None:
    cut = Cut(json.dumps(value), limit)
    kept = {}
    for number, piece in enumerate(cut.pieces):
        piece.key = f"{number:081}"
        kept[piece.key] = piece.data
    stored = cut.stored('ten"ant')
    assert stored.text.startswith(MARK) and stored.text.isascii()
    assert _open(stored.text, Opening(kept, {})) == value


async def _opened(url: str) -> Database:
    database = database_at(url)
    await database.open()
    await database.write(upgrade)
    return database


class TestInTheDatabase(BlobStoreContract):
    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[BlobStore]:
        database = await _opened(url)
        yield DatabaseBlobs(database)
        await database.close()


class TestInADirectory(BlobStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> BlobStore:
        return DirectoryBlobs(tmp_path / "blobs")

    async def test_no_path_leads_outside(self, store: BlobStore, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        for key in ("../../secret", "/etc/passwd", "..", "a" * 81, "\x00"):
            with pytest.raises(ValueError, match="key of a blob"):
                await store.get("acme", key)
            with pytest.raises(ValueError, match="path of a blob"):
                await store.discard(key)

    async def test_what_a_crash_left_half_written_is_a_stray(
        self, store: BlobStore, tmp_path: Path
    ) -> None:
        folder = tmp_path / "blobs" / "acme" / "ab"
        folder.mkdir(parents=True)
        (folder / f".{'ab' * 32}.{'0' * 16}").write_bytes(b"half")
        (path,) = [path async for path in store.old(timedelta(0))]
        await store.discard(path)
        assert list(folder.iterdir()) == []
        assert GRACE > timedelta(minutes=10)


class TestOnS3(BlobStoreContract):
    @pytest.fixture
    def store(self, s3: str) -> BlobStore:
        return blob_store(s3, None, 10)  # type: ignore[arg-type]  # it needs no database

    async def test_a_bucket_that_is_not_there_is_said(self, s3: str) -> None:
        store = blob_store("s3://nowhere/here", None, 10)  # type: ignore[arg-type]
        with pytest.raises(DatabaseUnavailable, match="s3://nowhere/here"):
            await check(store)

    async def test_runs_keep_their_large_values_there(self, s3: str, sqlite_url: str) -> None:
        async with running(sqlite_url, {"agent": fan_out}, blobs=s3) as runs:
            run = await finished(runs, await submit(runs, agent="a", input="go"))
            assert run.output["first"]["data"] == BIG
            kept = outside(runs).store
            assert len([path async for path in kept.old(timedelta(0))]) == 1
            await runs.delete(DEFAULT_TENANT, run.id)
            assert [path async for path in kept.old(timedelta(0))] == []

    async def test_large_values_move_there_and_back(
        self, s3: str, sqlite_url: str, tmp_path: Path
    ) -> None:
        async with running(sqlite_url, {"agent": large}) as runs:
            run = await finished(runs, await submit(runs, agent="a", input="a"))
        before = "database"
        for place in (s3, f"file://{tmp_path}/blobs", "database"):
            async with running(
                sqlite_url, {"agent": large}, blobs=place, blobs_also=before
            ) as runs:
                moved = await outside(runs).move()
                assert (moved.blobs, moved.bytes, moved.lost) == (1, 90_002, 0)
                assert (await runs.get(DEFAULT_TENANT, run.id)).output == run.output
            before = place


@pytest.mark.parametrize("url", ["", "disk", "file://relative/x", "s3:///x", "ftp://x/y"])
def test_a_place_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="AGENT_SERVER_BLOBS"):
        blob_store(url, None, 10)  # type: ignore[arg-type]
