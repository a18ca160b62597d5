"""A chat session as one run sees it: the committed history, and what the run adds, held back.

Leans on a store that can read a session's items. Refuses to write: what is staged is stored by
the engine in the transaction that ends the run, so that history and outcome agree after any
crash.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Protocol

from agents.memory import SessionSettings

from agent_server.domain.base import JsonObject
from agent_server.memory.items import CALLS, is_output


class SessionStore(Protocol):
    """Where sessions are kept."""

    async def items(self, session_id: str) -> list[JsonObject]:
        """The committed items of the session, oldest first; none for a session not seen yet."""


Shorten = Callable[[list[JsonObject]], Awaitable[list[JsonObject] | None]]
"""What a model is shown in place of a history; None: the history itself."""


class StagedSession:
    """The SDK's ``Session`` for one run.

    The history is read once: one run at a time works on a session, so that it cannot change
    under the run, and replay reads the same. ``shortened`` says, once it was read, that it is not
    all that was said. Items added are staged, in memory alone.
    ``pop_item`` and ``clear_session`` reach staged items only, never what is committed.
    """

    session_settings: SessionSettings | None = None

    def __init__(
        self, store: SessionStore, session_id: str, *, shorten: Shorten | None = None
    ) -> None:
        self.session_id = session_id
        self.shortened = False
        self._store = store
        self._shorten = shorten
        self._history: list[JsonObject] | None = None
        self._staged: list[Any] = []

    async def get_items(self, limit: int | None = None) -> list[Any]:
        """The history and what this run staged, oldest first; the latest ``limit`` of them."""
        if self._history is None:
            self._history = await self._store.items(self.session_id)
            shown = await self._shorten(self._history) if self._shorten and self._history else None
            if shown is not None:
                self._history, self.shortened = shown, True
        items = [*self._history, *self._staged]
        if limit is None:
            return items
        return items[-limit:] if limit > 0 else []

    async def add_items(self, items: list[Any]) -> None:
        self._staged.extend(items)

    async def pop_item(self) -> Any | None:
        return self._staged.pop() if self._staged else None

    async def clear_session(self) -> None:
        self._staged.clear()

    def staged(self, pending: Collection[str] = ()) -> list[JsonObject]:
        """What to commit: every call of a tool together with its output, or not at all; but for
        the calls ``pending``, whose output the caller is going to bring."""
        return complete(self._staged, self._history or (), pending)


def complete(
    items: Iterable[JsonObject],
    before: Iterable[JsonObject] = (),
    pending: Collection[str] = (),
) -> list[JsonObject]:
    """``items`` without calls that have no output and outputs that have no call, here or in
    ``before``; the calls ``pending`` are kept.

    A model refuses a history that holds one without the other.
    """
    kept = list(items)
    calls = {item.get("call_id") for item in (*before, *kept) if item.get("type") in CALLS}
    outputs = {item.get("call_id") for item in kept if is_output(item)}
    both = (calls & outputs) | set(pending)
    return [
        item
        for item in kept
        if item.get("call_id") in both or not (item.get("type") in CALLS or is_output(item))
    ]
