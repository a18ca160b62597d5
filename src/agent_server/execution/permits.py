"""Permits: so many at once of whatever has a name, over all nodes.

Leans on the store. Refuses to know what is limited. A permit is a row that goes with its holder's
node; who waits for one takes no worker slot, and of each node only the first in line looks.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import anyio
import structlog

from agent_server.domain.ids import new_id
from agent_server.execution import store
from agent_server.execution.commits import PASSING, PATIENCE_S
from agent_server.execution.pause import wait_nudged
from agent_server.execution.ports import TaskContext
from agent_server.storage.database import Database

log = structlog.get_logger(__name__)

LOOK_S = 0.25
"""How often the first in line looks whether another node gave a permit back."""
_HELD: ContextVar[frozenset[str]] = ContextVar("agent_server_permits", default=frozenset())


@runtime_checkable
class Idles(Protocol):
    """A task's context that can give its worker slot away for a while."""

    def idle(self) -> AbstractContextManager[None]: ...


def idle(ctx: TaskContext) -> AbstractContextManager[None]:
    """While in it, the task takes no worker slot, where it had one."""
    return ctx.idle() if isinstance(ctx, Idles) else nullcontext()


class _Line:
    """Those of this node who want a permit of one name."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.freed = asyncio.Event()
        self.members = 0


class Permits:
    """One per node; used on its loop."""

    def __init__(self, database: Database, node: Callable[[], str]) -> None:
        self._database = database
        self._node = node
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def hold(self, ctx: TaskContext, name: str, most: int) -> AsyncIterator[None]:
        """Hold one of ``most`` permits of that name; waits until there is one.

        Whoever holds one already is let through: a tool that comes to call itself would wait for
        itself for ever.
        """
        if held(name):
            yield
            return
        holder = await self.take(ctx, name, most)
        with holding(name):
            try:
                yield
            finally:
                await self.give_back(name, holder)

    async def take(self, ctx: TaskContext, name: str, most: int) -> str:
        """One of ``most`` permits of that name, when there is one; to be given back."""
        holder = new_id("permit")
        line = self._lines.setdefault(name, _Line())
        line.members += 1
        try:
            if not line.turn.locked() and await self._try(name, holder, most):
                return holder
            with idle(ctx):
                async with line.turn:
                    while not await self._try(name, holder, most):
                        await wait_nudged(line.freed, LOOK_S)
            return holder
        finally:
            line.members -= 1
            if not line.members:
                self._lines.pop(name, None)

    async def _try(self, name: str, holder: str, most: int) -> bool:
        """Cancelled, it takes none: the transaction goes on by itself, and is undone."""
        trying = asyncio.ensure_future(
            self._database.write(lambda c: store.take_permit(c, name, holder, self._node(), most))
        )
        try:
            return await asyncio.shield(trying)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([trying])
            await self.give_back(name, holder)
            raise

    async def give_back(self, name: str, holder: str) -> None:
        """Let another have it, also when cancelled, and when the database is away for a while."""
        with anyio.CancelScope(shield=True):
            for tries_left in reversed(range(int(PATIENCE_S / LOOK_S))):
                try:
                    await self._database.write(lambda c: store.give_permit_back(c, name, holder))
                    break
                except PASSING as error:
                    if not tries_left:
                        log.error("permit not given back", name=name, error=error.detail)
                    await asyncio.sleep(LOOK_S)
        line = self._lines.get(name)
        if line is not None:
            line.freed.set()


def held(name: str) -> bool:
    """Whether the present code holds a permit of that name."""
    return name in _HELD.get()


@contextmanager
def holding(name: str) -> Iterator[None]:
    """What is in it holds one, and whatever it starts."""
    token = _HELD.set(_HELD.get() | {name})
    try:
        yield
    finally:
        _HELD.reset(token)
