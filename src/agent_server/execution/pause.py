"""Waiting for a nudge, or for so long: what every loop of the engine does between two looks.

Leans on asyncio alone. Refuses ``wait_for``, which up to Python 3.11 may swallow a cancellation
that comes together with what is waited for: the loop would never end.
"""

import asyncio


async def wait_nudged(nudge: asyncio.Event, at_most_s: float) -> None:
    """Return when ``nudge`` is set or ``at_most_s`` have passed; it is clear again then."""
    timer = asyncio.get_running_loop().call_later(at_most_s, nudge.set)
    try:
        await nudge.wait()
        nudge.clear()
    finally:
        timer.cancel()
