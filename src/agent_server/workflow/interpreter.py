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
- What happened below a node that fails or loses while the workflow goes on is undone before anything
  else happens there: a composite that is repeated or whose failure somebody handles, an item of a
  map that may fail, a branch that did not win.
- A node that fails without a task of its own (an expression, a bound, a time that is up) leaves one
  that failed in its place, so that its failure can be seen; a task whose output is too large for a
  variable has ended well, and the failure stands at ``….0``.
- Who was first (``join: any``, ``first``) and whether the time of a node with others inside was up
  is decided once and kept in the ledger. A replay takes only the ways that won.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import anyio

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, ExpressionError, RunCancelled, TaskFailed
from agent_server.domain.workflows import (
    LEAF_TYPES,
    MapNode,
    Node,
    SetNode,
    WorkflowDefinition,
    WorkflowNode,
    lists_of,
)
from agent_server.execution.ports import TaskContext, TaskSpec
from agent_server.workflow.composites import Composites
from agent_server.workflow.expressions import bounded, expression, render
from agent_server.workflow.failures import (
    FATAL,
    UNKNOWN,
    BrokenOff,
    Failed,
    NodeFailed,
    in_doubt,
    worth_retrying,
)
from agent_server.workflow.graph import POLICIES, Lane, analyse
from agent_server.workflow.leaves import FAULT_KIND, PAUSE_KIND, STANDING_STILL, payload_of, spec_of
from agent_server.workflow.race import Race
from agent_server.workflow.sight import Frame, Results, Variables, merged, result_of
from agent_server.workflow.steps import Steps
from agent_server.workflow.undo_records import UndoRecords
from agent_server.workflow.values import Scope
from agent_server.workflow.walk import NOTHING, WENT, Ended, Observer, Undo, Walk

BREATH: Final = 20
"""Nodes without an effect after which other work of the process gets its turn."""


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
    undo: Undo | None = None,
) -> Any:
    """Carry ``definition`` out, which must be valid, and return its output.

    Raises ``NodeFailed``; ``BudgetExceeded``, ``RunCancelled`` and ``WorkflowLimit`` end the run
    whatever the nodes' policies say. ``finished`` are outputs of nodes that are taken as done;
    they may be referred to even if the definition has no such node any more. ``path_prefix``
    (``r2`` gives ``r2.1``) keeps a revised plan's tasks apart from the ones before. ``steps`` bounds
    how many nodes are carried out. ``chain`` names the workflows that this one stands in, itself
    included. ``undo`` is asked to undo a part of it that has failed or lost while the rest goes on.
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
        undo=undo,
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
        undo: Undo | None = None,
        start: Start | None = None,
    ) -> None:
        self._definition = definition
        self._inputs = inputs
        self._done = dict(finished or {})
        self._start = start
        self._prefix = f"{path_prefix}." if path_prefix else ""
        self._chain = chain
        self._pure = 0
        width = max(1, min(max_parallel, definition.max_parallel or max_parallel))
        self._slots = anyio.Semaphore(width, fast_acquire=True)
        self._graph = analyse(definition, self._done)
        self._walk = Walk(ctx, self._graph, inputs, drain, observer, steps or Steps(), width, undo)
        self._composites = Composites(self._walk, self._lane)
        self._records = UndoRecords(self._walk)

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
            output = render(self._definition.output, scope, hands_on=True)
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
    ) -> Ended:
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
                    await self._walk.skipped(node, here, frame, reason)
                    continue
                ended = await self._node(node, here, frame, seen.values)
                output = ended.output
                if ended.went:
                    went.add(index)
                if ended.writes:
                    seen = seen.write(ended.writes, index)
            return Ended(output, seen.writes())
        return await self._graph_lane(lane, path, frame, outside)

    async def _graph_lane(self, lane: Lane, path: str, frame: Frame, outside: Variables) -> Ended:
        nodes, rank = lane.nodes, lane.rank
        left = [len(waits) for waits in lane.waits]
        after: list[Variables] = [outside] * len(nodes)
        outputs: dict[int, Any] = {}
        went: set[int] = set()
        race = Race(self._walk.drain)

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
                await self._walk.skipped(node, here, frame, reason)
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
            if not self._walk.drain:
                for index, node in enumerate(nodes):
                    if rank[index] > race.first:
                        self._walk.forget(frame, node)
            raise failed
        output = outputs[max(outputs)] if outputs else None
        return Ended(output, merged(after, outside).writes())

    # Nodes ----------------------------------------------------------------------------------

    async def _node(self, node: Node, path: str, frame: Frame, values: JsonObject) -> Ended:
        """Carry out one node with its policies. Raises ``Failed`` if nobody may go on."""
        if node.id in self._done and path.rpartition(".")[0] == self._prefix.rpartition(".")[0]:
            return Ended(self._done[node.id])
        scope = self._walk.scope(node, frame, values)
        undoable = node.compensate and self._walk.undo is not None
        attempt = 1
        doubtful = False
        while True:
            self._walk.steps.take(self._walk.ctx.path)
            here = place = path if attempt == 1 else f"{path}@{attempt}"
            unseen = True
            try:
                if attempt == 1 and node.when is not None:
                    if not expression(node.when).evaluate(scope):
                        return await self._walk.skipped(node, path, frame, f"{node.when} is false")
                if undoable:
                    # Once begun it is not broken off: it must be known whether it has happened.
                    with anyio.CancelScope(shield=True):
                        if attempt == 1:
                            await self._records.begun(node, path, frame, values)
                        ended = await self._carry_out(node, here, frame, values, scope)
                        if ended is not None:
                            await self._records.ended(node, path, "succeeded", ended)
                else:
                    ended = await self._carry_out(node, here, frame, values, scope)
                if ended is None:
                    return await self._walk.skipped(node, path, frame, "the task was skipped")
                if node.output is not None:
                    place = f"{here}.0" if isinstance(node, LEAF_TYPES) else here
                    bounded(ended.output, f"The variable {node.output!r}")
                break
            except ExpressionError as error:
                failed = Failed(node.id, here, error.info())
            except Failed as error:
                failed = error
                unseen = error.node_id == node.id and not isinstance(node, LEAF_TYPES)
            if failed.error.code in FATAL:
                fatal, info = FATAL[failed.error.code], failed.error
                raise fatal(info.message, hint=info.hint, errors=info.errors)
            if unseen:
                await self._seen(node, place, failed.error)
            attempt += 1
            doubtful = doubtful or in_doubt(node.type, failed.error.code)
            again = worth_retrying(node, failed.error, attempt)
            if (again or node.on_error != "fail") and any(lists_of(node)):
                await self._walk.abandon(f"{here}.")
            if not again:
                if undoable:
                    await self._records.ended(node, path, UNKNOWN if doubtful else "failed")
                return await self._given_up(node, path, frame, failed)
            await self._pause(node, path, attempt)
        if node.output is not None:
            ended = replace(ended, writes={**ended.writes, node.output: ended.output})
        result = frame.results[node.id] = result_of("succeeded", ended.output)
        if isinstance(node, MapNode):
            result["failures"] = list(ended.failures)
        if self._walk.observer is not None:
            await self._walk.observer.node_completed(node, path, ended.output)
        return ended

    async def _seen(self, node: Node, place: str, error: ErrorInfo) -> None:
        """Record a failure that was no task's."""
        told = {"error": error.model_dump(mode="json")}
        spec = replace(spec_of(node, place, told), kind=FAULT_KIND)
        await self._walk.ctx.child(spec)

    async def _given_up(self, node: Node, path: str, frame: Frame, failed: Failed) -> Ended:
        frame.results[node.id] = result_of("failed", None, failed.error)
        if self._walk.observer is not None:
            await self._walk.observer.node_failed(node, path, failed.error)
        if node.on_error == "fail":
            raise failed
        return NOTHING if node.on_error in POLICIES else WENT

    async def _pause(self, node: Node, path: str, attempt: int) -> None:
        """Wait before the next attempt: a task of its own, so that a replay does not wait again."""
        delay_s = node.retry.delay_s(attempt) if node.retry else 0
        if delay_s > 0:
            await self._walk.ctx.child(
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
    ) -> Ended | None:
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
            return Ended(written, written)
        return await self._composites.carry_out(node, path, frame, values, scope)

    async def _leaf(self, node: Node, path: str, payload: JsonObject) -> Ended | None:
        spec = spec_of(node, path, payload)
        if isinstance(node, STANDING_STILL):
            outcome = await self._walk.ctx.child(spec)
        else:
            async with self._slots:
                outcome = await self._walk.ctx.child(spec)
        if outcome.status == "succeeded":
            return Ended(outcome.output, found=outcome.found)
        if outcome.status == "skipped":
            return None
        if outcome.status == "cancelled":
            raise BrokenOff(f"The task {path!r} ({node.id!r}) was cancelled.")
        error = outcome.error or ErrorInfo(code=TaskFailed.code, message="The task failed.")
        raise Failed(node.id, path, error)
