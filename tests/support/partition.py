"""A TCP proxy that holds everything back while a partition lasts, and delivers it afterwards.

Leans on asyncio. Refuses to understand what it carries; nothing is closed and nothing is lost,
which is what a network that comes back looks like to both ends.
"""

import asyncio
from contextlib import suppress


class Partition:
    """``async with Partition(port) as proxy``: ``proxy.port`` leads to ``port``."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Partition":
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin(self) -> None:
        """From now on nothing arrives."""
        self._whole.clear()

    def end(self) -> None:
        """What was held back arrives, and everything after it."""
        self._whole.set()

    async def _carry(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server, forth = await asyncio.open_connection("127.0.0.1", self._target)
        for source, target in ((client, forth), (server, back)):
            task = asyncio.create_task(self._pour(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pour(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):
                while piece := await source.read(65536):
                    await self._whole.wait()
                    target.write(piece)
                    await target.drain()
        finally:
            target.close()
