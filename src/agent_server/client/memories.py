"""Memories and sessions, seen from a client: write, search, read, edit, forget.

Leans on the domain and on one exchange at a time. Refuses to keep anything: what it was told of a
memory, another client may be told too.
"""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx2

from agent_server.client.http import checked, exchange, failed, transport_error
from agent_server.client.runs import Page
from agent_server.domain.base import JsonObject
from agent_server.domain.memories import (
    Found,
    Memory,
    MemoryChange,
    MemoryDraft,
    MemoryQuery,
    MemoryStats,
    MemoryUse,
)
from agent_server.domain.memory_api import ErasureReceipt, MemoriesWritten, MemoryInput
from agent_server.domain.sessions import Session, SessionDeleted, SessionItem

PREFIX = "/api/v1/memories"
_BROKEN = (
    "Send it again: what was written is not written twice. A server cuts off a body that is larger "
    "than its AGENT_SERVER_MAX_DOCUMENT_BYTES."
)


class MemoriesClient:
    """``/api/v1/memories`` and ``/api/v1/subjects``. Got as ``AgentServerClient.memories``."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def add(self, content: Any, *, kind: str = "knowledge", **fields: Any) -> Memory:
        """Write one memory. Without an ``idempotency_key`` of yours, one is made for this call."""
        key = fields.pop("idempotency_key", None)
        draft = checked(MemoryInput, {"kind": kind, "content": content, **fields}, "memory")
        answer = await self._post(PREFIX, _body(draft), key)
        return Memory.model_validate(answer)

    async def add_all(
        self, memories: Sequence[MemoryDraft], *, idempotency_key: str | None = None
    ) -> MemoriesWritten:
        """Write up to 1,000 memories, all or none: all of them as ``data``, and how many are
        ``new``."""
        body = {"memories": [_body(memory) for memory in memories]}
        return MemoriesWritten.model_validate(await self._post(PREFIX, body, idempotency_key))

    async def search(self, query: str | MemoryQuery, **fields: Any) -> Sequence[Found]:
        """What an agent that asked the same would be given, best first, with why."""
        if isinstance(query, str):
            query = checked(MemoryQuery, {"query": query, **fields}, "search")
        body = query.model_dump(mode="json", exclude_unset=True)
        answer = await exchange(self._http, "POST", f"{PREFIX}/search", json=body)
        return [Found.model_validate(found) for found in answer["data"]]

    async def list(
        self, *, limit: int | None = None, cursor: str | None = None, **filters: Any
    ) -> Page[Memory]:
        """One page, the newest first; ``filters`` are those of the HTTP contract."""
        params = {"limit": limit, "cursor": cursor, **filters}
        answer = await exchange(self._http, "GET", PREFIX, params=params)
        return Page([Memory.model_validate(m) for m in answer["data"]], answer.get("next_cursor"))

    async def get(self, memory_id: str) -> Memory:
        """One memory. Raises ``NotFound``."""
        return Memory.model_validate(await exchange(self._http, "GET", _at(memory_id)))

    async def history(self, memory_id: str) -> Sequence[Memory]:
        """Every version of it, oldest first."""
        answer = await exchange(self._http, "GET", f"{_at(memory_id)}/history")
        return [Memory.model_validate(m) for m in answer["data"]]

    async def uses(self, memory_id: str) -> Sequence[MemoryUse]:
        """Which runs recalled it, the newest first."""
        answer = await exchange(self._http, "GET", f"{_at(memory_id)}/uses")
        return [MemoryUse.model_validate(u) for u in answer["data"]]

    async def edit(self, memory: str | Memory, **changes: Any) -> Memory:
        """A new version. Given the memory itself, raises ``PreconditionFailed`` when somebody else
        was quicker."""
        change = MemoryChange.model_validate(changes)
        identity, headers = _version(memory)
        body = change.model_dump(mode="json", exclude_unset=True)
        answer = await exchange(self._http, "PATCH", _at(identity), json=body, headers=headers)
        return Memory.model_validate(answer)

    async def delete(self, memory: str | Memory) -> None:
        """Delete it with every version. Given the memory itself, only in that version."""
        identity, headers = _version(memory)
        await exchange(self._http, "DELETE", _at(identity), headers=headers)

    async def erase(self, subject: str) -> ErasureReceipt:
        """Erase one person's data everywhere."""
        path = f"/api/v1/subjects/{quote(subject, safe='')}"
        return ErasureReceipt.model_validate(
            await exchange(self._http, "DELETE", path, timeout_s=300)
        )

    async def stats(self) -> MemoryStats:
        """How much is kept."""
        return MemoryStats.model_validate(await exchange(self._http, "GET", f"{PREFIX}/stats"))

    async def export(self, **filters: Any) -> AsyncIterator[Memory]:
        """Everything, oldest first, as it is read."""
        params = {name: value for name, value in filters.items() if value is not None}
        try:
            async with self._http.stream("GET", f"{PREFIX}/export", params=params) as response:
                if response.status_code >= 400:
                    raise await failed(response)
                rest = b""
                # Not ``aiter_lines``, for which a text may hold other ends of lines.
                async for chunk in response.aiter_bytes():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield Memory.model_validate(json.loads(line))
        except httpx2.HTTPError as error:
            raise transport_error(self._http.base_url, error) from error

    async def _post(self, path: str, body: JsonObject, key: str | None) -> Any:
        headers = {"Idempotency-Key": key or uuid4().hex}
        return await exchange(
            self._http, "POST", path, json=body, headers=headers, timeout_s=300, broken=_BROKEN
        )


class SessionsClient:
    """``/api/v1/sessions``. Got as ``AgentServerClient.sessions``."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def list(self, *, limit: int | None = None, cursor: str | None = None) -> Page[Session]:
        """One page, the newest first."""
        params = {"limit": limit, "cursor": cursor}
        answer = await exchange(self._http, "GET", "/api/v1/sessions", params=params)
        return Page([Session.model_validate(s) for s in answer["data"]], answer.get("next_cursor"))

    async def get(self, session_id: str) -> Session:
        """One session. Raises ``NotFound``."""
        return Session.model_validate(await exchange(self._http, "GET", _session(session_id)))

    async def items(
        self, session_id: str, *, limit: int | None = None, cursor: str | None = None
    ) -> Page[SessionItem]:
        """One page of what was said, word for word, oldest first."""
        params = {"limit": limit, "cursor": cursor}
        answer = await exchange(self._http, "GET", f"{_session(session_id)}/items", params=params)
        items = [SessionItem.model_validate(item) for item in answer["data"]]
        return Page(items, answer.get("next_cursor"))

    async def delete(self, session_id: str) -> SessionDeleted:
        """Delete the conversation. Raises ``Conflict`` while a run works on it."""
        return SessionDeleted.model_validate(
            await exchange(self._http, "DELETE", _session(session_id))
        )


def _body(draft: MemoryDraft) -> JsonObject:
    return draft.model_dump(mode="json", exclude_unset=True)


def _at(memory_id: str) -> str:
    return f"{PREFIX}/{quote(memory_id, safe='')}"


def _session(session_id: str) -> str:
    return f"/api/v1/sessions/{quote(session_id, safe='')}"


def _version(memory: str | Memory) -> tuple[str, dict[str, str]]:
    if isinstance(memory, str):
        return memory, {}
    return memory.id, {"If-Match": f'"{memory.version}"'}
