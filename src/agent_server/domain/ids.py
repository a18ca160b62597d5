"""Identifiers: a prefix that says what it names, and a UUIDv7 that sorts by time.

Leans on uuid6 for UUIDv7 (RFC 9562). Refuses to know what an id points at.
"""

from typing import Final, NewType

from uuid6 import uuid7

RunId = NewType("RunId", str)
TaskId = NewType("TaskId", str)
StepKey = NewType("StepKey", str)
"""A path inside a run, such as ``2.1/model/3``: the same effect has the same key on replay."""
Tenant = NewType("Tenant", str)

DEFAULT_TENANT: Final = Tenant("default")


def new_id(prefix: str) -> str:
    """``prefix_`` and 32 hexadecimal digits; ids made later sort later."""
    return f"{prefix}_{uuid7().hex}"


def new_run_id() -> RunId:
    return RunId(new_id("run"))


def task_id(run_id: RunId, path: str) -> TaskId:
    """The id of the task at ``path``: derived, so that replay names the same task."""
    return TaskId(f"task_{run_id.removeprefix('run_')}.{path}")
