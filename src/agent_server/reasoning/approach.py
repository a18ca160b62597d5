"""What an approach is: a way to solve one task with one agent.

Leans on the SDK's agents and on the durable loop that runs them. Refuses to know which
approaches there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agents import Agent

from agent_server.domain.base import JsonObject
from agent_server.execution.ports import TaskContext

AgentInput = str | list[JsonObject]
"""A text, or a list of the SDK's input items."""


class AgentResult(Protocol):
    """What running an agent gave."""

    @property
    def output(self) -> Any:
        """The final output as a JSON value."""

    @property
    def text(self) -> str:
        """The final output as text."""

    @property
    def session_items(self) -> Sequence[JsonObject]:
        """What the run adds to its session, to be stored with the run's last transaction."""

    @property
    def new_items(self) -> Sequence[JsonObject]:
        """What the run added to the conversation, as input items."""

    @property
    def calls(self) -> Sequence[JsonObject]:
        """Calls that the caller is to carry out before there is an output."""


class AgentRunner(Protocol):
    """The durable loop: runs an SDK agent, each of its effects a step below ``scope``."""

    async def run(
        self,
        ctx: TaskContext,
        agent: Agent[Any],
        input: AgentInput,
        *,
        scope: str = "",
        model: str | None = None,
        session_id: str | None = None,
        context: JsonObject | None = None,
        max_turns: int | None = None,
        listener: Agent[Any] | None = None,
    ) -> AgentResult: ...


@dataclass(frozen=True)
class ReasoningTask:
    """One task to solve, and the door through which agents are run for it."""

    ctx: TaskContext
    agent: Agent[Any]
    input: AgentInput
    loop: AgentRunner
    model: str | None = None
    context: JsonObject = field(default_factory=dict)
    scope: str = ""
    session_id: str | None = None
    listens: bool = True
    """Whether what is said into the run meanwhile may join the conversation."""

    async def run(
        self,
        agent: Agent[Any] | None = None,
        input: AgentInput | None = None,
        *,
        step: str = "",
        max_turns: int | None = None,
        listens: bool | None = None,
    ) -> AgentResult:
        """Run ``agent`` (the task's own by default) durably.

        What is said into the run meanwhile joins the conversation where it ``listens``: by default
        where there is no ``step``. Of several runs only the last may, since a replay would give
        an earlier one what came after it. An approach that runs more than one agent gives each its own ``step``, which becomes part
        of its steps' keys; the same run must have the same ``step`` on every replay.
        """
        listens = self.listens and not step if listens is None else listens
        return await self.loop.run(
            self.ctx,
            self.agent if agent is None else agent,
            self.input if input is None else input,
            scope="/".join(part for part in (self.scope, step) if part),
            model=self.model,
            session_id=self.session_id,
            context=self.context,
            max_turns=max_turns,
            listener=self.agent if listens else None,
        )


class Approach(Protocol):
    """A way to solve one task.

    ``solve`` is durable code: it learns from the world through ``task.run`` alone and takes the
    same way on every replay.
    """

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...

    async def solve(self, task: ReasoningTask) -> AgentResult: ...


def as_items(input: AgentInput) -> list[JsonObject]:
    """``input`` as a list of the SDK's input items."""
    return [message("user", input)] if isinstance(input, str) else list(input)


def message(role: str, content: str) -> JsonObject:
    """One input item that says ``content``."""
    return {"role": role, "content": content}


def as_text(input: AgentInput) -> str:
    """The words of ``input``, for rules that look at them."""
    if isinstance(input, str):
        return input
    return "\n".join(item["content"] for item in input if isinstance(item.get("content"), str))
