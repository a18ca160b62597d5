"""Tools that the server brings, for agents files to import and give to their agents.

    from agents import Agent
    from agent_server.tools import recall, remember

    clerk = Agent(name="Clerk", tools=[remember, recall])

Leans on the registry, which serves them. They work in a run of the server and say so elsewhere.
"""

from agent_server.inference.tags import tagged
from agent_server.registry.builtin_tools import calculator, current_time, text_statistics
from agent_server.registry.memory_tools import forget, recall, remember, search_documents

__all__ = [
    "calculator",
    "current_time",
    "forget",
    "recall",
    "remember",
    "search_documents",
    "tagged",
    "text_statistics",
]
