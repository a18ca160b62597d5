"""The SQL of conversations that runs continue without a session: each run's input and what it said.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
"""

from typing import Any, Final

from sqlalchemy import Connection, bindparam, select

from agent_server.domain.base import JsonObject
from agent_server.storage.tables import runs, steps

SAID: Final = "conversation"
"""The key of the ledgered value that holds what a run added to its conversation."""
MAX_TURNS: Final = 10_000

_TURN = (
    select(runs.c.request, steps.c.output)
    .select_from(
        runs.outerjoin(
            steps, (steps.c.run_id == runs.c.id) & (steps.c.key == SAID) & (steps.c.kind == "value")
        )
    )
    .where(runs.c.id == bindparam("run"), runs.c.tenant == bindparam("tenant"))
)


def conversation(connection: Connection, tenant: str, run_id: str) -> list[JsonObject] | None:
    """The input items of ``run_id`` and of all that came before it, with what each run answered,
    oldest first. None when one of them is not there (any more)."""
    turns: list[list[JsonObject]] = []
    current: str | None = run_id
    while current is not None:
        row = connection.execute(_TURN, {"run": current, "tenant": tenant}).one_or_none()
        if row is None or len(turns) >= MAX_TURNS:
            return None
        given: Any = row.request.get("input") or row.request.get("goal") or []
        asked = [{"role": "user", "content": given}] if isinstance(given, str) else given
        turns.append([*asked, *(row.output or ())])
        current = (row.request.get("options") or {}).get("previous")
    return [item for turn in reversed(turns) for item in turn]
