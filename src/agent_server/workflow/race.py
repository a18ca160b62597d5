"""Work side by side whose end does not depend on who is faster.

Leans on anyio's task groups. Refuses to know what the work is, but for its place in the order.
"""

from collections.abc import Awaitable, Callable

import anyio
import anyio.abc

from agent_server.domain.errors import ErrorInfo


class Failed(Exception):
    """A node failed and its policy lets nobody go on."""

    def __init__(self, node_id: str, path: str, error: ErrorInfo) -> None:
        super().__init__(node_id)
        self.node_id = node_id
        self.path = path
        self.error = error


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
        """The failure that decides. Raises an error that is not a node's."""
        if self._fatal is not None:
            raise self._fatal
        return self._failed
