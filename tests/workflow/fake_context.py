"""A task context in memory whose children end when, and how, the test says.

Leans on the contract of durable code alone. ``World`` is what outlives a crash: the children that
ended. A context made again on the same world is the replay.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ErrorInfo, RunError, ToolError, error_info
from agent_server.domain.ids import DEFAULT_TENANT, new_run_id
from agent_server.domain.runs import RunRequest
from agent_server.execution.ports import RunSnapshot, StepRecord, TaskOutcome, TaskSpec
from agent_server.workflow.failures import timed_out
from agent_server.workflow.ports import NoStoredWorkflows
from agent_server.workflow.tasks import WorkflowRun

Work = Callable[[TaskSpec], Any]
"""What a child does: returns its output or raises ``RunError``."""
WORKFLOWS = WorkflowRun(max_parallel=3, stored=NoStoredWorkflows())


class Crash(Exception):
    """The process dies."""


@dataclass
class World:
    """What is stored."""

    work: Work
    ended: dict[str, TaskOutcome] = field(default_factory=dict)
    specs: dict[str, TaskSpec] = field(default_factory=dict)
    carried_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Where a node failed that was no task then."""
    """Paths in the order in which they were carried out; a path twice is a repeated effect."""
    skipped: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    """What was decided once, by task and key."""

    @property
    def paths(self) -> set[str]:
        return set(self.specs)


@dataclass
class _Process:
    """What ends with a crash: who waits for its turn, and who may have it."""

    random: Random | None
    crash_after: int | None
    hold: frozenset[str]
    waiting: dict[str, asyncio.Event] = field(default_factory=dict)
    chooser: asyncio.Task[None] | None = None
    dead: bool = False
    most_at_once: int = 0

    async def turn(self, path: str) -> None:
        """Return when it is this child's turn to end. Raises ``Crash``."""
        event = self.waiting[path] = asyncio.Event()
        self.most_at_once = max(self.most_at_once, len(self.waiting))
        if self.chooser is None or self.chooser.done():
            self.chooser = asyncio.ensure_future(self._choose())
        try:
            await event.wait()
        finally:
            self.waiting.pop(path, None)
        if self.crash_after is not None:
            if self.crash_after == 0 or self.dead:
                self.dead = True
                raise Crash
            self.crash_after -= 1

    async def _choose(self) -> None:
        """Lets one waiting child after the other end, once nobody starts new ones."""
        while True:
            for _ in range(5):
                await asyncio.sleep(0)
            open_ = [p for p, e in self.waiting.items() if not e.is_set() and p not in self.hold]
            if not open_:
                return
            path = self.random.choice(open_) if self.random else open_[0]
            self.waiting[path].set()


class FakeContext:
    """See ``ports.TaskContext``. Children end one at a time, in an order that ``random`` picks;
    after ``crash_after`` of them the process dies. A child that waits for a signal never ends, and
    one that is a workflow is carried out by the real handler."""

    def __init__(
        self,
        world: World,
        *,
        random: Random | None = None,
        crash_after: int | None = None,
        hold: frozenset[str] = frozenset(),
        workflow: Any = "fake",
        within: "FakeContext | None" = None,
        spec: TaskSpec | None = None,
    ) -> None:
        self.world = world
        self.run = RunSnapshot(
            id=new_run_id(),
            tenant=DEFAULT_TENANT,
            request=RunRequest(workflow=workflow),
            created_at=utcnow(),
        )
        self.path = "" if spec is None else spec.path
        self.node = "" if spec is None else spec.node
        self.payload: dict[str, Any] = {} if spec is None else spec.payload
        self.attempt = 1
        self.broken_off: set[str] = set()
        self._process = within._process if within else _Process(random, crash_after, hold)

    @property
    def most_at_once(self) -> int:
        return self._process.most_at_once

    @property
    def journal(self) -> Any:
        return self

    def recorded(self) -> Any:
        """The interpreter looks at its own decisions alone, and writes nothing itself."""
        return {
            key: StepRecord(key=key, kind="value", name=key, output=value)
            for (task, key), value in self.world.values.items()
            if task == self.path
        }

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        if spec.path in self.world.ended and spec.hidden:
            return self.world.ended[spec.path]
        if spec.kind == "fault":
            self.world.faults.append(spec.path)
            return TaskOutcome("failed")
        known = self.world.specs.setdefault(spec.path, spec)
        assert (known.kind, known.node, known.payload) == (spec.kind, spec.node, spec.payload)
        if spec.path in self.world.ended:
            return self.world.ended[spec.path]
        try:
            if spec.kind == "workflow":
                outcome = await self._workflow(spec)
            else:
                outcome = await self._leaf(spec)
        except asyncio.CancelledError:
            self.broken_off.add(spec.path)
            if not self._process.dead:
                self.world.ended[spec.path] = TaskOutcome("cancelled")
            raise
        self.world.ended[spec.path] = outcome
        return outcome

    async def _leaf(self, spec: TaskSpec) -> TaskOutcome:
        if spec.payload.get("signal") and "timeout_s" not in spec.payload:
            await asyncio.Event().wait()
        await self._process.turn(spec.path)
        self.world.carried_out.append(spec.path)
        try:
            return TaskOutcome("succeeded", output=self.world.work(spec))
        except RunError as error:
            return TaskOutcome("failed", error=error_info(error))

    async def _workflow(self, spec: TaskSpec) -> TaskOutcome:
        """By the real handler; broken off, it undoes what it has done."""
        within = FakeContext(self.world, within=self, spec=spec)
        try:
            return TaskOutcome("succeeded", output=await WORKFLOWS.inner(within))
        except RunError as error:
            return TaskOutcome("failed", error=error_info(error))
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                if not self._process.dead:
                    await WORKFLOWS.undo(within)
            raise

    async def give_up(self, scopes: tuple[str, ...]) -> None:
        """What is broken off has ended in this world."""

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        if spec.hidden:
            self.world.ended.setdefault(spec.path, TaskOutcome("skipped"))
        else:
            self.world.skipped[spec.path] = reason

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        if self._process.dead:
            raise Crash
        values = self.world.values
        if (self.path, key) not in values:
            made = json.loads(json.dumps(await make()))
            values[self.path, key] = made
        return values[self.path, key]


def tools(spec: TaskSpec) -> Any:
    """``add``; ``echo``; ``fail``; ``fail_until`` the attempt that it names; agents answer."""
    if spec.kind == "pause":
        return None
    if spec.kind == "wait":
        if "signal" in spec.payload:
            raise timed_out(spec.node, spec.payload["timeout_s"])
        return spec.payload.get("until")
    if spec.kind == "agent":
        return {"agent": spec.agent, "input": spec.payload["input"]}
    told = spec.payload["parameters"] if spec.kind == "action_node" else spec.payload
    arguments = told["arguments"]
    name = told["name" if spec.kind == "action_node" else "tool"]
    if name == "add":
        return arguments["a"] + arguments["b"]
    if name in ("echo", "pay"):
        return arguments.get("value")
    attempt = int(spec.path.rpartition("@")[2]) if "@" in spec.path.rpartition(".")[2] else 1
    if name == "fail" or attempt < arguments.get("attempt", 1):
        raise ToolError(f"{spec.path} failed", hint="Try something else.")
    return attempt


def failure(code: str) -> TaskOutcome:
    return TaskOutcome("failed", error=ErrorInfo(code=code, message=code))
