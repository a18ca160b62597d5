"""Where a tool of the tests waits until its test lets it go on; in this process only."""

import asyncio


class Gate:
    """Made anew for each test: events belong to one loop."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def hold(self) -> str:
        self.reached.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "through"


current: list[Gate] = []
