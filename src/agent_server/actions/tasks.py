"""The handler of tasks that carry out an action that fired.

Leans on the actions by name and on the contract of durable code. Refuses to know why an action
fires and what it does.
"""

from typing import Any, Literal

from agent_server.actions.handler import Actions
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import RunError, error_info
from agent_server.domain.events import ActionCompleted, ActionFailed, ActionTriggered
from agent_server.execution.ports import LostLease, Suspend, TaskContext


class ActionTask:
    """The handler of ``action`` tasks: says that the action fires, runs it, says how it ended.

    Each of the two events is stored in one transaction with a ledgered value, so that a replay
    neither repeats nor loses it. The task itself succeeds even if the action fails.
    """

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    async def __call__(self, ctx: TaskContext) -> Any:
        action: str = ctx.payload["action"]
        trigger: str = ctx.payload["trigger"]

        async def triggered() -> Any:
            ctx.journal.emit(ActionTriggered(action=action, trigger=trigger, path=ctx.path))
            return True

        async def ended() -> Any:
            status: Literal["succeeded", "failed"]
            try:
                output, status = await self._carry_out(ctx), "succeeded"
            except (Suspend, LostLease):
                raise
            except Exception as error:  # here a failure is recorded, a plugin's own included
                output, status = error_info(error).model_dump(mode="json"), "failed"
                ctx.journal.emit(
                    ActionFailed(
                        action=action, trigger=trigger, path=ctx.path, error=error_info(error)
                    )
                )
            else:
                ctx.journal.emit(
                    ActionCompleted(action=action, trigger=trigger, path=ctx.path, output=output)
                )
            return {"status": status, "result": output}

        await ctx.value("triggered", triggered)
        return await ctx.value("ended", ended)

    async def _carry_out(self, ctx: TaskContext) -> Any:
        stored = ctx.payload.get("error")
        if stored is not None:
            raise RunError(stored["message"], hint=stored.get("hint"))
        return await _run(self._actions, ctx, ctx.payload["event"])


async def _run(actions: Actions, ctx: TaskContext, event: JsonObject) -> Any:
    """Run the action that ``ctx.payload`` names with its parameters, which are checked first."""
    name: str = ctx.payload["action"]
    parameters: JsonObject = ctx.payload.get("parameters", {})
    faults = actions.faults(name, parameters, rendered=True)
    if faults:
        raise RunError(
            f"The parameters of the action {name!r} are not valid: "
            + "; ".join(f"{fault.path}: {fault.message}" for fault in faults),
            errors=faults,
        )
    return await actions.get(name).handle(ctx, parameters, event)
