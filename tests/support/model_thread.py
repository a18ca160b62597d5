"""The model server in a thread of its own, for tests that wait for processes and not for loops.

Leans on ``model_server``. Refuses patience: every wait has a bound.
"""

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tests.support.model_server import Json, ModelServer


class ModelThread:
    """``with ModelThread() as models: models.base_url``; scripts may be changed at any time."""

    def __enter__(self) -> "ModelThread":
        self._changed = threading.Condition()
        started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(started),))
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        async with ModelServer() as self.server:
            self.server.on_change = self._notify
            self.base_url = self.server.base_url
            started.set()
            await self._over.wait()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def script(self, *rules: Json, **script: Any) -> None:
        """Answer by these rules from now on, and forget the calls so far."""
        done = threading.Event()

        def change() -> None:
            self.server.script({"rules": list(rules), **script})
            self.server.raw_calls.clear()
            done.set()

        self._loop.call_soon_threadsafe(change)
        assert done.wait(10)

    def release(self) -> None:
        """See ``ModelServer.release``."""
        self._loop.call_soon_threadsafe(self.server.release)

    @property
    def calls(self) -> list[Json]:
        """The request bodies since the script was set, in the order they came."""
        return self.server.calls

    def wait(self, what: Callable[[ModelServer], bool], timeout_s: float = 15) -> None:
        """Return when ``what`` holds; it is asked whenever a request or a connection changed."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: what(self.server), timeout_s
            ), f"{len(self.server.raw_calls)} calls, {self.server.unanswered} unanswered"


def rule(match: str, *steps: Json) -> Json:
    """What is answered, round by round, to a conversation whose last message matches."""
    return {"match": match, "steps": list(steps)}


def calling(*calls: tuple[str, Any], **reply: Any) -> Json:
    """A reply that calls tools: ``calling(("add", {"a": 1}))``."""
    return {"tool_calls": [{"name": n, "arguments": a} for n, a in calls], **reply}
