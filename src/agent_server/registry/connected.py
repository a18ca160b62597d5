"""The agent loop with the agent's MCP servers connected for as long as it runs.

Leans on the durable loop and the registry's connections. Refuses to know the task.
"""

from typing import Any

from agents import Agent

from agent_server.domain.base import JsonObject
from agent_server.execution.ports import TaskContext
from agent_server.inference.agent_loop import AgentLoop, AgentResult
from agent_server.registry.registry import Registry


class ConnectedLoop:
    """``AgentLoop.run`` for agents as the registry keeps them."""

    def __init__(self, loop: AgentLoop, registry: Registry) -> None:
        self._loop = loop
        self._registry = registry

    async def run(
        self, ctx: TaskContext, agent: Agent[Any], input: str | list[JsonObject], **options: Any
    ) -> AgentResult:
        """See ``AgentLoop.run``. Raises ``ToolError`` when a server cannot be connected."""
        async with self._registry.connected(agent):
            return await self._loop.run(ctx, agent, input, **options)
