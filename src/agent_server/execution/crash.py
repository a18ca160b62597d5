"""Named points at which a test may kill the process, to prove that nothing is lost there.

``AGENT_SERVER_TEST_CRASH_AT=name`` or ``name:3`` (the third time) makes the process send itself
SIGKILL at that point. Leans on nothing; refuses to do anything when the variable is not set.
"""

import os
import signal
from typing import Final

POINTS: Final = (
    "submit.before_commit",
    "submit.after_commit",
    "task.claimed",
    "step.before_begin",
    "step.after_begin",
    "step.before_finish",
    "step.after_finish",
    "child.before_insert",
    "child.after_insert",
    "task.before_end",
    "task.after_end",
    "run.before_end",
    "run.after_end",
)
"""Every point, so that the crash test covers all of them."""
BLOB_POINTS: Final = ("blob.after_put", "blob.after_enter")
"""Points that only a large value passes."""

_name = ""
_left = 0


def arm(where: str) -> None:
    """Die at the point ``where`` (``name`` or ``name:count``); empty disarms."""
    global _name, _left
    _name, _, count = where.partition(":")
    if _name and _name not in (every := (*POINTS, *BLOB_POINTS)):
        raise ValueError(f"there is no crash point {_name!r}; there are {', '.join(every)}")
    _left = int(count or 1)


def crash_point(name: str) -> None:
    """Die here, if the environment says so."""
    global _left
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("AGENT_SERVER_TEST_CRASH_AT", ""))
