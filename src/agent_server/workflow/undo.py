"""Compensation: what undoes the nodes that have happened, or may have, when the rest has not.

Leans on the interpreter, which carries the undoing nodes out like any others, and on the ledger: a
node that can be undone is written down there before it begins, with all that its undoing looks at,
so that neither a crash nor a cancelled run forgets it. Refuses to decide when to undo.
"""

import math
from typing import Any, Final

import anyio

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, RunError
from agent_server.domain.workflows import LEAF_TYPES, NODE_MODELS, WorkflowDefinition
from agent_server.execution.ports import TaskContext, TaskSpec
from agent_server.workflow.failures import UNKNOWN, NodeFailed, error_of, in_doubt
from agent_server.workflow.interpreter import Interpreter, Start
from agent_server.workflow.sight import result_of
from agent_server.workflow.undo_records import ENDED_KEY, UNDO_KEY
from agent_server.workflow.walk import Observer

_UNDONE: Final = "undone"
_FAILED: Final = "failed"
"""The key under which the ledger holds why all is undone, where a replay might not find it again."""


async def undo(
    ctx: TaskContext,
    scopes: tuple[str, ...] | None = None,
    *,
    max_parallel: int,
    observer: Observer | None = None,
) -> list[FieldError]:
    """Undo what this task's nodes have done whose paths begin with one of ``scopes`` (by default
    all), the last first, and answer what could not be undone.

    Each is undone once, a crash in between included; one that fails keeps none of the others from
    being undone. What still lives there of an earlier attempt is given up first. ``observer`` is told of
    the undoing nodes.
    """
    if scopes is None:
        scopes = (f"{ctx.path}." if ctx.path else "",)
    faults: list[FieldError] = []
    with anyio.CancelScope(shield=True):  # No race and no timeout breaks an undoing off.
        await ctx.give_up(scopes)
        faults = await _undo(ctx, scopes, max_parallel, observer)
    return faults


async def undo_all(ctx: TaskContext, error: RunError, *, max_parallel: int) -> None:
    """Undo all because of ``error``, which tells what could not be undone."""

    async def why() -> JsonObject:
        return error.info().model_dump(mode="json")

    if not isinstance(error, NodeFailed):  # A node that failed fails again.
        await ctx.value(_FAILED, why)
    told(error, await undo(ctx, max_parallel=max_parallel))


def undoing_for(ctx: TaskContext) -> RunError | None:
    """Why an earlier attempt has begun to undo all: nothing else may happen any more."""
    for step in ctx.journal.recorded().values():
        if step.name == _FAILED:
            return error_of(step.output)
    return None


async def _undo(
    ctx: TaskContext, scopes: tuple[str, ...], max_parallel: int, observer: Observer | None
) -> list[FieldError]:
    kept = {step.name: step.output for step in ctx.journal.recorded().values()}
    records = [
        output
        for name, output in kept.items()
        if name.endswith(f"/{UNDO_KEY}") and name.startswith(scopes)
    ]
    faults: list[FieldError] = []

    def place(record: JsonObject) -> tuple[list[Any], int]:
        """By when it ended, which is not as it was begun: it may have waited for a slot."""
        ended = kept.get(f"{record['path']}/{ENDED_KEY}")
        return ([math.inf] if ended is None else ended["order"], record["number"])

    for record in sorted(records, key=place, reverse=True):
        path = str(record["path"])

        async def once(record: JsonObject = record, path: str = path) -> Any:
            ended = kept.get(f"{path}/{ENDED_KEY}") or await _look(ctx, record)
            if ended["status"] not in ("succeeded", UNKNOWN):
                return None
            try:
                await _carry_out(ctx, record, ended, max_parallel, observer)
            except RunError as failure:
                return failure.info().model_dump(mode="json")
            return None

        error = await ctx.value(f"{path}/{_UNDONE}", once)
        if error is not None:
            message = f"{record['node']!r} could not be undone: {error['message']}"
            faults.append(FieldError(path=path, message=message, hint=error["hint"]))
    return faults


async def _look(ctx: TaskContext, record: JsonObject) -> JsonObject:
    """How a node ended whose end was not written down: a crash or a cancelled run came between."""
    if NODE_MODELS[record["type"]] not in LEAF_TYPES:
        return {"status": UNKNOWN, "output": None, "vars": {}}
    status = "failed"
    for attempt in range(1, record["attempts"] + 1):
        here = record["path"] if attempt == 1 else f"{record['path']}@{attempt}"
        # Takes the place if nothing ever began there; else it waits for the end of what did.
        spec = TaskSpec(path=here, node=record["node"], kind="skip", payload={}, hidden=True)
        await ctx.skip(spec, "its undoing came first")
        outcome = await ctx.child(spec)
        if outcome.status == "succeeded":
            name = record["output"]
            written = {} if name is None else {name: outcome.output}
            return {"status": "succeeded", "output": outcome.output, "vars": written}
        if outcome.status == "skipped" or not outcome.begun:
            break
        code = None if outcome.error is None else outcome.error.code
        if (code is not None or outcome.status == "cancelled") and in_doubt(record["type"], code):
            status = UNKNOWN
    return {"status": status, "output": None, "vars": {}}


async def _carry_out(
    ctx: TaskContext,
    record: JsonObject,
    ended: JsonObject,
    max_parallel: int,
    observer: Observer | None,
) -> None:
    definition = WorkflowDefinition.model_validate(
        {"name": f"undo {record['node']}", "nodes": record["nodes"]}
    )
    own = {record["node"]: result_of(ended["status"], ended["output"])}
    variables = {**record["vars"], **ended["vars"]}
    interpreter = Interpreter(
        ctx,
        definition,
        record["inputs"],
        max_parallel=max_parallel,
        path_prefix=f"{record['path']}!",
        observer=observer,
        start=Start(record["names"], {**record["results"], **own}, variables),
    )
    await interpreter.run()


def told(error: RunError, faults: list[FieldError]) -> None:
    """Say in ``error`` what could not be undone."""
    if faults:
        error.errors = (*error.errors, *faults)
        names = "; ".join(fault.message.rstrip(".") for fault in faults[:3])
        error.hint = f"{names}. Undo it by hand. {error.hint or ''}".strip()
