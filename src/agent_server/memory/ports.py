"""What the rest of the server may ask of long-term memory.

Leans on the domain alone, and on SQLAlchemy for the type of a transaction. ``memory.store`` is
the implementation, on both databases; ``agent_server.testing.memory_store`` is the contract it
must pass. It refuses to know language models and HTTP.
"""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Protocol

from sqlalchemy import Connection

from agent_server.domain.ids import Tenant
from agent_server.domain.memories import (
    Found,
    MemoriesErased,
    Memory,
    MemoryChange,
    MemoryFilter,
    MemoryQuery,
    MemorySource,
    MemoryStats,
    MemoryUse,
    NewMemory,
)

Fence = Callable[[Connection], None]
"""Lets a transaction be, or raises."""


@dataclass(frozen=True)
class MemoryPage:
    data: tuple[Memory, ...]
    next_cursor: str | None


class Added:
    """One memory after a write; ``new`` is False when it was there already: the same id, or one
    under the same key that says all that this one does, and expires when this one would."""

    def __init__(self, new: bool, read: Callable[[], Memory]) -> None:
        self.new = new
        self._read = read

    @cached_property
    def memory(self) -> Memory:
        """Made when it is asked for: whoever imports thousands does not look at them."""
        return self._read()


class Prepared(Protocol):
    """Memories made ready to be written: what can be worked out before the transaction is."""


@dataclass(frozen=True)
class Written:
    """What a write answers."""

    memories: list[Memory]
    """As they are now, in the order in which they were given."""
    new: int
    """How many of them were not there before."""
    replayed: bool = False
    """Whether an earlier equal call had written them."""


class Memories(Protocol):
    """Long-term memory. Every call is about one tenant, and sees nothing of another's."""

    async def add(self, tenant: Tenant, memories: Sequence[NewMemory]) -> list[Added]:
        """Write them all or none, in their order; found by their text when this returns, and by
        their vector soon after.

        A memory with a key takes the place of the one that has it. Raises ``InvalidRequest``
        for more than ``MAX_BATCH``. An id is its tenant's own: another may have the same.
        """

    def prepare(self, memories: Sequence[NewMemory]) -> Prepared:
        """The part of ``add`` before its transaction. Takes about 30 µs a memory: call it in a
        thread for many."""

    def insert(self, connection: Connection, tenant: Tenant, prepared: Prepared) -> list[Added]:
        """The transaction of ``add``, as part of the caller's: a memory commits with its step."""

    async def get(self, tenant: Tenant, memory_id: str) -> Memory:
        """The version that holds (of a superseded memory: its last). Raises ``NotFound``."""

    async def history(self, tenant: Tenant, memory_id: str) -> list[Memory]:
        """Every version, oldest first. Raises ``NotFound``."""

    async def page(
        self, tenant: Tenant, filter: MemoryFilter, *, limit: int, cursor: str | None
    ) -> MemoryPage:
        """Newest first. Raises ``InvalidCursor``."""

    async def edit(
        self,
        tenant: Tenant,
        memory_id: str,
        change: MemoryChange,
        *,
        source: MemorySource,
        expected_version: int | None = None,
        fence: Fence | None = None,
    ) -> Memory:
        """A new version; the old one stays in the history. Raises ``NotFound``,
        ``PreconditionFailed`` when the version that holds is another than expected, and
        ``Conflict`` for a superseded memory. ``fence`` is as in ``used``."""

    async def delete(
        self, tenant: Tenant, memory_ids: Sequence[str], *, expected_version: int | None = None
    ) -> int:
        """Erase each with all its versions, pieces, vectors and uses; how many there were.

        Nothing of them is left in the database file. Unknown ids are passed over. Raises
        ``PreconditionFailed`` like ``edit``.
        """

    async def delete_where(self, tenant: Tenant, filter: MemoryFilter) -> int:
        """Erase all that the filter is about, superseded ones included."""

    async def search(self, tenant: Tenant, query: MemoryQuery) -> list[Found]:
        """The best ``query.limit``, best first. Any text is a valid query; one without a word
        finds nothing. With mode ``vector`` and no embedder: ``InvalidRequest``; while none gives a
        vector that fits: ``Unavailable``."""

    async def neighbours(
        self, tenant: Tenant, memory_id: str, *, before: int = 2, after: int = 2
    ) -> list[Memory]:
        """What stands around it in its session, in order, without itself; [] without a session.
        Raises ``NotFound``."""

    async def used(
        self, tenant: Tenant, uses: Sequence[MemoryUse], *, fence: Fence | None = None
    ) -> set[str]:
        """Remember that runs recalled these; which of them are still there. Of the others nothing
        is remembered, and nobody may be told of them any more. The same step is kept once.

        The transaction begins with ``fence``, and comes to nothing where that raises.
        """

    async def used_by(self, tenant: Tenant, memory_id: str, *, limit: int = 100) -> list[MemoryUse]:
        """Which runs recalled it, newest first. Raises ``NotFound``."""

    def erase_subject(
        self,
        connection: Connection,
        tenant: Tenant,
        subject: str,
        *,
        run_ids: Collection[str] = (),
        session_ids: Collection[str] = (),
    ) -> MemoriesErased:
        """Erase one person's memories, and those that the runs wrote or the sessions hold, as part
        of the caller's transaction."""

    def export(
        self, tenant: Tenant, filter: MemoryFilter, *, batch: int = 500
    ) -> AsyncIterator[Memory]:
        """Everything the filter is about, oldest first, pieces included, without holding a
        transaction open."""

    async def sweep(self, now: datetime) -> int:
        """Erase what has expired, of every tenant; how many."""

    async def stats(self, tenant: Tenant) -> MemoryStats:
        """How much is kept."""
