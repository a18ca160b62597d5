"""A process that can die at every boundary of its ledger, and a store that survives it.

``World`` is what a database would hold: steps, events and ended tasks. ``World.run`` carries a
root handler out; with ``die_at`` it dies at that boundary, after or before a commit, and whatever
was not committed is gone. Running again on the same world is the next attempt. A task that stands
still ends the attempt as well: ``suspended`` holds why.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anyio

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import error_info
from agent_server.domain.events import (
    EventBase,
    TaskCompleted,
    TaskFailed,
    TaskSkipped,
    TaskStarted,
)
from agent_server.domain.ids import DEFAULT_TENANT, RunId, new_run_id, task_id
from agent_server.domain.runs import RunRequest
from agent_server.execution.ports import (
    Estimate,
    Handler,
    LostLease,
    RunSnapshot,
    StepRecord,
    Suspend,
    TaskOutcome,
    TaskSpec,
)


class Died(BaseException):
    """The process is gone."""


class World:
    def __init__(self, request: RunRequest, handlers: Mapping[str, Handler]) -> None:
        self.request = request
        self.handlers = dict(handlers)
        self.run_id: RunId = new_run_id()
        self.steps: dict[str, dict[str, StepRecord]] = {}
        self.ended: dict[str, TaskOutcome] = {}
        self.specs: dict[str, TaskSpec] = {}
        self.events: list[EventBase] = []
        self.suspended: list[Suspend] = []
        self.boundaries = 0
        self.die_at: int | None = None
        self.dead = False

    def types(self) -> list[str]:
        return [event.type for event in self.events]  # type: ignore[attr-defined]

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.type == kind]  # type: ignore[attr-defined]

    def boundary(self) -> None:
        if self.dead:
            raise Died()
        self.boundaries += 1
        if self.boundaries == self.die_at:
            self.dead = True
            raise Died()

    async def run(self, handler: Handler, die_at: int | None = None) -> Any:
        """The root handler's output; ``Died`` if this attempt does not live to see it."""
        self.boundaries, self.die_at, self.dead = 0, die_at, False
        context = Context(self, TaskSpec(path="", node="", kind="root", payload={}))
        try:
            output = await handler(context)
        except Exception:
            if self.dead:
                raise Died() from None
            context.journal.commit()
            raise
        except BaseException:
            if self.dead:
                raise Died() from None
            raise
        context.journal.commit()
        return output


class MortalJournal:
    def __init__(self, world: World, path: str) -> None:
        self._world = world
        self.run_id = world.run_id
        self.task_id = task_id(world.run_id, path) if path else None
        self.scope = path
        self.notes: object = None
        self._steps = dict(world.steps.get(path, {}))
        self._pending_steps: dict[str, StepRecord] = {}
        self._pending_events: list[EventBase] = []

    def key(self, *parts: str) -> str:
        return "/".join((self.scope, *parts) if self.scope else parts)

    def recorded(self, prefix: str = "") -> Mapping[str, StepRecord]:
        return {key: step for key, step in self._steps.items() if key.startswith(prefix)}

    def emit(self, event: EventBase) -> None:
        self._pending_events.append(event)

    def delta(self, step: str, agent: str | None, text: str) -> None:
        return None

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> None:
        await anyio.lowlevel.checkpoint()
        self._steps[step.key] = step
        if commit:
            self._pending_steps[step.key] = step
            self.commit()

    async def again(
        self, step: StepRecord, estimate: Estimate | None = None, spent: Any = None
    ) -> None:
        await anyio.lowlevel.checkpoint()

    def cut_off(self, step: StepRecord) -> None:
        return None

    async def finish(self, step: StepRecord, *, commit: bool = True) -> None:
        self._steps[step.key] = step
        self._pending_steps[step.key] = step
        if commit:
            self.commit()
        await anyio.lowlevel.checkpoint()

    async def in_doubt(self, step: StepRecord, detail: str) -> None:
        return None

    async def flush(self) -> None:
        self.commit()

    def commit(self) -> None:
        self._world.boundary()
        self._world.steps.setdefault(self.scope, {}).update(self._pending_steps)
        self._world.events.extend(self._pending_events)
        self._pending_steps, self._pending_events = {}, []
        self._world.boundary()


class Context:
    def __init__(self, world: World, spec: TaskSpec) -> None:
        self._world = world
        self.run = RunSnapshot(
            id=world.run_id, tenant=DEFAULT_TENANT, request=world.request, created_at=utcnow()
        )
        self.path = spec.path
        self.node = spec.node
        self.payload: JsonObject = spec.payload
        self.attempt = 1
        self.journal = MortalJournal(world, spec.path)

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        world = self._world
        if spec.path in world.ended:
            return world.ended[spec.path]
        world.boundary()
        first = spec.path not in world.specs
        spec = world.specs.setdefault(spec.path, spec)  # the same path is the same task
        context = Context(world, spec)
        if first and not spec.hidden:
            world.events.append(TaskStarted(path=spec.path, node=spec.node, kind=spec.kind))
        outcome: TaskOutcome
        end: EventBase
        try:
            output = await world.handlers[spec.kind](context)
            outcome = TaskOutcome("succeeded", output=output)
            end = TaskCompleted(path=spec.path, node=spec.node, output=output)
        except Suspend as suspend:
            world.suspended.append(suspend)
            world.dead = True
            raise Died() from None
        except LostLease:
            raise
        except Exception as error:
            outcome = TaskOutcome("failed", error=error_info(error))
            end = TaskFailed(path=spec.path, node=spec.node, error=error_info(error))
        if not spec.hidden:
            context.journal.emit(end)
        world.boundary()
        world.ended[spec.path] = outcome
        context.journal.commit()
        return outcome

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        if spec.path not in self._world.ended:
            self._world.ended[spec.path] = TaskOutcome("skipped")
            self._world.events.append(TaskSkipped(path=spec.path, node=spec.node, reason=reason))

    async def take_steers(self, *, key: str) -> list[Any]:
        return []

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        whole = self.journal.key(key)
        found = self.journal.recorded().get(whole)
        if found is not None and found.status == "done":
            return found.output
        step = StepRecord(key=whole, kind="value", name=key)
        await self.journal.begin(step, commit=False)
        output = await make()
        await self.journal.finish(step.done(output))
        return output


async def every_death(
    make: Callable[[], tuple[World, Handler]],
) -> AsyncIterator[tuple[World, Any]]:
    """For each boundary of an undisturbed run: a world whose first attempt died there, and what
    the next attempt gave; ``world.suspended`` says if that one stands still for a decision. The
    undisturbed one comes first."""
    world, handler = make()
    output = await world.run(handler)
    boundaries = world.boundaries
    yield world, output
    for number in range(1, boundaries + 1):
        world, handler = make()
        try:
            await world.run(handler, die_at=number)
        except Died:
            pass
        else:
            raise AssertionError(f"there is no boundary {number} in this run")
        try:
            output = await world.run(handler)
        except Died:
            assert world.suspended, "the second attempt ends or stands still"
        yield world, output
