"""Walks a workflow's graph: the same walk on every replay, whoever is faster.

Leans on the contract of durable code (each node that does something is a child task) and on the
graph's order. Refuses to know agents, tools and the clock; whatever has no effect is recomputed
on replay and never stored.

How it stays exact:

- A node's path is its place: ``2`` is the second node of the workflow, ``2.3.1`` the first node
  in the third branch, case (``else`` is the last), item or iteration of node 2. The second attempt
  at a node adds ``@2``; the wait before it is a hidden task at ``….0``.
- A node sees the results and the variables of the nodes it comes after, never of those that run
  beside it. Where several of those wrote a variable, the last in the order counts.
- When nodes fail that run side by side, the first in the order decides. What comes later in the
  order is not started, or no longer waited for, and its results do not count; what comes earlier
  goes on, since it could fail as well. With ``drain`` nothing is broken off: whatever does not
  depend on the failure runs to its end (plans use that, so that no work is lost when the rest is
  revised).
- A node that is skipped, or that failed with ``on_error: continue``, counts as ended: what depends
  on it runs, and may look at its ``.status``.
- Who was first (``join: any``, ``first``) and whether the time of a node with others inside was up
  is decided once and kept in the ledger. A replay takes only the ways that won.

Longer than our files should be, because it is one recursion: lists carry out nodes, and each type of
node with others inside carries out lists, over the same frames and limits.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import anyio

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    LASTING,
    BudgetExceeded,
    ErrorInfo,
    ExpressionError,
    InternalError,
    LoopBound,
    RunCancelled,
    TaskFailed,
    TaskTimeout,
)
from agent_server.domain.workflows import (
    LEAF_TYPES,
    BranchNode,
    LoopNode,
    MapNode,
    Node,
    ParallelNode,
    SetNode,
    WorkflowDefinition,
    WorkflowNode,
)
from agent_server.execution.ports import TaskContext, TaskSpec
from agent_server.workflow.expressions import bounded, expression, render
from agent_server.workflow.graph import POLICIES, Lane, analyse
from agent_server.workflow.leaves import PAUSE_KIND, STANDING_STILL, payload_of, spec_of
from agent_server.workflow.race import BrokenOff, Failed, Quorum, Race
from agent_server.workflow.sight import Frame, Results, Variables, merged, result_of
from agent_server.workflow.steps import Steps
from agent_server.workflow.values import Scope

UNDO_KEY: Final = "undo"
"""The end of the key under which the ledger holds, before a node begins, how to undo it."""
ENDED_KEY: Final = "ended"
"""The end of the key under which the ledger holds how a node ended that can be undone."""
BREATH: Final = 20
"""Nodes without an effect after which other work of the process gets its turn."""

_FATAL: Final = {BudgetExceeded.code: BudgetExceeded, RunCancelled.code: RunCancelled}
"""Errors that end the run whatever a node's policy says."""


class Observer(Protocol):
    """Is told how each node ended, inner ones too, before anything that depends on it starts.

    Called again on replay. ``path`` tells one item or iteration from another.
    """

    async def node_completed(self, node: Node, path: str, output: Any) -> None: ...
    async def node_failed(self, node: Node, path: str, error: ErrorInfo) -> None: ...
    async def node_skipped(self, node: Node, path: str, reason: str) -> None: ...


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


@dataclass(frozen=True)
class WorkflowResult:
    """How a workflow ended well."""

    output: Any
    variables: JsonObject
    finished: dict[str, Any]
    """The outputs of the outermost nodes, by id; null for those that were skipped."""


async def run_workflow(
    ctx: TaskContext,
    definition: WorkflowDefinition,
    inputs: JsonObject,
    *,
    max_parallel: int = 100,
    finished: Mapping[str, Any] | None = None,
    path_prefix: str = "",
    drain: bool = False,
    observer: Observer | None = None,
    steps: Steps | None = None,
    chain: tuple[str, ...] = (),
) -> Any:
    """Carry ``definition`` out, which must be valid, and return its output.

    Raises ``NodeFailed``; ``BudgetExceeded``, ``RunCancelled`` and ``WorkflowLimit`` end the run
    whatever the nodes' policies say. ``finished`` are outputs of nodes that are taken as done;
    they may be referred to even if the definition has no such node any more. ``path_prefix``
    (``r2`` gives ``r2.1``) keeps a revised plan's tasks apart from the ones before. ``steps`` bounds
    how many nodes are carried out. ``chain`` names the workflows that this one stands in, itself
    included.
    """
    interpreter = Interpreter(
        ctx,
        definition,
        inputs,
        max_parallel=max_parallel,
        finished=finished,
        path_prefix=path_prefix,
        drain=drain,
        observer=observer,
        steps=steps,
        chain=chain,
    )
    return (await interpreter.run()).output


@dataclass(frozen=True)
class Start:
    """Where a walk begins that goes on from another one."""

    names: JsonObject
    """What the item of a map and the like are called there."""
    results: Mapping[str, JsonObject]
    values: JsonObject
    """The variables."""


@dataclass(frozen=True)
class _Ended:
    """What a node, or a list of nodes, gave."""

    output: Any = None
    writes: JsonObject = field(default_factory=dict)
    failures: tuple[JsonObject, ...] = ()
    """What failed of a map that goes on nevertheless: ``{index, error}``."""
    went: bool = False
    """It failed and went to another node."""


_NOTHING: Final = _Ended()
_WENT: Final = _Ended(went=True)


class Interpreter:
    """One walk through one workflow. Use it once."""

    def __init__(
        self,
        ctx: TaskContext,
        definition: WorkflowDefinition,
        inputs: JsonObject,
        *,
        max_parallel: int = 100,
        finished: Mapping[str, Any] | None = None,
        path_prefix: str = "",
        drain: bool = False,
        observer: Observer | None = None,
        steps: Steps | None = None,
        chain: tuple[str, ...] = (),
        start: Start | None = None,
    ) -> None:
        self._ctx = ctx
        self._definition = definition
        self._inputs = inputs
        self._done = dict(finished or {})
        self._start = start
        self._made: dict[str, int] = {}
        self._graph = analyse(definition, self._done)
        self._prefix = f"{path_prefix}." if path_prefix else ""
        self._drain = drain
        self._observer = observer
        self._steps = steps or Steps()
        self._chain = chain
        self._pure = 0
        width = min(max_parallel, definition.max_parallel or max_parallel)
        self._slots = anyio.Semaphore(max(1, width), fast_acquire=True)
        self._width = max(1, width)

    async def run(self) -> WorkflowResult:
        """See ``run_workflow``."""
        if self._start is not None:
            frame = Frame(self._start.names, results=dict(self._start.results))
            first = self._start.values
        else:
            frame = Frame({})
            first = render(self._definition.variables, {"inputs": self._inputs})
        for node_id, output in self._done.items():
            frame.results[node_id] = result_of("succeeded", output)
        try:
            ended = await self._lane("", 0, self._prefix, frame, first)
        except Failed as failed:
            raise NodeFailed(
                failed.node_id, failed.path, failed.error, self._outermost(frame)
            ) from None
        except BrokenOff as broken:
            raise RunCancelled(str(broken)) from None
        variables = {**first, **ended.writes}
        output = ended.output
        if self._definition.output is not None:
            scope = {
                "inputs": self._inputs,
                "vars": variables,
                "nodes": Results(self._graph, frame, ()),
            }
            output = render(self._definition.output, scope)
        return WorkflowResult(output, variables, self._outermost(frame))

    def _outermost(self, frame: Frame) -> dict[str, Any]:
        found = dict(self._done)
        for node in self._definition.nodes:
            result = frame.results.get(node.id)
            if result is not None and result["status"] in ("succeeded", "skipped"):
                found[node.id] = result["output"]
        return found

    # Lists ----------------------------------------------------------------------------------

    async def _lane(
        self, owner: str, number: int, path: str, frame: Frame, values: JsonObject
    ) -> _Ended:
        """Carry out one list. ``path`` is what its nodes' positions are added to."""
        lane = self._graph.lanes[owner, number]
        outside = Variables(values, {})
        if lane.sequential:
            seen = outside
            output = None
            went: set[int] = set()
            for index, node in enumerate(lane.nodes):
                here = f"{path}{index + 1}"
                reason = lane.passed_over(index, went) if lane.goes else None
                if reason is not None:
                    await self._skipped(node, here, frame, reason)
                    continue
                ended = await self._node(node, here, frame, seen.values)
                output = ended.output
                if ended.went:
                    went.add(index)
                if ended.writes:
                    seen = seen.write(ended.writes, index)
            return _Ended(output, seen.writes())
        return await self._graph_lane(lane, path, frame, outside)

    async def _graph_lane(self, lane: Lane, path: str, frame: Frame, outside: Variables) -> _Ended:
        nodes, rank = lane.nodes, lane.rank
        left = [len(waits) for waits in lane.waits]
        after: list[Variables] = [outside] * len(nodes)
        outputs: dict[int, Any] = {}
        went: set[int] = set()
        race = Race(self._drain)

        async def work(index: int) -> None:
            following: list[int] | None = [index]
            while following:
                index, *others = following
                for other in others:
                    group.start_soon(work, other)
                following = await race.run(rank[index], lambda: step(index))  # noqa: B023

        async def step(index: int) -> list[int]:
            node = nodes[index]
            seen = merged([after[other] for other in lane.waits[index]], outside)
            here = f"{path}{index + 1}"
            reason = lane.passed_over(index, went) if lane.goes else None
            if reason is not None:
                await self._skipped(node, here, frame, reason)
                after[index] = seen
            else:
                ended = await self._node(node, here, frame, seen.values)
                outputs[index] = ended.output
                after[index] = seen.write(ended.writes, rank[index])
                if ended.went:
                    went.add(index)
            ready = []
            for other in lane.dependents[index]:
                left[other] -= 1
                if not left[other]:
                    ready.append(other)
            return ready

        async with anyio.create_task_group() as group:
            race.group = group
            for index, waits in enumerate(lane.waits):
                if not waits:
                    group.start_soon(work, index)
        failed = race.settle()
        if failed is not None:
            if not self._drain:
                for index, node in enumerate(nodes):
                    if rank[index] > race.first:
                        self._forget(frame, node)
            raise failed
        output = outputs[max(outputs)] if outputs else None
        return _Ended(output, merged(after, outside).writes())

    def _forget(self, frame: Frame, node: Node) -> None:
        """Nobody may see how far this node came: it depends on who was faster."""
        frame.results[node.id] = result_of("cancelled")
        for inner in self._graph.inside(node):
            frame.results.pop(inner, None)

    async def _side_by_side(
        self, count: int, width: int | None, one: Callable[[int], Awaitable[_Ended]]
    ) -> tuple[list[_Ended], "Race"]:
        """``one(0)`` … ``one(count - 1)``, at most ``width`` at a time, started in order."""
        found = [_NOTHING] * count
        race = Race(self._drain)
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await race.run(number, lambda: keep(number))  # noqa: B023  # awaited at once

        async def keep(number: int) -> list[int]:
            found[number] = await one(number)
            return []

        async with anyio.create_task_group() as group:
            race.group = group
            for _ in range(min(count, width or self._width)):
                group.start_soon(work)
        return found, race

    # Nodes ----------------------------------------------------------------------------------

    async def _node(self, node: Node, path: str, frame: Frame, values: JsonObject) -> _Ended:
        """Carry out one node with its policies. Raises ``Failed`` if nobody may go on."""
        if node.id in self._done and path.rpartition(".")[0] == self._prefix.rpartition(".")[0]:
            return _Ended(self._done[node.id])
        scope = self._scope(node, frame, values)
        attempt = 1
        doubtful = False
        while True:
            self._steps.take(self._ctx.path)
            here = path if attempt == 1 else f"{path}@{attempt}"
            try:
                if attempt == 1 and node.when is not None:
                    if not expression(node.when).evaluate(scope):
                        return await self._skipped(node, path, frame, f"{node.when} is false")
                if node.compensate:
                    # Once begun it is not broken off: it must be known whether it has happened.
                    with anyio.CancelScope(shield=True):
                        if attempt == 1:
                            await self._remember(node, path, frame, values)
                        ended = await self._carry_out(node, here, frame, values, scope)
                        if ended is not None:
                            await self._settle(node, path, "succeeded", ended)
                else:
                    ended = await self._carry_out(node, here, frame, values, scope)
                if ended is None:
                    return await self._skipped(node, path, frame, "the task was skipped")
                if node.output is not None:
                    bounded(ended.output, f"The variable {node.output!r}")
                break
            except ExpressionError as error:
                failed = Failed(node.id, here, error.info())
            except Failed as error:
                failed = error
            if failed.error.code in _FATAL:
                fatal, info = _FATAL[failed.error.code], failed.error
                raise fatal(info.message, hint=info.hint, errors=info.errors)
            attempt += 1
            doubtful = doubtful or in_doubt(node.type, failed.error.code)
            if not _worth_retrying(node, failed.error, attempt):
                if node.compensate:
                    await self._settle(node, path, UNKNOWN if doubtful else "failed")
                return await self._given_up(node, path, frame, failed)
            await self._pause(node, path, attempt)
        if node.output is not None:
            ended = replace(ended, writes={**ended.writes, node.output: ended.output})
        result = frame.results[node.id] = result_of("succeeded", ended.output)
        if isinstance(node, MapNode):
            result["failures"] = list(ended.failures)
        if self._observer is not None:
            await self._observer.node_completed(node, path, ended.output)
        return ended

    async def _remember(self, node: Node, path: str, frame: Frame, values: JsonObject) -> None:
        """Write down, before the node begins, how it is undone and what its undoing will look at."""
        number = self._next_of(UNDO_KEY)
        results = Results(self._graph, frame, ())
        record: JsonObject = {
            "number": number,
            "node": node.id,
            "type": node.type,
            "path": path,
            "attempts": node.retry.max_attempts if node.retry else 1,
            "output": node.output,
            "nodes": [each.model_dump(mode="json") for each in node.compensate],
            "names": {},
            "inputs": {},
            "vars": {},
            "results": {},
        }
        for root, key in self._graph.looked_at_by_undo(node):
            if root == "nodes" and key is not None and key != node.id:
                record["results"][key] = results.find(key)
            elif root in ("inputs", "vars"):
                source = self._inputs if root == "inputs" else values
                record[root] |= source if key is None else {key: source.get(key)}
            elif root in frame.names:
                record["names"][root] = frame.names[root]

        async def make() -> JsonObject:
            return record

        await self._ctx.value(f"{path}/{UNDO_KEY}", make)

    async def _settle(self, node: Node, path: str, status: str, ended: _Ended = _NOTHING) -> None:
        """Write down how a node that can be undone ended, as far as its undoing looks at it."""
        roots = {root for root, _ in self._graph.looked_at_by_undo(node)}
        written = dict(ended.writes)
        if node.output is not None and status == "succeeded":
            written[node.output] = ended.output
        record = {
            "status": status,
            "output": ended.output if "nodes" in roots else None,
            "vars": written if "vars" in roots else {},
        }

        async def make() -> JsonObject:
            return record | {"number": self._next_of(ENDED_KEY)}

        await self._ctx.value(f"{path}/{ENDED_KEY}", make)

    def _next_of(self, key: str) -> int:
        """How many records of that kind were made before, in earlier attempts too."""
        if key not in self._made:
            steps = self._ctx.journal.recorded().values()
            self._made[key] = sum(step.name.endswith(f"/{key}") for step in steps)
        self._made[key] += 1
        return self._made[key] - 1

    def _scope(self, node: Node, frame: Frame, values: JsonObject) -> Scope:
        earlier = self._graph.earlier.get(node.id, ())
        return {
            **frame.names,
            "inputs": self._inputs,
            "vars": values,
            "nodes": Results(self._graph, frame, earlier),
        }

    async def _skipped(self, node: Node, path: str, frame: Frame, reason: str) -> _Ended:
        for skipped in (node.id, *self._graph.inside(node)):
            frame.results[skipped] = result_of("skipped")
        await self._ctx.skip(spec_of(node, path, {}), reason)
        if self._observer is not None:
            await self._observer.node_skipped(node, path, reason)
        return _NOTHING

    async def _given_up(self, node: Node, path: str, frame: Frame, failed: Failed) -> _Ended:
        frame.results[node.id] = result_of("failed", None, failed.error)
        if self._observer is not None:
            await self._observer.node_failed(node, path, failed.error)
        if node.on_error == "fail":
            raise failed
        return _NOTHING if node.on_error in POLICIES else _WENT

    async def _pause(self, node: Node, path: str, attempt: int) -> None:
        """Wait before the next attempt: a task of its own, so that a replay does not wait again."""
        delay_s = node.retry.delay_s(attempt) if node.retry else 0
        if delay_s > 0:
            await self._ctx.child(
                TaskSpec(
                    path=f"{path}@{attempt}.0",
                    node=f"{node.id}@{attempt}",
                    kind=PAUSE_KIND,
                    payload={"delay_s": delay_s},
                    hidden=True,
                )
            )

    async def _carry_out(
        self, node: Node, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> _Ended | None:
        """One attempt. None if somebody skipped the task."""
        if isinstance(node, LEAF_TYPES):
            payload = payload_of(node, scope)
            if isinstance(node, WorkflowNode):
                payload["chain"] = list(self._chain)
            return await self._leaf(node, path, payload)
        self._pure += 1
        if self._pure % BREATH == 0:
            await asyncio.sleep(0)
        if isinstance(node, SetNode):
            written: JsonObject = render(node.variables, scope)
            return _Ended(written, written)
        if node.timeout_s is None:
            return await self._composite(node, path, frame, values, scope)
        return await self._within(node.timeout_s, node, path, frame, values, scope)

    async def _composite(
        self, node: Node, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> _Ended:
        if isinstance(node, ParallelNode):
            if node.wanted is not None:
                return await self._first(node, node.wanted, path, frame, values)
            return await self._parallel(node, path, frame, values)
        if isinstance(node, BranchNode):
            return await self._branch(node, path, frame, values, scope)
        if isinstance(node, MapNode):
            return await self._map(node, path, frame, values, scope)
        assert isinstance(node, LoopNode)
        return await self._loop(node, path, frame, values)

    async def _within(
        self,
        timeout_s: float,
        node: Node,
        path: str,
        frame: Frame,
        values: JsonObject,
        scope: Scope,
    ) -> _Ended:
        """One attempt at a node with others inside that has so much time, a crash included."""

        async def deadline() -> str:
            return (utcnow() + timedelta(seconds=timeout_s)).isoformat()

        until = datetime.fromisoformat(await self._ctx.value(f"{path}/until", deadline))
        ended: _Ended | Failed | None = None

        async def race() -> bool:
            nonlocal ended
            left_s = (until - utcnow()).total_seconds()
            with anyio.move_on_after(max(0.0, left_s)):
                try:
                    ended = await self._composite(node, path, frame, values, scope)
                except Failed as failed:
                    ended = failed
                except BrokenOff:
                    if utcnow() < until:
                        raise
            return ended is not None

        if not await self._ctx.value(f"{path}/in_time", race):
            for inner in self._graph.inside(node):
                frame.results[inner] = result_of("cancelled")
            raise Failed(node.id, path, timed_out(node.id, timeout_s).info())
        if ended is None:  # Known from the ledger.
            return await self._composite(node, path, frame, values, scope)
        if isinstance(ended, Failed):
            raise ended
        return ended

    async def _leaf(self, node: Node, path: str, payload: JsonObject) -> _Ended | None:
        spec = spec_of(node, path, payload)
        if isinstance(node, STANDING_STILL):
            outcome = await self._ctx.child(spec)
        else:
            async with self._slots:
                outcome = await self._ctx.child(spec)
        if outcome.status == "succeeded":
            return _Ended(outcome.output)
        if outcome.status == "skipped":
            return None
        if outcome.status == "cancelled":
            raise BrokenOff(f"The task {path!r} ({node.id!r}) was cancelled.")
        error = outcome.error or ErrorInfo(code=TaskFailed.code, message="The task failed.")
        raise Failed(node.id, path, error)

    async def _parallel(
        self, node: ParallelNode, path: str, frame: Frame, values: JsonObject
    ) -> _Ended:
        found, race = await self._side_by_side(
            len(node.branches),
            node.max_parallel or len(node.branches),
            lambda number: self._lane(node.id, number, f"{path}.{number + 1}.", frame, values),
        )
        failed = race.settle()
        if failed is not None:
            if not self._drain:
                for branch in node.branches[race.first + 1 :]:
                    for inner in branch:
                        self._forget(frame, inner)
            raise failed
        return _Ended([ended.output for ended in found], _last_writes(found))

    async def _first(
        self, node: ParallelNode, wanted: int, path: str, frame: Frame, values: JsonObject
    ) -> _Ended:
        """The first so many branches that succeed; the others are cancelled."""
        count = len(node.branches)
        found: dict[int, _Ended] = {}
        quorum = Quorum(wanted, count)
        numbers = iter(range(count))

        async def keep(number: int) -> None:
            here = f"{path}.{number + 1}."
            found[number] = await self._lane(node.id, number, here, frame, values)

        async def work() -> None:
            for number in numbers:
                await quorum.run(number, lambda: keep(number))  # noqa: B023  # awaited at once

        async def decide() -> JsonObject:
            async with anyio.create_task_group() as group:
                quorum.group = group
                for _ in range(min(count, node.max_parallel or count)):
                    group.start_soon(work)
            if quorum.settle():
                return {"first": quorum.arrived}
            return {"failed": min(quorum.failed)}

        decided: JsonObject = await self._ctx.value(f"{path}/first", decide)
        winners: list[int] = decided.get("first", [])
        failed = decided.get("failed")
        for number, branch in enumerate(node.branches):
            if number not in winners and number != failed:
                for inner in branch:
                    self._forget(frame, inner)
        if failed is not None:
            if failed in quorum.failed:
                raise quorum.failed[failed]
            await keep(failed)  # Known from the ledger, it fails again.
            raise InternalError(
                f"The branch {failed + 1} of {node.id!r} failed before, and not now."
            )
        for number in winners:
            if number not in found:
                await keep(number)
        outputs = [found[number].output for number in winners]
        return _Ended(
            outputs[0] if node.join == "any" else outputs,
            _last_writes([found[number] for number in sorted(winners)]),
        )

    async def _branch(
        self, node: BranchNode, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> _Ended:
        ways = (*(case.nodes for case in node.cases), node.otherwise)
        taken: list[int] = []
        for number, case in enumerate(node.cases):
            if (not taken or node.choose == "all") and expression(case.when).evaluate(scope):
                taken.append(number)
        if not taken and node.otherwise:
            taken.append(len(node.cases))
        for number, nodes in enumerate(ways):
            for index, inner in enumerate(nodes if number not in taken else ()):
                reason = f"{node.id} took another way"
                await self._skipped(inner, f"{path}.{number + 1}.{index + 1}", frame, reason)

        def one(position: int) -> Awaitable[_Ended]:
            way = taken[position]
            return self._lane(node.id, way, f"{path}.{way + 1}.", frame, values)

        if node.choose == "first":
            return await one(0) if taken else _NOTHING
        found, race = await self._side_by_side(len(taken), len(taken), one)
        failed = race.settle()
        if failed is not None:
            if not self._drain:
                for way in taken[race.first + 1 :]:
                    for inner in ways[way]:
                        self._forget(frame, inner)
            raise failed
        return _Ended([ended.output for ended in found], _last_writes(found))

    async def _map(
        self, node: MapNode, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> _Ended:
        over = node.over
        items = expression(over).evaluate(scope) if isinstance(over, str) else render(over, scope)
        if not isinstance(items, list):
            shown = "null" if items is None else type(items).__name__
            raise ExpressionError(
                f"The map {node.id!r} goes over {over!r}, which gives {shown}, not a list."
            )
        self._steps.need(len(items))

        errors: dict[int, ErrorInfo] = {}

        async def one(number: int) -> _Ended:
            names = {**frame.names, node.name: items[number], "index": number}
            try:
                here = f"{path}.{number + 1}."
                return await self._lane(node.id, 0, here, Frame(names, frame), values)
            except Failed as failed:
                if node.on_item_error == "fail":
                    raise
                errors[number] = failed.error
                return _NOTHING

        found, race = await self._side_by_side(len(items), node.max_parallel, one)
        failed = race.settle()
        if failed is not None:
            raise failed
        if node.max_failures is not None and len(errors) > node.max_failures:
            raise Failed(node.id, path, _too_many(node, errors, len(items)))
        drop = node.on_item_error == "drop"
        return _Ended(
            [e.output for number, e in enumerate(found) if not (drop and number in errors)],
            _last_writes(found),
            tuple(
                {"index": number, "error": error.model_dump(mode="json")}
                for number, error in sorted(errors.items())
            ),
        )

    async def _loop(self, node: LoopNode, path: str, frame: Frame, values: JsonObject) -> _Ended:
        inside = list(self._graph.inside(node))
        for inner in inside:
            frame.results.pop(inner, None)
            frame.earlier.pop(inner, None)
        ended = _NOTHING
        writes: JsonObject = {}
        outer = frame.names
        iteration = 1
        while True:
            now = {**values, **writes}
            if node.condition is not None and not self._ask(node, frame, now, iteration):
                break
            if iteration > node.max_iterations:
                raise Failed(node.id, path, _over_bound(node))
            for inner in inside:
                result = frame.results.pop(inner, None)
                if result is not None:
                    frame.earlier[inner] = result
            body = Frame({**outer, "iteration": iteration}, frame.parent)
            body.results, body.earlier = frame.results, frame.earlier
            ended = await self._lane(node.id, 0, f"{path}.{iteration}.", body, now)
            writes = {**writes, **ended.writes}
            if node.until is not None:
                if self._ask(node, frame, {**values, **writes}, iteration):
                    break
                if iteration == node.max_iterations:
                    raise Failed(node.id, path, _over_bound(node))
            iteration += 1
        return _Ended(ended.output, writes)

    def _ask(self, node: LoopNode, frame: Frame, values: JsonObject, iteration: int) -> bool:
        scope = {**self._scope(node, frame, values), "iteration": iteration}
        return bool(expression(node.condition or node.until or "false").evaluate(scope))


UNKNOWN: Final = "unknown"
"""How a node counts that began and of which nobody knows whether it has happened."""
_UNDOES_ITSELF: Final = ("workflow", "wait", "approval")


def in_doubt(node_type: str, code: str | None) -> bool:
    """Whether a node may have happened that ended with this error, or (None) was broken off."""
    return node_type not in _UNDOES_ITSELF and code in (None, TaskTimeout.code)


def _worth_retrying(node: Node, error: ErrorInfo, attempt: int) -> bool:
    """Whether a repeat may mend it, or the node asks for one in so many words."""
    retry = node.retry
    if retry is None or attempt > retry.max_attempts:
        return False
    if retry.on:
        return error.code in retry.on
    return error.code not in LASTING


def _last_writes(found: list[_Ended]) -> JsonObject:
    writes: JsonObject = {}
    for ended in found:
        writes.update(ended.writes)
    return writes


def _too_many(node: MapNode, errors: Mapping[int, ErrorInfo], count: int) -> ErrorInfo:
    first = errors[min(errors)]
    return TaskFailed(
        f"{len(errors)} of the {count} items of the map {node.id!r} failed, more than the "
        f"{node.max_failures} that may. The first: {first.message}",
        hint=first.hint,
    ).info()


def timed_out(node_id: str, timeout_s: float) -> TaskTimeout:
    return TaskTimeout(
        f"Node {node_id!r} was not done after {timeout_s:g} s.",
        hint="Raise its timeout_s, or give it a retry.",
    )


def _over_bound(node: LoopNode) -> ErrorInfo:
    return LoopBound(
        f"The loop {node.id!r} would go on after {node.max_iterations} iterations.",
        hint="Raise max_iterations, or mend its condition.",
    ).info()
