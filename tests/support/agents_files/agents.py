"""An unchanged Agents SDK file: handoffs, tools, structured output, an MCP server.

``COUNT_FILE`` names a file that gets a line for each call of a tool, so that a test can tell a
call that ran twice from a result that was replayed.
"""

import os
import sys
from pathlib import Path

from agents import Agent, function_tool
from agents.mcp import MCPServerStdio
from pydantic import BaseModel

ECHO_SERVER = Path(__file__).parents[1] / "mcp_echo_server.py"


def count(what: str) -> None:
    path = os.environ.get("COUNT_FILE")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{what}\n")


@function_tool
def add(a: float, b: float) -> float:
    """Add two numbers."""
    count(f"add {a} {b}")
    return a + b


@function_tool
async def weather(city: str) -> str:
    """The weather in a city."""
    count(f"weather {city}")
    return f"The sun shines in {city}."


@function_tool
def fail(reason: str) -> str:
    """Always fails."""
    count(f"fail {reason}")
    raise RuntimeError(reason)


class Verdict(BaseModel):
    score: int
    reason: str


echo = MCPServerStdio(
    name="echo",
    params={"command": sys.executable, "args": [str(ECHO_SERVER)], "env": dict(os.environ)},
    client_session_timeout_seconds=20,
)

clerk = Agent(
    name="Clerk",
    handoff_description="Adds numbers and knows the weather.",
    instructions="Answer with the tools.",
    tools=[add, weather, fail],
)
desk = Agent(name="Front Desk", instructions="Hand over to the clerk.", handoffs=[clerk])
judge = Agent(name="Judge", instructions="Give a verdict.", output_type=Verdict)
boss = Agent(
    name="Boss",
    instructions="Ask the clerk.",
    tools=[clerk.as_tool("ask_clerk", "Ask the clerk a question.")],
)
caller = Agent(name="Caller", instructions="Use the echo server.", mcp_servers=[echo])
