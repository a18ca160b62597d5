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
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import anyio

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import (
    LASTING,
    BudgetExceeded,
    ErrorInfo,
    ExpressionError,
    LoopBound,
    RunCancelled,
    TaskFailed,
    WorkflowLimit,
)
from agent_server.domain.workflows import (
    LEAF_TYPES,
    ActionNode,
    AgentNode,
    ApproachNode,
    ApprovalNode,
    BranchNode,
    LoopNode,
    MapNode,
    Node,
    ParallelNode,
    PlanNode,
    SetNode,
    ToolNode,
    WaitNode,
    WorkflowDefinition,
    WorkflowNode,
)
from agent_server.execution.ports import TaskContext, TaskOutcome, TaskSpec
from agent_server.workflow.expressions import expression, render
from agent_server.workflow.graph import Lane, analyse
from agent_server.workflow.race import Failed, Race
from agent_server.workflow.sight import Frame, Results, Variables, merged, result_of
from agent_server.workflow.values import Scope

MAX_EXECUTIONS: Final = 10_000
"""Nodes one run may carry out, each iteration, item and attempt counted."""
BREATH: Final = 20
"""Nodes without an effect after which other work of the process gets its turn."""
ACTION_KIND: Final = "action_node"
PAUSE_KIND: Final = "pause"

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
    max_executions: int = MAX_EXECUTIONS,
    chain: tuple[str, ...] = (),
) -> Any:
    """Carry ``definition`` out, which must be valid, and return its output.

    Raises ``NodeFailed``; ``BudgetExceeded``, ``RunCancelled`` and ``WorkflowLimit`` end the run
    whatever the nodes' policies say. ``finished`` are outputs of nodes that are taken as done;
    they may be referred to even if the definition has no such node any more. ``path_prefix``
    (``r2`` gives ``r2.1``) keeps a revised plan's tasks apart from the ones before. ``chain`` names the workflows
    that this one stands in, itself included.
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
        max_executions=max_executions,
        chain=chain,
    )
    return (await interpreter.run()).output


@dataclass(frozen=True)
class _Ended:
    """What a node, or a list of nodes, gave."""

    output: Any = None
    writes: JsonObject = field(default_factory=dict)


_NOTHING: Final = _Ended()


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
        max_executions: int = MAX_EXECUTIONS,
        chain: tuple[str, ...] = (),
    ) -> None:
        self._ctx = ctx
        self._definition = definition
        self._inputs = inputs
        self._done = dict(finished or {})
        self._graph = analyse(definition, self._done)
        self._prefix = f"{path_prefix}." if path_prefix else ""
        self._drain = drain
        self._observer = observer
        self._left = max_executions
        self._max_executions = max_executions
        self._chain = chain
        self._pure = 0
        width = min(max_parallel, definition.max_parallel or max_parallel)
        self._slots = anyio.Semaphore(max(1, width), fast_acquire=True)
        self._width = max(1, width)

    async def run(self) -> WorkflowResult:
        """See ``run_workflow``."""
        frame = Frame({})
        for node_id, output in self._done.items():
            frame.results[node_id] = result_of("succeeded", output)
        first = render(self._definition.variables, {"inputs": self._inputs})
        try:
            ended = await self._lane("", 0, self._prefix, frame, first)
        except Failed as failed:
            raise NodeFailed(
                failed.node_id, failed.path, failed.error, self._outermost(frame)
            ) from None
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
            ended = _NOTHING
            for index, node in enumerate(lane.nodes):
                ended = await self._node(node, f"{path}{index + 1}", frame, seen.values)
                seen = seen.write(ended.writes, index)
            return _Ended(ended.output, seen.writes())
        return await self._graph_lane(lane, path, frame, outside)

    async def _graph_lane(self, lane: Lane, path: str, frame: Frame, outside: Variables) -> _Ended:
        nodes, rank = lane.nodes, lane.rank
        left = [len(waits) for waits in lane.waits]
        after: list[Variables] = [outside] * len(nodes)
        outputs: list[Any] = [None] * len(nodes)
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
            ended = await self._node(node, f"{path}{index + 1}", frame, seen.values)
            outputs[index] = ended.output
            after[index] = seen.write(ended.writes, rank[index])
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
        return _Ended(outputs[-1], merged(after, outside).writes())

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
        while True:
            self._count()
            here = path if attempt == 1 else f"{path}@{attempt}"
            try:
                if attempt == 1 and node.when is not None:
                    if not expression(node.when).evaluate(scope):
                        return await self._skipped(node, path, frame, f"{node.when} is false")
                ended = await self._carry_out(node, here, frame, values, scope)
                if ended is None:
                    return await self._skipped(node, path, frame, "the task was skipped")
                break
            except ExpressionError as error:
                failed = Failed(node.id, here, error.info())
            except Failed as error:
                failed = error
            if failed.error.code in _FATAL:
                raise _FATAL[failed.error.code](failed.error.message, hint=failed.error.hint)
            attempt += 1
            if not _worth_retrying(node, failed.error, attempt):
                return await self._given_up(node, path, frame, failed)
            await self._pause(node, path, attempt)
        if node.output is not None:
            ended = _Ended(ended.output, {**ended.writes, node.output: ended.output})
        frame.results[node.id] = result_of("succeeded", ended.output)
        if self._observer is not None:
            await self._observer.node_completed(node, path, ended.output)
        return ended

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise WorkflowLimit(
                f"The workflow would carry out more than {self._max_executions} nodes.",
                hint="Lower the bounds of its loops, map over fewer items, or split it.",
            )

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
        await self._ctx.skip(self._spec(node, path, {}), reason)
        if self._observer is not None:
            await self._observer.node_skipped(node, path, reason)
        return _NOTHING

    async def _given_up(self, node: Node, path: str, frame: Frame, failed: Failed) -> _Ended:
        frame.results[node.id] = result_of("failed", None, failed.error)
        if self._observer is not None:
            await self._observer.node_failed(node, path, failed.error)
        if node.on_error == "continue":
            return _NOTHING
        raise failed

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
            payload = _payload(node, scope)
            if isinstance(node, WorkflowNode):
                payload["chain"] = list(self._chain)
            return await self._leaf(node, path, payload)
        self._pure += 1
        if self._pure % BREATH == 0:
            await asyncio.sleep(0)
        if isinstance(node, SetNode):
            written: JsonObject = render(node.variables, scope)
            return _Ended(written, written)
        if isinstance(node, ParallelNode):
            return await self._parallel(node, path, frame, values)
        if isinstance(node, BranchNode):
            return await self._branch(node, path, frame, values, scope)
        if isinstance(node, MapNode):
            return await self._map(node, path, frame, values, scope)
        return await self._loop(node, path, frame, values)

    def _spec(self, node: Node, path: str, payload: JsonObject) -> TaskSpec:
        kind: str = node.type
        if isinstance(node, ApproachNode):
            kind = "agent"
        elif isinstance(node, ActionNode):
            kind = ACTION_KIND
        agent = node.agent if isinstance(node, (AgentNode, ApproachNode)) else None
        return TaskSpec(
            path=path,
            node=node.id,
            kind=kind,
            payload=payload,
            description=node.description,
            agent=agent,
        )

    async def _leaf(self, node: Node, path: str, payload: JsonObject) -> _Ended | None:
        async with self._slots:
            outcome: TaskOutcome = await self._ctx.child(self._spec(node, path, payload))
        if outcome.status == "succeeded":
            return _Ended(outcome.output)
        if outcome.status == "skipped":
            return None
        if outcome.status == "cancelled":
            raise RunCancelled(f"The task {path!r} ({node.id!r}) was cancelled.")
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

    async def _branch(
        self, node: BranchNode, path: str, frame: Frame, values: JsonObject, scope: Scope
    ) -> _Ended:
        taken = len(node.cases)
        for number, case in enumerate(node.cases):
            if expression(case.when).evaluate(scope):
                taken = number
                break
        for number, nodes in enumerate((*(case.nodes for case in node.cases), node.otherwise)):
            for index, inner in enumerate(nodes if number != taken else ()):
                reason = f"{node.id} took another way"
                await self._skipped(inner, f"{path}.{number + 1}.{index + 1}", frame, reason)
        if taken == len(node.cases) and not node.otherwise:
            return _NOTHING
        return await self._lane(node.id, taken, f"{path}.{taken + 1}.", frame, values)

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
        if len(items) > self._left:
            self._left = -1
            self._count()

        def one(number: int) -> Awaitable[_Ended]:
            names = {**frame.names, node.name: items[number], "index": number}
            inner = Frame(names, frame)
            return self._lane(node.id, 0, f"{path}.{number + 1}.", inner, values)

        found, race = await self._side_by_side(len(items), node.max_parallel, one)
        failed = race.settle()
        if failed is not None:
            raise failed
        return _Ended([ended.output for ended in found], _last_writes(found))

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


def _over_bound(node: LoopNode) -> ErrorInfo:
    return LoopBound(
        f"The loop {node.id!r} would go on after {node.max_iterations} iterations.",
        hint="Raise max_iterations, or mend its condition.",
    ).info()


def _payload(node: Node, scope: Scope) -> JsonObject:
    """What the node's task is told. Only what is set, so that it stays small in the database."""
    payload: JsonObject = {}
    if isinstance(node, (AgentNode, ApproachNode)):
        payload = {
            "agent": node.agent,
            "input": render(node.input, scope),
            "approach": node.approach,
            "model": node.model,
            "output_schema": node.output_schema,
            "tools": None if node.tools is None else list(node.tools),
            "context": render(node.context, scope) or None,
        }
    elif isinstance(node, PlanNode):
        payload = {
            "goal": render(node.goal, scope),
            "role": node.role,
            "input": render(node.input, scope),
            "output_schema": node.output_schema,
            "agents": None if node.agents is None else list(node.agents),
            "tools": None if node.tools is None else list(node.tools),
            "approach": node.approach,
            "model": node.model,
        }
    elif isinstance(node, WorkflowNode):
        payload = {
            "workflow": node.workflow,
            "version": node.version,
            "input": render(node.input, scope),
        }
    elif isinstance(node, WaitNode):
        seconds = node.duration_s
        if isinstance(seconds, str):
            seconds = expression(seconds).evaluate(scope)
        payload = {
            "duration_s": seconds,
            "until": render(node.until, scope),
            "signal": render(node.signal, scope),
        }
    elif isinstance(node, ApprovalNode):
        payload = {
            "subject": render(node.subject, scope),
            "input": render(node.input, scope),
            "expires_s": node.expires_s,
            "on_expiry": node.on_expiry,
            "on_reject": node.on_reject,
            "approvers": None if node.approvers is None else list(node.approvers),
        }
    elif isinstance(node, ToolNode):
        payload = {"tool": node.tool, "arguments": render(node.arguments, scope)}
    elif isinstance(node, ActionNode):
        payload = {"action": node.action, "parameters": render(node.parameters, scope)}
    payload["timeout_s"] = node.timeout_s
    return {name: value for name, value in payload.items() if value is not None}
