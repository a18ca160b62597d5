"""Compensation: what undoes the nodes that have succeeded, when the rest has not.

Leans on the interpreter, which carries the undoing nodes out like any others, and on the ledger: a
node that can be undone is written down there with all that its undoing looks at, so that neither a
crash nor a cancelled run forgets it. Refuses to decide when to undo.
"""

from typing import Any, Final

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, RunError
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.execution.ports import TaskContext
from agent_server.workflow.interpreter import UNDO_KEY, Interpreter, Start

_UNDONE: Final = "undone"


async def undo(ctx: TaskContext, *, max_parallel: int) -> list[FieldError]:
    """Undo what this task's nodes have done, the last first, and answer what could not be undone.

    Each is undone once, a crash in between included; one that fails keeps none of the others from
    being undone.
    """
    steps = ctx.journal.recorded()
    known = [step.output for step in steps.values() if step.name.endswith(f"/{UNDO_KEY}")]
    faults: list[FieldError] = []
    for record in sorted(known, key=lambda record: -int(record["number"])):

        async def once(record: JsonObject = record) -> Any:
            try:
                await _carry_out(ctx, record, max_parallel)
            except RunError as failure:
                return failure.info().model_dump(mode="json")
            return None

        error = await ctx.value(f"{record['path']}/{_UNDONE}", once)
        if error is not None:
            message = f"{record['node']!r} could not be undone: {error['message']}"
            faults.append(FieldError(path=str(record["path"]), message=message, hint=error["hint"]))
    return faults


async def _carry_out(ctx: TaskContext, record: JsonObject, max_parallel: int) -> None:
    definition = WorkflowDefinition.model_validate(
        {"name": f"undo {record['node']}", "nodes": record["nodes"]}
    )
    interpreter = Interpreter(
        ctx,
        definition,
        record["inputs"],
        max_parallel=max_parallel,
        path_prefix=f"{record['path']}!",
        start=Start(record["names"], record["results"], record["vars"]),
    )
    await interpreter.run()


def told(error: RunError, faults: list[FieldError]) -> None:
    """Say in ``error`` what could not be undone."""
    if faults:
        error.errors = (*error.errors, *faults)
        names = "; ".join(fault.message for fault in faults[:3])
        error.hint = f"{names}. Undo it by hand. {error.hint or ''}".strip()
