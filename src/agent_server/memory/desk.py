"""The one place where memories are written by callers, agents and the server itself.

Leans on the store's port and on the documents' readers. Gives each memory an id that a repeated
write finds again, and cuts documents. Refuses to rank and to know HTTP.
"""

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
from sqlalchemy import Connection

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import IdempotencyMismatch, InvalidDocument, NotFound, Unavailable
from agent_server.domain.ids import Tenant, derived_id, new_id
from agent_server.domain.memories import Memory, MemoryDraft, MemoryPart, MemorySource, NewMemory
from agent_server.domain.memory_api import MemoryInput
from agent_server.execution import store as execution
from agent_server.execution.runs import Idempotency
from agent_server.memory.documents import PLAIN, Documents, readable
from agent_server.memory.ports import Memories, Written
from agent_server.storage.database import Database

_BINARY = "application/pdf"
READ_AT_ONCE = 2
"""Requests whose documents are read side by side; the others wait, up to ``PATIENCE_S``."""
PATIENCE_S = 60.0


class MemoryDesk:
    """Writes memories. ``store`` is where they lie, for everything else that can be asked."""

    def __init__(self, database: Database, store: Memories, documents: Documents) -> None:
        self.database = database
        self.store = store
        self.documents = documents
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    async def write(
        self,
        tenant: Tenant,
        inputs: Sequence[MemoryInput],
        *,
        source: MemorySource,
        idempotency: Idempotency | None = None,
    ) -> Written:
        """Write all or none.

        Raises ``InvalidDocument``, ``Unavailable`` while too many documents are being read, and
        ``IdempotencyMismatch`` for a key that came with another body. Of any number of equal calls at once, one writes.
        """
        if idempotency is not None:
            known = await self._replayed(tenant, idempotency)
            if known is not None:
                return known
        rows = await self._read(inputs, source)
        wholes, pieces = await asyncio.to_thread(
            lambda: (
                self.store.prepare([whole for whole, _ in rows]),
                [self.store.prepare(parts) if parts else None for _, parts in rows],
            )
        )

        def transaction(connection: Connection) -> Written | None:
            if idempotency is not None:
                values = {
                    "tenant": tenant,
                    "key": idempotency.key,
                    "fingerprint": idempotency.fingerprint,
                    "run_id": "",
                    "response": [],
                    "created_at": utcnow(),
                }
                if not execution.take_key(connection, values):
                    return None
            added = self.store.insert(connection, tenant, wholes)
            for one, parts in zip(added, pieces, strict=True):
                if one.new and parts is not None and one.memory.replaced_at is None:
                    self.store.insert(connection, tenant, parts)
            if idempotency is not None:  # Not those that were given: some may have been there.
                held = [one.memory.id for one in added]
                execution.answer_key(connection, tenant, idempotency.key, held)
            return Written([one.memory for one in added], sum(one.new for one in added))

        written = await self.database.write(transaction)
        if written is None:
            assert idempotency is not None
            known = await self._replayed(tenant, idempotency)
            assert known is not None
            return known
        return written

    async def _read(
        self, inputs: Sequence[MemoryInput], source: MemorySource
    ) -> list[tuple[NewMemory, list[NewMemory]]]:
        def rows() -> list[tuple[NewMemory, list[NewMemory]]]:
            deadline = self.documents.deadline()
            return [self._rows(draft, source, deadline) for draft in inputs]

        if not any(draft.kind == "document" for draft in inputs):
            return await asyncio.to_thread(rows)
        try:
            await asyncio.wait_for(self._reading.acquire(), PATIENCE_S)
        except asyncio.TimeoutError:
            raise Unavailable(
                "Too many documents are being read.", hint="Send it again in a minute."
            ) from None
        try:  # To its end, also when nobody waits for it any more: it takes up a place.
            return await anyio.to_thread.run_sync(rows)
        finally:
            self._reading.release()

    def _document(
        self, draft: MemoryInput, memory_id: str, source: MemorySource, deadline: float
    ) -> tuple[NewMemory, list[NewMemory]]:
        """A document as it is stored: itself where it is one piece, else the whole and its
        pieces, which are what is found. Blocking. Raises ``InvalidDocument``."""
        media_type = draft.media_type or PLAIN
        text = str(draft.content)
        blocks = self.documents.read(_bytes_of(text, media_type), media_type, deadline)
        chunks = list(self.documents.cut(blocks))
        if media_type.startswith((_BINARY, "text/html")):
            # What a reader sees, and not what may be hidden in the source.
            text = readable(blocks)
        details = {"media_type": media_type, **draft.metadata}
        whole = _new(draft, memory_id, source, content=text, metadata=details)
        if len(chunks) == 1:
            return whole, []
        pieces = [
            _new(
                draft,
                derived_id("mem", memory_id, str(index)),
                source,
                content=chunk.titled,
                metadata=details | ({"page": chunk.page} if chunk.page else {}),
                key=None,
                session_id=None,
                position=None,
                part_of=MemoryPart(memory_id=memory_id, index=index, heading=chunk.headings),
            )
            for index, chunk in enumerate(chunks)
        ]
        return whole.model_copy(update={"searchable": False}), pieces

    def _rows(
        self, draft: MemoryInput, source: MemorySource, deadline: float
    ) -> tuple[NewMemory, list[NewMemory]]:
        """What is written for one input: itself, and the pieces of a long document."""
        memory_id = draft.id or new_id("mem")
        if draft.kind == "document":
            return self._document(draft, memory_id, source, deadline)
        return _new(draft, memory_id, source), []

    async def _replayed(self, tenant: Tenant, idempotency: Idempotency) -> Written | None:
        row = await self.database.read(lambda c: execution.stored_key(c, tenant, idempotency.key))
        if row is None:
            return None
        if row.fingerprint != idempotency.fingerprint:
            raise IdempotencyMismatch(
                f"The Idempotency-Key {idempotency.key!r} was used with another body.",
                hint="Use a new key for a new request; send the same body to repeat one.",
            )
        found: list[Memory] = []
        for memory_id in row.response:
            try:
                found.append(await self.store.get(tenant, memory_id))
            except NotFound:
                continue  # Deleted since, which a repeated write does not undo.
        return Written(found, new=0, replayed=True)


def _new(draft: MemoryInput, memory_id: str, source: MemorySource, **changes: Any) -> NewMemory:
    fields: JsonObject = {
        name: getattr(draft, name)
        for name in (*MemoryDraft.model_fields, "created_at", "position")
        if name not in changes
    }
    return NewMemory(**fields, **changes, id=memory_id, source=source)


def _bytes_of(content: str, media_type: str) -> bytes:
    if not media_type.startswith(_BINARY):
        return content.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidDocument(
            f"The content of a document of the type {media_type!r} is not base64.",
            hint="Send the file's bytes in base64.",
        ) from error
