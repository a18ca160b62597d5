"""The handlers that solve: a task of kind ``agent`` in a plan or workflow, and a run of an agent.

Leans on the solver. Refuses to know how tasks are planned, ordered and stored.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InternalError
from agent_server.domain.events import ToolRequested
from agent_server.domain.ids import Tenant
from agent_server.execution.ports import FinalOutput, StepRecord, TaskContext
from agent_server.execution.store.conversations import SAID
from agent_server.memory.experience import Experience
from agent_server.reasoning.approach import AgentInput, AgentResult, as_items
from agent_server.reasoning.solver import Assignment, Solver

Conversation = Callable[[Tenant, str], Awaitable[list[JsonObject]]]
"""What was said up to the end of a run, as input items. Raises ``NotFound``."""

KIND = "agent"
"""The kind of the child tasks that ``AgentTask`` carries out."""

_SCHEMA_NOTE = (
    "\n\nAnswer with JSON alone, without a Markdown fence, that fits this JSON Schema:\n{schema}"
)


class AgentTask:
    """The handler of ``agent`` tasks. The payload:

    ``agent`` (a slug, or null for the generalist), ``input`` (a text, a list of input items, or
    any JSON, which becomes text), and optionally ``approach``, ``model``, ``tools`` [names],
    ``output_schema``, ``context``, ``instructions`` (instead of the agent's own).
    """

    def __init__(self, solver: Solver, experience: Experience | None = None) -> None:
        """With ``experience``, a task of a goal is shown what was learnt that it may need."""
        self._solver = solver
        self._experience = experience

    async def __call__(self, ctx: TaskContext) -> Any:
        payload = ctx.payload
        schema: JsonObject | None = payload.get("output_schema")
        asked = told(payload.get("input"), schema)
        if self._experience is not None and ctx.run.request.goal and isinstance(asked, str):
            learnt = await self._experience.of_task(ctx, asked)
            # Behind the task: what is to be done comes first, what was learnt beside it.
            asked = f"{asked}\n\n{learnt}" if learnt else asked
        output, _ = await self._solver.solve(
            ctx,
            Assignment(
                input=asked,
                agent=payload.get("agent"),
                tools=payload.get("tools") or (),
                approach=payload.get("approach") or ctx.run.request.approach,
                model=payload.get("model") or ctx.run.request.model,
                output_schema=schema,
                context={**ctx.run.request.context, **(payload.get("context") or {})},
                instructions=payload.get("instructions"),
            ),
        )
        return output


class AgentRun:
    """The root handler of a run of one agent: its output is the run's, and what was said joins
    the session in the transaction that ends the run."""

    def __init__(self, solver: Solver, conversation: Conversation) -> None:
        self._solver = solver
        self._conversation = conversation

    async def __call__(self, ctx: TaskContext) -> Any:
        request = ctx.run.request
        options = request.options
        if request.agent is None or request.input is None:
            raise InternalError(f"The run {ctx.run.id!r} names no agent or has no input.")
        output, result = await self._solver.solve(
            ctx,
            Assignment(
                input=await self._asked(ctx),
                agent=request.agent,
                approach=request.approach,
                model=request.model,
                context=request.context,
                session_id=request.session_id,
                instructions=ctx.payload.get("instructions"),
                output_schema=options.output_schema if options is not None else None,
                options=options,
            ),
        )
        if options is not None:
            await _tell(ctx, result)
        if request.session_id is None:
            return output
        return FinalOutput(output, request.session_id, tuple(result.session_items))

    async def _asked(self, ctx: TaskContext) -> AgentInput:
        """The run's input, behind the conversation that it continues."""
        request = ctx.run.request
        assert request.input is not None
        if request.options is None or request.options.previous is None:
            return request.input
        before = await self._conversation(ctx.run.tenant, request.options.previous)
        return [*before, *as_items(request.input)]


async def _tell(ctx: TaskContext, result: AgentResult) -> None:
    """Keep what was said for runs that continue this one, and ask for the caller's tools; once,
    in the transaction that ends the run."""
    journal = ctx.journal
    key = journal.key(SAID)
    known = journal.recorded(key).get(key)
    if known is not None and known.output == list(result.new_items):
        return
    step = StepRecord(key=key, kind="value", name=SAID)
    for call in result.calls:
        journal.emit(
            ToolRequested(call_id=call["call_id"], tool=call["name"], arguments=call["arguments"])
        )
    await journal.finish(step.done(list(result.new_items)), commit=False)


def told(given: Any, schema: JsonObject | None) -> AgentInput:
    """``given`` as an agent is told it, with the form of the answer where one is asked for."""
    note = "" if schema is None else _SCHEMA_NOTE.format(schema=json.dumps(schema))
    if isinstance(given, list) and given and all(_is_item(item) for item in given):
        return [*given, {"role": "user", "content": note.strip()}] if note else given
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return text + note


def _is_item(value: Any) -> bool:
    """Whether ``value`` is one of the SDK's input items, and not just some JSON."""
    return isinstance(value, dict) and ("role" in value or "type" in value)
