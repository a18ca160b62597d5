"""Identifiers: a prefix that says what it names, and a UUIDv7 that sorts by time.

Leans on uuid6 for UUIDv7 (RFC 9562). Refuses to know what an id points at.
"""

from hashlib import sha256
from typing import Final, NewType

from uuid6 import uuid7

RunId = NewType("RunId", str)
TaskId = NewType("TaskId", str)
Tenant = NewType("Tenant", str)

DEFAULT_TENANT: Final = Tenant("default")


def new_id(prefix: str) -> str:
    """``prefix_`` and 32 hexadecimal digits; ids made later sort later."""
    return f"{prefix}_{uuid7().hex}"


def new_run_id() -> RunId:
    return RunId(new_id("run"))


def task_id(run_id: str, path: str) -> TaskId:
    """The id of the task at ``path``: derived, so that a replay names the same task."""
    return TaskId(derived_id("task", run_id, path))


def derived_id(prefix: str, owner: str, name: str) -> str:
    """A UUIDv7 too, but always the same for the same ``name``: of the moment at which the id
    ``owner`` was made, and of what is theirs alone."""
    moment = int(owner.rpartition("_")[2], 16) >> 80
    chance = sha256(f"{owner}/{name}".encode("utf-8", "surrogatepass")).hexdigest()
    variant = "89ab"[int(chance[4], 16) & 0b11]
    return f"{prefix}_{moment:012x}7{chance[1:4]}{variant}{chance[5:20]}"


def task_path(run_id: str, task: str, step: str) -> str:
    """The path of ``task``, given the key of one of its steps, which begins with it."""
    parts = step.split("/")
    for count in range(1, len(parts)):
        path = "/".join(parts[:count])
        if task_id(run_id, path) == task:
            return path
    return parts[0]
