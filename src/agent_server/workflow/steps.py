"""How many nodes may be carried out: by a workflow, and by a run with all its sub-workflows.

Leans on the domain's errors alone. Refuses to be exact across processes: each counts what it carries
out itself, and beside it the engine counts the run's tasks, wherever they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agent_server.domain.errors import WorkflowLimit

MAX_NODES: Final = 10_000
"""Nodes that one run may carry out where no setting says."""


class Steps:
    """What is left to the workflows of one run in this process: each iteration, item and attempt
    counts."""

    def __init__(self, most: int = MAX_NODES) -> None:
        self.most = most
        self._taken: dict[str, int] = {}
        self._sum = 0
        self.users = 0

    def begin(self, path: str) -> None:
        """The workflow at ``path`` begins, or begins again after a crash: it counts from nothing."""
        self._sum -= self._taken.pop(path, 0)

    def take(self, path: str, nodes: int = 1) -> None:
        """The workflow at ``path`` carries out so many more. Raises ``WorkflowLimit``."""
        self.need(nodes)
        self._taken[path] = self._taken.get(path, 0) + nodes
        self._sum += nodes

    def need(self, nodes: int) -> None:
        """Raises ``WorkflowLimit`` unless there is room for so many more."""
        if self._sum + nodes > self.most:
            raise WorkflowLimit(
                f"The workflows of this run would carry out more than {self.most} nodes; each "
                "iteration, item, attempt and sub-workflow counts.",
                hint="Lower the bounds of its loops, map over fewer items, split it, or raise "
                "AGENT_SERVER_MAX_RUN_NODES.",
            )


class Trees:
    """The steps of each run of which this process carries out a workflow just now."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._steps: dict[str, Steps] = {}

    @contextmanager
    def steps(self, run_id: str, path: str) -> Iterator[Steps]:
        """The run's steps, while the workflow at ``path`` is carried out."""
        found = self._steps.setdefault(run_id, Steps(self._most))
        found.users += 1
        found.begin(path)
        try:
            yield found
        finally:
            found.users -= 1
            if not found.users:
                del self._steps[run_id]
