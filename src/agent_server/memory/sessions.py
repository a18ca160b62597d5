"""A chat session as one run sees it: the committed history, and what the run adds, held back.

Leans on a store that can read a session's items. Refuses to write: what is staged is stored by
the engine in the transaction that ends the run, so that history and outcome agree after any
crash.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from agents.memory import SessionSettings

from agent_server.domain.base import JsonObject


class SessionStore(Protocol):
    """Where sessions are kept."""

    async def items(self, session_id: str) -> list[JsonObject]:
        """The committed items of the session, oldest first; none for a session not seen yet."""


class StagedSession:
    """The SDK's ``Session`` for one run.

    The history is read once: one run at a time works on a session, so that it cannot change
    under the run, and replay reads the same. Items added are staged, in memory alone.
    ``pop_item`` and ``clear_session`` reach staged items only, never what is committed.
    """

    session_settings: SessionSettings | None = None

    def __init__(self, store: SessionStore, session_id: str) -> None:
        self.session_id = session_id
        self._store = store
        self._history: list[JsonObject] | None = None
        self._staged: list[Any] = []

    async def get_items(self, limit: int | None = None) -> list[Any]:
        """The history and what this run staged, oldest first; the latest ``limit`` of them."""
        if self._history is None:
            self._history = await self._store.items(self.session_id)
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

    def staged(self) -> list[JsonObject]:
        """What to commit: every call of a tool together with its output, or not at all."""
        return complete(self._staged)


_CALLS = frozenset(
    {
        "function_call",
        "computer_call",
        "local_shell_call",
        "shell_call",
        "apply_patch_call",
        "custom_tool_call",
    }
)


def complete(items: Iterable[JsonObject]) -> list[JsonObject]:
    """``items`` without calls that have no output and outputs that have no call.

    A model refuses a history that holds one without the other.
    """
    kept = list(items)
    calls = {item.get("call_id") for item in kept if item.get("type") in _CALLS}
    outputs = {item.get("call_id") for item in kept if _is_output(item)}
    both = calls & outputs
    return [
        item
        for item in kept
        if item.get("call_id") in both or not (item.get("type") in _CALLS or _is_output(item))
    ]


def _is_output(item: JsonObject) -> bool:
    kind = item.get("type")
    return isinstance(kind, str) and kind.removesuffix("_output") in _CALLS and kind not in _CALLS
