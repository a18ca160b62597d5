"""Retention: ended runs are forgotten, in whole or in detail, when they are as old as settings say.

Leans on the store. Refuses to hold anybody up: it deletes a few rows in a transaction and lets
others come before the next.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import structlog

from agent_server.domain.base import utcnow
from agent_server.execution.commits import PASSING
from agent_server.execution.store import retention as sql
from agent_server.execution.store.columns import ENDED
from agent_server.settings import Settings
from agent_server.storage.database import Database

log = structlog.get_logger(__name__)

RUNS = 50
"""Runs that are looked at together."""
ROWS = 2_000
"""Rows of one table deleted in one transaction."""
BREATH_S = 0.02
EVERY_S = 600.0


@dataclass(frozen=True)
class Rule:
    """Which ended runs are forgotten, after how long, and whether only their events and steps."""

    what: str
    statuses: tuple[str, ...]
    details: bool = False
    age: timedelta = timedelta.max


def rules(settings: Settings) -> Iterator[Rule]:
    """What has no rule is kept for ever."""
    good, bad = ("succeeded", "cancelled"), ("failed", "budget_exceeded")
    for days, rule in (
        (settings.retention_days, Rule("runs that succeeded or were cancelled", good)),
        (settings.retention_failed_days, Rule("runs that failed", bad)),
        (settings.retention_detail_days, Rule("runs' events and steps", ENDED, details=True)),
    ):
        if days:
            yield replace(rule, age=timedelta(days=days))


async def count(database: Database, rule: Rule) -> int:
    """Runs that ``forget`` would touch now."""
    before = utcnow() - rule.age
    return await database.read(
        lambda c: sql.count_old(c, rule.statuses, before, detailed=rule.details)
    )


async def forget(database: Database, rule: Rule) -> int:
    """Do as the rule says with every run that is as old; of how many."""
    before, total = utcnow() - rule.age, 0
    while True:
        found = await database.write(
            lambda c: sql.mark_old(c, rule.statuses, before, RUNS, detailed=rule.details)
        )
        if not found:
            return total
        while await database.write(lambda c: sql.delete_details(c, found, ROWS)):  # noqa: B023
            await asyncio.sleep(BREATH_S)
        if not rule.details:
            await database.write(lambda c: sql.delete_runs(c, found))  # noqa: B023
        total += len(found)
        await asyncio.sleep(BREATH_S)


async def keep_forgetting(database: Database, settings: Settings) -> None:
    """Forget by the settings' rules again and again; ends at once when there are none."""
    while found := list(rules(settings)):
        try:
            for rule in found:
                if done := await forget(database, rule):
                    log.info("forgot old runs", what=rule.what, runs=done)
        except PASSING as error:
            log.warning("old runs not forgotten", error=error.detail)
        except Exception:
            log.exception("old runs not forgotten")
        await asyncio.sleep(EVERY_S)


async def keep_collecting(database: Database) -> None:
    """Delete large values that nobody refers to any more, again and again."""
    while (outside := database.outside) is not None:
        await asyncio.sleep(EVERY_S)
        try:
            if gone := await outside.collect():
                log.info("deleted blobs that nobody uses", blobs=gone)
        except PASSING as error:
            log.warning("blobs not collected", error=error.detail)
        except Exception:
            log.exception("blobs not collected")
