"""Which way would a workflow go? The interpreter's own walk, with outputs that somebody says.

Leans on the interpreter, and on the demo model's way to fill a schema. Refuses to touch the world:
no task is stored, nothing is called, no time passes.
"""

import asyncio
import copy
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import ErrorInfo, FieldError, InvalidRequest, RunError, error_codes
from agent_server.domain.ids import Tenant, new_run_id
from agent_server.domain.runs import RunRequest
from agent_server.domain.stored_workflows import DryRun, DryRunNode, DryRunRequest
from agent_server.domain.workflows import Node, WorkflowDefinition
from agent_server.execution.ports import ApprovalAsk, RunSnapshot, TaskOutcome, TaskSpec
from agent_server.inference.demo_fill import Filler
from agent_server.workflow.calls import nodes_in, reference_to, split_name
from agent_server.workflow.interpreter import run_workflow
from agent_server.workflow.leaves import FAULT_KIND, PAUSE_KIND
from agent_server.workflow.steps import Steps
from agent_server.workflow.undo import told, undo
from agent_server.workflow.validation import check_inputs, validate
from agent_server.workflow.values import did_you_mean

MAX_NODES: Final = 2_000
"""Nodes that one dry run may carry out."""
_MADE_UP: Final = "What some nodes give was made up, which may be why: say it under 'outputs'."
_PATH = re.compile(r"[0-9]+(@[0-9]+)?!?(\.[0-9]+(@[0-9]+)?!?)*")
_ATTEMPT = re.compile(r"@[0-9]+$")


async def dry_run(tenant: Tenant, pinned: JsonObject, asked: DryRunRequest) -> DryRun:
    """The way that ``pinned``, a valid definition with what it names, would go for ``asked``.

    Raises ``InvalidRequest`` for inputs that do not fit and for stubs of nodes that are not there.
    """
    definition = validate(pinned)
    inputs = check_inputs(definition, asked.variables)
    held: JsonObject = pinned.get("workflows") or {}
    _check_stubs(definition, held, asked)
    ctx = _DryContext(tenant, held, asked)
    try:
        output = await ctx.walk(definition, inputs, "", ())
    except RunError as error:
        info = error.info()
        if ctx.made_up and info.hint is None:
            info = info.model_copy(update={"hint": _MADE_UP})
        return DryRun(status="failed", error=info, nodes=tuple(ctx.nodes))
    return DryRun(status="succeeded", output=output, nodes=tuple(ctx.nodes))


def _check_stubs(definition: WorkflowDefinition, held: JsonObject, asked: DryRunRequest) -> None:
    definitions = (definition, *map(validate, held.values()))
    known = {node.id for each in definitions for node in nodes_in(each)}
    errors = [
        FieldError(
            path=f"{field}.{name}",
            message=f"there is no node {name!r}",
            hint=did_you_mean(name, known),
        )
        for field, names in (("outputs", asked.outputs), ("errors", asked.errors))
        for name in names
        if name not in known and not _PATH.fullmatch(name)
    ]
    codes = error_codes()
    errors += [
        FieldError(
            path=f"errors.{name}",
            message=f"there is no error {code!r}",
            hint=did_you_mean(code, codes),
        )
        for name, code in asked.errors.items()
        if code not in codes
    ]
    if errors:
        raise InvalidRequest(
            "The dry run is not valid: " + "; ".join(e.message for e in errors[:3]) + ".",
            hint=errors[0].hint,
            errors=errors,
        )


class _Kept(NamedTuple):
    """A value in the ledger of a workflow that is rehearsed."""

    name: str
    output: Any


class _DryJournal(dict[str, _Kept]):
    """See ``ports.Journal``: as much of it as undoing asks for."""

    def recorded(self) -> Mapping[str, _Kept]:
        return self


class _DryContext:
    """See ``ports.TaskContext``: children end at once, with what was said of them. Also the
    interpreter's observer."""

    def __init__(self, tenant: Tenant, held: JsonObject, asked: DryRunRequest) -> None:
        self.run = RunSnapshot(
            id=new_run_id(),
            tenant=tenant,
            request=RunRequest(workflow="dry-run"),
            created_at=utcnow(),
        )
        self.path = ""
        self.node = ""
        self.payload: JsonObject = {}
        self.attempt = 1
        self.nodes: list[DryRunNode] = []
        self._held = held
        self._asked = asked
        self._told: dict[str, JsonObject] = {}
        self.made_up: set[str] = set()
        self.journal: Any = _DryJournal()
        self._steps = Steps(MAX_NODES)

    async def walk(
        self,
        definition: WorkflowDefinition,
        inputs: JsonObject,
        prefix: str,
        chain: tuple[str, ...],
    ) -> Any:
        try:
            return await run_workflow(
                self,
                definition,
                inputs,
                path_prefix=prefix,
                observer=self,
                steps=self._steps,
                chain=chain,
                undo=self._undo,
            )
        except BaseException as error:  # Broken off, too, by a race or a time that is up.
            faults = await self._undo((f"{prefix}." if prefix else "",))
            if isinstance(error, RunError):
                told(error, faults)
            raise

    async def _undo(self, scopes: tuple[str, ...]) -> list[FieldError]:
        return await undo(self, scopes, max_parallel=MAX_NODES, observer=self)

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        await asyncio.sleep(0)
        if spec.kind == "skip":  # Undoing asks for the end of what was broken off.
            return TaskOutcome("skipped")
        if spec.kind in (PAUSE_KIND, FAULT_KIND):
            return TaskOutcome("succeeded")
        base = _ATTEMPT.sub("", spec.path)
        self._told[base] = {k: v for k, v in spec.payload.items() if k != "chain"}
        for key in (spec.path, base, spec.node):
            if key in self._asked.errors:
                message = "The dry run was told that it fails."
                error = ErrorInfo(code=self._asked.errors[key], message=message)
                return TaskOutcome("failed", error=error)
            if key in self._asked.outputs:
                return TaskOutcome("succeeded", output=self._asked.outputs[key])
        if spec.kind == "workflow":
            return await self._inner(spec)
        self.made_up.add(base)
        return TaskOutcome("succeeded", output=_stand_in(spec))

    async def _inner(self, spec: TaskSpec) -> TaskOutcome:
        found = spec.payload["workflow"]
        if isinstance(found, str):
            found = self._held[reference_to(*split_name(found, spec.payload.get("version")))]
        inner = copy.copy(self)
        inner.journal = _DryJournal()  # Its nodes are its own to undo.
        try:
            definition = validate(found)
            inputs = check_inputs(definition, spec.payload.get("input"))
            return TaskOutcome("succeeded", await inner.walk(definition, inputs, spec.path, ()))
        except (RunError, InvalidRequest) as error:
            return TaskOutcome("failed", error=error.info())

    async def give_up(self, scopes: tuple[str, ...]) -> None:
        """Nothing is left behind."""

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        """The observer is told."""

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        if key not in self.journal:
            self.journal[key] = _Kept(key, await make())
        return self.journal[key].output

    async def wait_signal(self, name: str, **how: Any) -> Any:
        raise AssertionError("the interpreter never stands still itself")

    async def take_steers(self, *, key: str) -> Any:
        raise AssertionError("the interpreter is not talked to")

    async def sleep_until(self, moment: datetime, *, key: str) -> None:
        raise AssertionError("the interpreter never stands still itself")

    async def ask_approval(self, ask: ApprovalAsk, *, key: str) -> Any:
        raise AssertionError("the interpreter never stands still itself")

    async def node_completed(self, node: Node, path: str, output: Any) -> None:
        self._add(node, path, "succeeded", output=output, made_up=path in self.made_up)

    async def node_failed(self, node: Node, path: str, error: ErrorInfo) -> None:
        self._add(node, path, "failed", error=error)

    async def node_skipped(self, node: Node, path: str, reason: str) -> None:
        self._add(node, path, "skipped", reason=reason)

    def _add(self, node: Node, path: str, status: Any, **more: Any) -> None:
        told = self._told.get(path)
        self.nodes.append(
            DryRunNode(path=path, node=node.id, type=node.type, status=status, input=told, **more)
        )


def _stand_in(spec: TaskSpec) -> Any:
    """What a task gives of which nobody said it."""
    schema = spec.payload.get("output_schema")
    if schema is not None:
        return Filler(f"what {spec.node} gives").value(schema)
    if spec.kind == "approval":
        given = spec.payload.get("input")
        return {
            "approved": True,
            "decision": "approve",
            "reason": None,
            "by": "dry run",
            "input": given,
        }
    if spec.kind == "wait":
        return {} if spec.payload.get("signal") else utcnow().isoformat()
    return f"[what {spec.node} gives]"
