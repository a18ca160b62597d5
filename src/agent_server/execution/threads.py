"""The threads in which tools work that are no coroutines: nothing can stop one, and none holds up
the end of the process.

Leans on the standard library's pool, which waits for its threads at the end of a loop and of the
interpreter. Refuses to know what runs in them: for the ledger such a call is one that was cut off.
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import structlog

NAME = "tool"
IDLE_S = 0.2
"""Within which a thread that has nothing to do is gone."""

log = structlog.get_logger(__name__)


class ToolThreads(ThreadPoolExecutor):
    """A pool whose end waits for nobody."""

    def __init__(self, most: int) -> None:
        super().__init__(most, thread_name_prefix=NAME)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def leave_working() -> None:
    """End the process at once if a tool is still at work in a thread; return if none is.

    For the very end of a process that has stopped in order: the interpreter would wait for it.
    """
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(f"{NAME}_")]
    until = time.monotonic() + IDLE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    working = sum(thread.is_alive() for thread in threads)
    if working:
        log.warning("tools that cannot be stopped were left behind", tools=working)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
