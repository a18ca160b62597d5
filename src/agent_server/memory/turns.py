"""What is said in a session, remembered turn by turn and word for word.

Leans on the sessions' store and on the memories' port, in the one transaction that ends a run.
Refuses to sum up: a turn is found as it was said, beside its neighbours.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select

from agent_server.domain.base import JsonObject
from agent_server.domain.ids import Tenant, derived_id
from agent_server.domain.memories import MemoryKind, MemorySource, NewMemory
from agent_server.memory.items import CALLS, is_output, message_text
from agent_server.memory.ports import Memories
from agent_server.memory.session_store import append_items
from agent_server.storage.tables import runs

MAX_OUTPUT = 2_000
"""Characters of a tool's output that an interaction is remembered with; the session has all."""
OWN_TOOLS = frozenset({"remember", "recall", "forget", "search_documents"})
"""Their calls are not remembered: what was recalled would be learnt again."""


class Turns:
    """Appends a run's items to its session, and remembers them: messages as ``message``, a tool
    call with what it gave as ``interaction``."""

    def __init__(self, store: Memories) -> None:
        self._store = store

    def append(
        self,
        connection: Connection,
        tenant: Tenant,
        session_id: str,
        run_id: str,
        items: Sequence[Any],
        now: datetime,
    ) -> None:
        """See ``append_items``, in whose transaction the memories are written."""
        append_items(connection, tenant, session_id, run_id, items, now)
        run = connection.execute(
            select(runs.c.subject, runs.c.agent, runs.c.principal).where(runs.c.id == run_id)
        ).one()
        by_person = MemorySource(run_id=run_id, principal=run.principal)
        by_agent = by_person.model_copy(update={"agent": run.agent})
        memories = [
            NewMemory(
                id=derived_id("mem", run_id, f"session/{session_id}/{index}"),
                kind=kind,
                content=text,
                session_id=session_id,
                author=(run.agent or "assistant") if agent else "user",
                subject=run.subject,
                source=by_agent if agent else by_person,
                created_at=now + timedelta(microseconds=index),  # in the order they were said
            )
            for index, kind, agent, text in _said(items)
        ]
        if memories:
            self._store.insert(connection, tenant, self._store.prepare(memories))


def _said(items: Sequence[JsonObject]) -> Iterator[tuple[int, MemoryKind, bool, str]]:
    """Each thing worth finding: its place, its kind, whether the agent said it, and its text."""
    outputs = {item.get("call_id"): item.get("output") for item in items if is_output(item)}
    for index, item in enumerate(items):
        text = message_text(item)
        if text is not None and text.strip():
            yield index, "message", item.get("role") == "assistant", text
        elif item.get("type") in CALLS and item.get("name") not in OWN_TOOLS:
            output = outputs.get(item.get("call_id"))
            gave = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
            called = f"{item.get('name') or item['type']}({item.get('arguments', '')})"
            yield index, "interaction", True, f"{called}\n{gave[:MAX_OUTPUT]}"
