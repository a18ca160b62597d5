"""A TCP proxy that cuts connections in the middle of an answer, as a busy load balancer does.

Leans on asyncio. Refuses to understand what it carries: it counts bytes and hangs up.
"""

import asyncio
from contextlib import suppress


class CuttingProxy:
    """``async with CuttingProxy(port, [900, 2000]) as proxy: proxy.url``.

    The n-th connection is cut after so many bytes of answers; those after the last are not.
    """

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._port = port
        self._cuts = cuts
        self.connections = 0
        self.cut = 0
        self._open: dict[asyncio.StreamWriter, asyncio.Event] = {}

    async def __aenter__(self) -> "CuttingProxy":
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for forth, gone in list(self._open.items()):
            forth.transport.abort()
            await gone.wait()

    async def _carry(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        left = self._cuts[number] if number < len(self._cuts) else None
        server, forth = await asyncio.open_connection("127.0.0.1", self._port)
        gone = self._open[forth] = asyncio.Event()
        asking = asyncio.create_task(_pour(client, forth))
        try:
            with suppress(ConnectionError):
                while piece := await server.read(65536):
                    back.write(piece if left is None else piece[:left])
                    await back.drain()
                    if left is not None:
                        left -= len(piece)
                        if left <= 0:
                            self.cut += 1
                            back.transport.abort()
                            return
        finally:
            asking.cancel()
            back.close()
            forth.close()
            del self._open[forth]
            gone.set()


async def _pour(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while piece := await source.read(65536):
            target.write(piece)
            await target.drain()
