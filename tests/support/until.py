"""Waiting for what a test cannot be told of: looked at again and again, under a bound.

Leans on the clock alone. Refuses to wait for a time instead of a state.
"""

import inspect
from collections.abc import Callable
from typing import Any

import anyio

LOOK_S = 0.005


async def until(holds: Callable[[], Any], within_s: float = 20) -> Any:
    """What ``holds`` answers, or what its awaitable gives, once that is true.

    Raises ``TimeoutError`` after ``within_s`` seconds.
    """
    with anyio.fail_after(within_s):
        while True:
            found = holds()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await anyio.sleep(LOOK_S)
