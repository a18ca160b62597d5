"""The planner: an agent that writes the plan, and the check that its plan must pass.

Leans on the durable loop and on the plan's check. Refuses to carry a plan out.
"""

from collections.abc import Callable, Collection
from typing import Any

from agents import Agent

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, PlanInvalid
from agent_server.domain.events import EventBase, PlanCreated, PlanRevised
from agent_server.domain.plans import Plan, PlanTask
from agent_server.execution.ports import TaskContext
from agent_server.memory.experience import Experience
from agent_server.planning.check import Offer, plan_faults
from agent_server.planning.draft import PlanOutput, read_plan
from agent_server.planning.prompt import complaint, instructions, opening, revision
from agent_server.reasoning.approach import AgentRunner, message

NAME = "planner"


class Planner:
    """Makes plans that can be carried out, or raises ``PlanInvalid`` with everything wrong.

    Durable: an accepted plan and its event are stored in one transaction, so that a replay finds
    the same plan and says ``plan.created`` once.
    """

    def __init__(
        self,
        loop: AgentRunner,
        *,
        max_tasks: int,
        max_repairs: int,
        experience: Experience | None = None,
    ) -> None:
        self._experience = experience
        self._loop = loop
        self._max_tasks = max_tasks
        self._max_repairs = max_repairs

    async def plan(self, ctx: TaskContext, offer: Offer) -> Plan:
        """The first plan for the run's goal; ``plan.created``."""
        told = opening(ctx.run.request, offer)
        if self._experience is not None:
            went = await self._experience.of_goal(ctx, ctx.run.request.goal or "")
            told += f"\n\nHow earlier goals like this one went:\n{went}" if went else ""
        return await self._accepted(
            ctx,
            offer,
            number=1,
            told=told,
            kept=(),
            event=lambda plan: PlanCreated(plan=plan),
        )

    async def revise(
        self,
        ctx: TaskContext,
        offer: Offer,
        before: Plan,
        finished: dict[str, Any],
        failed: str,
        error: ErrorInfo,
    ) -> Plan:
        """``before``'s finished tasks and a new way through what is left; ``plan.revised``.

        ``finished`` are the outputs of the tasks that ended, by id.
        """
        reason = f"Task {failed!r} failed: {error.message}"
        return await self._accepted(
            ctx,
            offer,
            number=before.revision + 1,
            told=revision(ctx.run.request, offer, before, finished, failed, error),
            kept=tuple(task for task in before.tasks if task.id in finished),
            event=lambda plan: PlanRevised(plan=plan, reason=reason),
        )

    async def _accepted(
        self,
        ctx: TaskContext,
        offer: Offer,
        *,
        number: int,
        told: str,
        kept: tuple[PlanTask, ...],
        event: Callable[[Plan], EventBase],
    ) -> Plan:
        async def make() -> Any:
            plan = await self._write(ctx, offer, number, told, {task.id for task in kept})
            plan = plan.model_copy(update={"tasks": (*kept, *plan.tasks)})
            # Nothing waits between here and the ledger: the event and the value that guards it
            # against a repeat are stored by the same commit.
            ctx.journal.emit(event(plan))
            return plan.model_dump(mode="json")

        return Plan.model_validate(await ctx.value(f"plan/accepted/{number}", make))

    async def _write(
        self, ctx: TaskContext, offer: Offer, number: int, told: str, finished: Collection[str]
    ) -> Plan:
        agent: Agent[Any] = Agent(
            name=NAME,
            instructions=instructions(self._max_tasks),
            output_type=PlanOutput(),
        )
        conversation: list[JsonObject] = [message("user", told)]
        for repair in range(self._max_repairs + 1):
            scope = f"plan/{number}" if repair == 0 else f"plan/{number}/fix/{repair}"
            result = await self._loop.run(
                ctx,
                agent,
                list(conversation),
                scope=scope,
                model=ctx.run.request.model,
                session_id=ctx.run.request.session_id if number == 1 else None,
                context=ctx.run.request.context,
                max_turns=1,
            )
            plan, faults = read_plan(result.output, number)
            if plan is not None:
                faults = plan_faults(plan, offer, max_tasks=self._max_tasks, finished=finished)
                if not faults:
                    return plan
            conversation += [
                message("assistant", result.text),
                message("user", complaint(faults)),
            ]
        raise PlanInvalid(
            f"The plan cannot be carried out, after {self._max_repairs} repairs: "
            + "; ".join(f"{fault.path}: {fault.message}" for fault in faults),
            hint="Say the goal more clearly, offer other agents and tools, or use a stronger model.",
            errors=faults,
        )
