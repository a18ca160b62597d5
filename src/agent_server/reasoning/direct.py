"""The approach ``direct``: one model call and no tools.

Leans on the SDK's way to clone an agent. Refuses to touch the user's agent itself.
"""

from dataclasses import replace
from typing import Any

from agents import Agent

from agent_server.reasoning.approach import AgentResult, ReasoningTask


class Direct:
    """The cheapest: for what the model knows or the input says."""

    name = "direct"
    description = "Answer in one model call, without tools."

    async def solve(self, task: ReasoningTask) -> AgentResult:
        return await task.run(without_tools(task.agent), max_turns=1)


def without_tools(agent: Agent[Any], **changes: Any) -> Agent[Any]:
    """A copy of ``agent`` that can only speak: no tools, no MCP servers, no handoffs."""
    settings = replace(agent.model_settings, tool_choice=None, parallel_tool_calls=None)
    return agent.clone(
        **{
            "tools": [],
            "mcp_servers": [],
            "handoffs": [],
            "model_settings": settings,
            **changes,
        }
    )
