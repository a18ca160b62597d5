"""Solves one task: the agent, the approach, and an answer that fits its schema.

Leans on the approaches, the durable loop and the catalogue of agents and tools. Refuses to know
where the task comes from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agents import Agent

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, OutputInvalid
from agent_server.domain.json_schema import schema_fault
from agent_server.domain.options import RunOptions
from agent_server.execution.ports import TaskContext
from agent_server.inference.tailored import tailored
from agent_server.reasoning.approach import (
    AgentInput,
    AgentResult,
    AgentRunner,
    ReasoningTask,
    as_items,
    message,
)
from agent_server.reasoning.approaches import DEFAULT, Approaches
from agent_server.reasoning.direct import without_tools
from agent_server.reasoning.fit import fit
from agent_server.reasoning.generalist import generalist
from agent_server.registry.catalog import Catalog

MAX_FIXES = 2
"""Times an answer that does not fit goes back to the agent."""


@dataclass(frozen=True)
class Assignment:
    """One task: who works on what, how, and what the answer must look like."""

    input: AgentInput
    agent: str | None = None
    """A slug; None is the server's own generalist."""
    tools: Sequence[str] = ()
    """For the generalist: all that it has. For an agent: what it must have, added if it lacks."""
    approach: str | None = None
    model: str | None = None
    output_schema: JsonObject | None = None
    context: JsonObject = field(default_factory=dict)
    session_id: str | None = None
    instructions: str | None = None
    """Instead of the agent's own."""
    options: RunOptions | None = None


class Solver:
    """Durable: called again with the same assignment, it finds what it did in the journal."""

    def __init__(
        self, catalog: Callable[[], Catalog], loop: AgentRunner, approaches: Approaches
    ) -> None:
        """``catalog`` answers what is served now: it changes when a file is edited."""
        self._catalog = catalog
        self._loop = loop
        self._approaches = approaches

    async def solve(self, ctx: TaskContext, assignment: Assignment) -> tuple[Any, AgentResult]:
        """The output, and the result it was taken from.

        Raises ``UnknownAgent``, ``UnknownTool``, ``UnknownApproach``, whatever the agent's run
        raised, and ``OutputInvalid`` for an answer that still does not fit after two repairs.
        """
        agent, approach_name = self._staff(assignment)
        if assignment.instructions is not None:
            agent = agent.clone(instructions=assignment.instructions)
        if assignment.options is not None:
            agent = tailored(agent, assignment.options)
        schema = assignment.output_schema
        asked = assignment.input
        if schema is not None:
            fault = schema_fault(schema)
            if fault is not None:
                raise OutputInvalid(f"The expected output cannot be checked: {fault}.")
        task = ReasoningTask(
            ctx=ctx,
            agent=agent,
            input=asked,
            loop=self._loop,
            model=assignment.model,
            context=assignment.context,
            session_id=assignment.session_id,
            listens=schema is None,
        )
        result = await self._approaches.get(approach_name, agent, asked).solve(task)
        if schema is None or result.calls:
            return result.output, result
        conversation = as_items(asked)
        options = assignment.options
        fixes = MAX_FIXES if options is None or options.repair else 0
        for attempt in range(1, fixes + 2):
            value, faults = fit(result.output, schema)
            if not faults:
                return value, result
            if attempt > fixes:
                raise OutputInvalid(
                    f"The answer does not fit its JSON Schema after {fixes} repairs: "
                    + "; ".join(faults),
                    hint="Loosen expected_output, say more about it, or use a stronger model.",
                    errors=[FieldError(path="output", message=fault) for fault in faults],
                )
            conversation += [
                message("assistant", result.text),
                message("user", _complaint(faults)),
            ]
            # Only the form is mended: with tools, a repair could act a second time.
            result = await task.run(
                without_tools(agent, input_guardrails=[]),
                conversation,
                step=f"fix/{attempt}",
                max_turns=1,
            )
        raise AssertionError("the last attempt returns or raises")

    def _staff(self, assignment: Assignment) -> tuple[Agent[Any], str]:
        catalog = self._catalog()
        if assignment.agent is None:
            tools = [catalog.tool(name) for name in assignment.tools]
            return generalist(tools), assignment.approach or DEFAULT
        agent = catalog.agent(assignment.agent)
        info = catalog.describe_agent(assignment.agent)
        missing = [name for name in assignment.tools if name not in info.tools]
        if missing:
            agent = agent.clone(tools=[*agent.tools, *(catalog.tool(name) for name in missing)])
        return agent, assignment.approach or info.approach or DEFAULT


def _complaint(faults: Sequence[str]) -> str:
    lines = "\n".join(f"- {fault}" for fault in faults)
    return (
        f"That answer does not have the form that was asked for:\n{lines}\n"
        "Answer again with the corrected JSON alone."
    )
