"""How nodes fail: what stops a workflow, what a repeat may mend, and what may have happened all the same.

Leans on the domain's errors. Refuses to know how nodes are carried out.
"""

from collections.abc import Mapping
from typing import Any, Final

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import (
    LASTING,
    BudgetExceeded,
    ErrorInfo,
    RunCancelled,
    RunError,
    TaskFailed,
    TaskTimeout,
    error_codes,
)
from agent_server.domain.workflows import Node

FATAL: Final = {BudgetExceeded.code: BudgetExceeded, RunCancelled.code: RunCancelled}
"""Errors that end the run whatever a node's policy says."""
UNKNOWN: Final = "unknown"
"""How a node counts that began and of which nobody knows whether it has happened."""
_UNDOES_ITSELF: Final = ("workflow", "wait", "approval")


class Failed(Exception):
    """A node failed and its policy lets nobody go on."""

    def __init__(self, node_id: str, path: str, error: ErrorInfo) -> None:
        super().__init__(node_id)
        self.node_id = node_id
        self.path = path
        self.error = error


class BrokenOff(Exception):
    """A task was cancelled before, by what decided here and will decide again on this replay."""


class NodeFailed(TaskFailed):
    """A node failed, and with it the workflow.

    ``finished`` has the outputs of the outermost nodes that succeeded (null for those that were
    skipped); handed to another ``run_workflow``, they are not carried out again.
    """

    def __init__(
        self, node_id: str, path: str, error: ErrorInfo, finished: Mapping[str, Any]
    ) -> None:
        super().__init__(
            f"Node {node_id!r} failed: {error.message}", hint=error.hint, errors=error.errors
        )
        self.node_id = node_id
        self.path = path
        self.error = error
        self.finished = dict(finished)


def error_of(told: JsonObject) -> RunError:
    """The error that ``ErrorInfo`` as JSON tells of."""
    info = ErrorInfo.model_validate(told)
    error = error_codes()[info.code](info.message, hint=info.hint, errors=info.errors)
    assert isinstance(error, RunError)
    return error


def in_doubt(node_type: str, code: str | None) -> bool:
    """Whether a node may have happened that ended with this error, or (None) was broken off."""
    return node_type not in _UNDOES_ITSELF and code in (None, TaskTimeout.code)


def worth_retrying(node: Node, error: ErrorInfo, attempt: int) -> bool:
    """Whether a repeat may mend it, or the node asks for one in so many words."""
    retry = node.retry
    if retry is None or attempt > retry.max_attempts:
        return False
    if retry.on:
        return error.code in retry.on
    return error.code not in LASTING


def timed_out(node_id: str, timeout_s: float) -> TaskTimeout:
    return TaskTimeout(
        f"Node {node_id!r} was not done after {timeout_s:g} s.",
        hint="Raise its timeout_s, or give it a retry.",
    )
