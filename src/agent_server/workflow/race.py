"""Work side by side whose end does not depend on who is faster, or is asked for that only once.

Leans on anyio's task groups. Refuses to know what the work is, but for its place in the order.
"""

from collections.abc import Awaitable, Callable

import anyio
import anyio.abc

from agent_server.workflow.failures import BrokenOff, Failed


class Race:
    """Work side by side where the first in the order decides, however fast the others are.

    A failure calls off what comes later in the order, unless ``drain``. Errors that are not a
    node's failure call everything off.
    """

    def __init__(self, drain: bool) -> None:
        self._drain = drain
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._failed: Failed | None = None
        self._fatal: Exception | None = None
        self._broken: dict[int, BrokenOff] = {}
        self.first = -1
        """The place in the order of the failure that decides."""
        self.group: anyio.abc.TaskGroup | None = None

    async def run(self, rank: int, work: Callable[[], Awaitable[list[int]]]) -> list[int]:
        """``work()``'s result; nothing if it failed, was called off or is not to start."""
        if self._fatal is not None or (self._failed and rank > self.first and not self._drain):
            return []
        with anyio.CancelScope() as scope:
            self._scopes[rank] = scope
            try:
                return await work()
            except Failed as failed:
                self._fail(rank, failed)
            except BrokenOff as broken:
                self._broken[rank] = broken
            except Exception as error:
                self._fatal = self._fatal or error
                assert self.group is not None
                self.group.cancel_scope.cancel()
            finally:
                del self._scopes[rank]
        return []

    def _fail(self, rank: int, failed: Failed) -> None:
        if self._failed is None or rank < self.first:
            self.first, self._failed = rank, failed
            for other, scope in self._scopes.items():
                if other > rank and not self._drain:
                    scope.cancel()

    def settle(self) -> Failed | None:
        """The failure that decides. Raises an error that is not a node's, and ``BrokenOff`` for
        what nothing here has broken off."""
        if self._fatal is not None:
            raise self._fatal
        for rank, broken in self._broken.items():
            if self._failed is None or rank < self.first:
                raise broken
        return self._failed


class Quorum:
    """Work side by side until ``wanted`` of ``count`` have succeeded, or too few are left."""

    def __init__(self, wanted: int, count: int) -> None:
        self._wanted = wanted
        self._count = count
        self._broken: list[BrokenOff] = []
        self._fatal: Exception | None = None
        self.arrived: list[int] = []
        """Who succeeded, in the order in which they came."""
        self.failed: dict[int, Failed] = {}
        self.group: anyio.abc.TaskGroup | None = None

    @property
    def settled(self) -> bool:
        lost = len(self.failed) + len(self._broken)
        enough = len(self.arrived) == self._wanted or self._count - lost < self._wanted
        return enough or self._fatal is not None

    async def run(self, number: int, work: Callable[[], Awaitable[None]]) -> None:
        """``work()``, if it still matters; whoever settles it cancels the others."""
        if self.settled:
            return
        try:
            await work()
        except Failed as failed:
            self.failed[number] = failed
        except BrokenOff as broken:
            self._broken.append(broken)
        except Exception as error:
            self._fatal = self._fatal or error
        else:
            if not self.settled:
                self.arrived.append(number)
        if self.settled:
            assert self.group is not None
            self.group.cancel_scope.cancel()

    def settle(self) -> bool:
        """Whether enough have succeeded. Raises what is not a node's failure."""
        if self._fatal is not None:
            raise self._fatal
        if len(self.arrived) == self._wanted:
            return True
        if self._broken:
            raise self._broken[0]
        return False
