"""Two versions at once: the schema is brought forward under a server that works on it."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # ships no types
import pytest

from agent_server.storage.migrate import HEAD, serves
from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery

from .shared import SharedWorld, at_the_last_call, held_back, readiness, submit
from .world import ready, script, settled

ADDED = (
    "ALTER TABLE runs ADD COLUMN of_the_next_version TEXT NOT NULL DEFAULT 'x'",
    "ALTER TABLE tasks ADD COLUMN of_the_next_version BIGINT",
    "ALTER TABLE steps ADD COLUMN of_the_next_version TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE of_the_next_version (id TEXT PRIMARY KEY)",
    "CREATE INDEX ix_of_the_next_version ON tasks (tenant, of_the_next_version)",
)


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        yield SharedWorld(tmp_path, models, nursery, url=postgres_url)


async def bring_to(world: SharedWorld, revision: str, statements: tuple[str, ...] = ()) -> None:
    connection = await asyncpg.connect(world.url)
    try:
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement)
            await connection.execute("UPDATE alembic_version SET version_num = $1", revision)
    finally:
        await connection.close()


@pytest.mark.timeout(90)
async def test_servers_of_the_version_before_go_on_while_the_schema_grows_under_them(
    world: SharedWorld,
) -> None:
    """This program is the older one: what the next version would add is added under it."""
    world.models.script({"rules": held_back("o", 2)})
    before = world.join()
    await ready(before)
    run_id = await submit(before, "o")
    await at_the_last_call(world, before, run_id, "o")
    await bring_to(world, "0999", ADDED)
    await readiness(before, 200)
    # One that is started again during the upgrade, or that an autoscaler adds.
    late = world.join()
    await ready(late)
    assert world.check("o", run_id, await settled(late, run_id)) == "succeeded"
    world.models.script({"rules": script("p")})
    again = await submit(late, "p")
    assert world.check("p", again, await settled(before, again)) == "succeeded"
    # The second phase takes away what they need: they say so, and are not asked any more.
    await bring_to(world, "1000-999")
    await readiness(before, 503)
    refused = world.join()
    assert await refused.ended(30)
    assert "which this program does not know" in refused.log.read_text()
    await before.kill(), await late.kill()


def test_a_revision_says_which_programs_may_work_on_it() -> None:
    ours = int(HEAD.partition("-")[0])
    assert serves(HEAD) and serves(f"{ours + 1:04}") and serves(f"{ours + 2:04}-{ours}")
    assert not serves(f"{ours + 2:04}-{ours + 1}")
    assert not serves(f"{ours - 1:04}") and not serves(None) and not serves("of somebody else")
