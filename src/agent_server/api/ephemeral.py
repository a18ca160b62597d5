"""A run that is not stored, read as it happens.

Leans on ``RunsPort`` and on the live side of the event log. Refuses to outlive its reader: when
the reader goes, the run is cancelled, since there is nothing to come back to. For the same reason
no reader is cut off as too slow: what waits for it is no more than the one answer.
"""

import math
from collections.abc import AsyncIterator

import anyio
from anyio.abc import TaskGroup
from typing_extensions import Self

from agent_server.api.ports import RunsPort
from agent_server.domain.ids import Tenant
from agent_server.domain.runs import RunRequest
from agent_server.execution.events import StoredEvent, Subscription
from agent_server.execution.ports import SignalReceived


class EphemeralFollow:
    """Runs ``request`` while it is entered. Entering raises what the run refuses at once."""

    def __init__(
        self,
        runs: RunsPort,
        request: RunRequest,
        tenant: Tenant,
        principal: str,
        steers: list[SignalReceived] | None = None,
    ) -> None:
        self._steers = steers
        self._runs = runs
        self._request = request
        self._tenant = tenant
        self._principal = principal
        self._events = Subscription(math.inf)
        self._first: list[StoredEvent] = []
        self._tasks: TaskGroup | None = None
        self._ended = False
        self._emptied = False
        self._refused: Exception | None = None

    lagged = False

    async def __aenter__(self) -> Self:
        tasks = anyio.create_task_group()
        self._tasks = await tasks.__aenter__()
        tasks.start_soon(self._run)
        try:
            self._first = await self._take()
            if self._refused is not None and not self._first:
                raise self._refused
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        # The group is not told of the error: it would wrap what is to pass as it is.
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def _run(self) -> None:
        try:
            await self._runs.run_ephemeral(
                self._request,
                tenant=self._tenant,
                principal=self._principal,
                on_event=self._events.put,
                steers=self._steers,
            )
        except Exception as error:  # told to the reader by whoever takes from the queue
            self._refused = error
        finally:
            self._ended = True
            self._events.nudge()

    async def _take(self) -> list[StoredEvent]:
        """Wait for events; empty when there will be none."""
        while not self._emptied:
            taken, _ = await self._events.get()
            self._emptied = self._ended
            if taken:
                return taken
        return []

    async def batches(self) -> AsyncIterator[list[StoredEvent]]:
        batch = self._first
        while batch:
            yield batch
            batch = await self._take()
        if self._refused is not None:
            raise self._refused
