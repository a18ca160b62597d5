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

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ErrorInfo, RunError, ToolError, error_info
from agent_server.domain.ids import DEFAULT_TENANT, new_run_id
from agent_server.domain.runs import RunRequest
from agent_server.execution.ports import RunSnapshot, StepRecord, TaskOutcome, TaskSpec

Work = Callable[[TaskSpec], Any]
"""What a child does: returns its output or raises ``RunError``."""


class Crash(Exception):
    """The process dies."""


@dataclass
class World:
    """What is stored."""

    work: Work
    ended: dict[str, TaskOutcome] = field(default_factory=dict)
    specs: dict[str, TaskSpec] = field(default_factory=dict)
    carried_out: list[str] = field(default_factory=list)
    """Paths in the order in which they were carried out; a path twice is a repeated effect."""
    skipped: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """What was decided once."""

    @property
    def paths(self) -> set[str]:
        return set(self.specs)


class FakeContext:
    """See ``ports.TaskContext``. Children end one at a time, in an order that ``random`` picks;
    after ``crash_after`` of them the process dies."""

    def __init__(
        self,
        world: World,
        *,
        random: Random | None = None,
        crash_after: int | None = None,
        hold: frozenset[str] = frozenset(),
    ) -> None:
        self.world = world
        self.run = RunSnapshot(
            id=new_run_id(),
            tenant=DEFAULT_TENANT,
            request=RunRequest(workflow="fake"),
            created_at=utcnow(),
        )
        self.path = ""
        self.node = ""
        self.payload: dict[str, Any] = {}
        self.attempt = 1
        self.most_at_once = 0
        self.broken_off: set[str] = set()
        self._random = random
        self._crash_after = crash_after
        self._hold = hold
        self._waiting: dict[str, asyncio.Event] = {}
        self._dead = False
        self._chooser: asyncio.Task[None] | None = None

    @property
    def journal(self) -> Any:
        return self

    def recorded(self) -> Any:
        """The interpreter looks at its own decisions alone, and writes nothing itself."""
        return {
            key: StepRecord(key=key, kind="value", name=key, output=value)
            for key, value in self.world.values.items()
        }

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        known = self.world.specs.setdefault(spec.path, spec)
        assert (known.kind, known.node, known.payload) == (spec.kind, spec.node, spec.payload)
        if spec.path in self.world.ended:
            return self.world.ended[spec.path]
        turn = self._waiting[spec.path] = asyncio.Event()
        self.most_at_once = max(self.most_at_once, len(self._waiting))
        if self._chooser is None or self._chooser.done():
            self._chooser = asyncio.ensure_future(self._choose())
        try:
            await turn.wait()
        except asyncio.CancelledError:
            self.broken_off.add(spec.path)
            if not self._dead:
                self.world.ended[spec.path] = TaskOutcome("cancelled")
            raise
        finally:
            self._waiting.pop(spec.path, None)
        if self._crash_after is not None:
            if self._crash_after == 0 or self._dead:
                self._dead = True
                raise Crash
            self._crash_after -= 1
        self.world.carried_out.append(spec.path)
        try:
            outcome = TaskOutcome("succeeded", output=self.world.work(spec))
        except RunError as error:
            outcome = TaskOutcome("failed", error=error_info(error))
        self.world.ended[spec.path] = outcome
        return outcome

    async def _choose(self) -> None:
        """Lets one waiting child after the other end, once nobody starts new ones."""
        while True:
            for _ in range(5):
                await asyncio.sleep(0)
            open_ = [p for p, e in self._waiting.items() if not e.is_set() and p not in self._hold]
            if not open_:
                return
            path = self._random.choice(open_) if self._random else open_[0]
            self._waiting[path].set()

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        self.world.skipped[spec.path] = reason

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        if self._dead:
            raise Crash
        if key not in self.world.values:
            self.world.values[key] = json.loads(json.dumps(await make()))
        return self.world.values[key]


def tools(spec: TaskSpec) -> Any:
    """``add``; ``echo``; ``fail``; ``fail_until`` the attempt that it names; agents answer."""
    if spec.kind == "pause":
        return None
    if spec.kind == "agent":
        return {"agent": spec.agent, "input": spec.payload["input"]}
    arguments = spec.payload["arguments"]
    name = spec.payload["tool"]
    if name == "add":
        return arguments["a"] + arguments["b"]
    if name == "echo":
        return arguments.get("value")
    attempt = int(spec.path.rpartition("@")[2]) if "@" in spec.path.rpartition(".")[2] else 1
    if name == "fail" or attempt < arguments.get("attempt", 1):
        raise ToolError(f"{spec.path} failed", hint="Try something else.")
    return attempt


def failure(code: str) -> TaskOutcome:
    return TaskOutcome("failed", error=ErrorInfo(code=code, message=code))
