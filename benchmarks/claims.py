"""``python -m benchmarks.claims``: what taking tasks costs on PostgreSQL, and by which plan.

Leans on the SQL of the queue alone, so that nothing is counted but claims. Refuses to judge.
"""

import argparse
import asyncio
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, event, insert, text

from agent_server.domain.base import utcnow
from agent_server.execution import store
from agent_server.storage.database import PostgresDatabase, database_at
from agent_server.storage.migrate import upgrade
from agent_server.storage.tables import tasks
from tests.support.postgres import PostgresServer

RULE = store.BlameRule(most=10, lease_s=8)
AT_ONCE = (1, 16, 100)


def rows(queued: int, tenants: int, waiting: int, ended: int) -> Iterator[dict[str, Any]]:
    """Root tasks: so many in the queue of so many tenants, so many that wait, so many that ended."""
    now = utcnow()
    for number in range(queued + waiting + ended):
        status = (
            "queued" if number < queued else "waiting" if number < queued + waiting else "succeeded"
        )
        yield {
            **{"run_id": f"run_{number:09}", "path": "", "tenant": f"t{number % tenants}"},
            **{"node": "", "kind": "run.agent", "payload": {}, "hidden": True, "status": status},
            **{"epoch": 0, "attempts": 0, "created_at": now, "rank": 0, "agent": None},
            "waiting_for": {"kind": "signal"} if status == "waiting" else None,
        }


def fill(connection: Connection, **how: int) -> None:
    connection.execute(text("TRUNCATE tasks"))
    batch = list(rows(**how))
    for at in range(0, len(batch), 1_000):
        connection.execute(insert(tasks), batch[at : at + 1_000])
    connection.execute(text("COMMIT"))
    connection.execute(text("ANALYZE tasks"))


async def rate(database: PostgresDatabase, limit: int, workers: int, seconds: float) -> str:
    """Claims and tasks a second by one node that asks for up to ``limit``."""
    turns, claims, taken = store.Turns(), 0, 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        found, _ = await database.write(
            lambda c: store.claim(c, "node", limit, utcnow(), turns, RULE, workers=workers)
        )
        claims, taken = claims + 1, taken + len(found)
        if not found:
            break
    spent = time.perf_counter() - started
    return f"{claims / spent:,.0f} claims, {taken / spent:,.0f} tasks a second"


def explained(connection: Connection, limit: int) -> list[str]:
    """Each statement of one claim, with its plan. What it takes is given back."""
    told: list[str] = []

    def look(
        conn: Connection, cursor: Any, statement: str, values: Any, context: Any, many: bool
    ) -> None:
        if "EXPLAIN" in statement or "tasks" not in statement or "INSERT" in statement:
            return
        plan = conn.exec_driver_sql(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {statement}", values)
        told.append("\n".join([" ".join(statement.split())[:160], *(row[0] for row in plan)]))

    event.listen(connection, "before_cursor_execute", look)
    inner = connection.begin_nested()
    store.claim(connection, "node", limit, utcnow(), store.Turns(), RULE, workers=2)
    inner.rollback()
    event.remove(connection, "before_cursor_execute", look)
    return told


async def measure(seconds: float, plans: bool) -> None:
    with PostgresServer() as server:
        database = database_at(server.fresh_database())
        assert isinstance(database, PostgresDatabase)
        await database.open()
        await database.write(upgrade)
        for name, how in {
            "10,000 queued of 100 tenants": {"queued": 10_000, "tenants": 100},
            "the same beside 1,000 waiting and 100,000 ended": {
                **{"queued": 10_000, "tenants": 100, "waiting": 1_000, "ended": 100_000}
            },
            "10,000 queued of one tenant": {"queued": 10_000, "tenants": 1},
            "nothing queued, 1,000 waiting": {"queued": 0, "tenants": 100, "waiting": 1_000},
        }.items():
            how = {"waiting": 0, "ended": 0, **how}
            for limit in AT_ONCE:
                await database.write(lambda c: fill(c, **how))  # noqa: B023  # awaited here
                said = await rate(database, limit, workers=1, seconds=seconds)
                print(f"{name}, up to {limit} at once: {said}", flush=True)
            if plans:
                await database.write(lambda c: fill(c, **how))  # noqa: B023  # awaited here
                for told in await database.write(lambda c: explained(c, 16)):
                    print(f"\n{told}")
        await database.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--plans", action="store_true", help="the plan of each statement, too")
    options = parser.parse_args()
    asyncio.run(measure(options.seconds, options.plans))


if __name__ == "__main__":
    main()
