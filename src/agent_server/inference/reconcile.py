"""Settling a call that may or may not have happened: by a person, or by a tool that can find out.

Leans on the journal's port and on the policies. Refuses to guess: until somebody says how it went
the run stands still, and nothing is called a second time.
"""

import json
from typing import Any

from agents import FunctionTool
from agents.tool import invoke_function_tool
from agents.tool_context import ToolContext
from pydantic import ValidationError

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError
from agent_server.domain.runs import Reconciled, WaitingFor
from agent_server.execution.ports import StepRecord, Suspend, reconciled_key
from agent_server.inference.durable_run import At, Place


async def reconciled(place: Place, tool: FunctionTool, doubted: StepRecord) -> Reconciled:
    """How the call ``doubted`` went. Raises ``Suspend``, which stops the run, until it is known."""
    run = place.run
    key = reconciled_key(doubted)
    found = run.journal.recorded(key).get(key)
    if found is not None and found.status == "done":
        return Reconciled.model_validate(found.output)
    said = await _asked(place, tool, doubted)
    if said is not None:
        record = StepRecord(key=key, kind="value", name="reconciled")
        await run.write(run.journal.finish(record.done(said.model_dump(mode="json"))))
        return said
    detail = (
        f"Tool {doubted.name!r} was called and the process died before it ended: "
        "it may or may not have taken effect."
    )
    await run.write(run.journal.in_doubt(doubted, detail))
    task = run.journal.task_id
    waiting = WaitingFor(kind="reconciliation", detail=detail, step=doubted.key, task_id=task)
    suspend = Suspend(waiting)
    await run.suspend(doubted.key, suspend)
    raise suspend


async def _asked(place: Place, tool: FunctionTool, doubted: StepRecord) -> Reconciled | None:
    """What the policy's ``reconcile`` tool says; None where there is none or it cannot tell."""
    run = place.run
    asked = run.policies.reconciler(tool.qualified_name)
    if asked is None:
        return None
    known = {
        "arguments": doubted.input,
        "arguments_json": json.dumps(doubted.input),
        "tool": doubted.name,
        "step": doubted.key,
        "run_id": run.journal.run_id,
    }
    takes = asked.params_json_schema.get("properties", {})
    arguments: JsonObject = {name: value for name, value in known.items() if name in takes}
    text = json.dumps(arguments)
    context: ToolContext[Any] = ToolContext(
        context=None,
        tool_name=asked.name,
        tool_call_id=f"reconcile~{doubted.attempts}",
        tool_arguments=text,
    )
    try:
        with At(place.inside(doubted.key)):
            said = await invoke_function_tool(function_tool=asked, context=context, arguments=text)
        if isinstance(said, str):
            said = json.loads(said)
        return Reconciled.model_validate({**said, "by": asked.name})
    except (AgentServerError, ValidationError, ValueError, TypeError):
        run.check()
        return None
