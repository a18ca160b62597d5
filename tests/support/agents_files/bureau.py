"""An unchanged Agents SDK file with most of what one may hold.

A handoff, tools with and without ``async``, structured output, a guardrail, instructions made at
each call, a tool that needs approval, and an MCP server that is a process of its own.
"""

import os
import sys
from pathlib import Path
from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunContextWrapper,
    function_tool,
    input_guardrail,
)
from agents.mcp import MCPServerStdio
from pydantic import BaseModel

ECHO_SERVER = Path(__file__).parents[1] / "mcp_echo_server.py"


class Report(BaseModel):
    city: str
    total: float
    notes: list[str]


@function_tool
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@function_tool
async def weather(city: str) -> str:
    """The weather in a city."""
    return f"The sun shines in {city}."


@function_tool(needs_approval=True)
def wire_money(amount: int) -> str:
    """Send money, for good."""
    return f"sent {amount}"


@input_guardrail(run_in_parallel=False)
async def no_secrets(
    context: RunContextWrapper[Any], agent: Agent[Any], given: str | list[Any]
) -> GuardrailFunctionOutput:
    text = given if isinstance(given, str) else str(given[-1])
    return GuardrailFunctionOutput(output_info="secrets", tripwire_triggered="password" in text)


def greeting(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
    customer = (context.context or {}).get("customer", "somebody")
    return f"You are {agent.name}. You serve {customer}."


echo = MCPServerStdio(
    name="echo",
    params={"command": sys.executable, "args": [str(ECHO_SERVER)], "env": dict(os.environ)},
    client_session_timeout_seconds=20,
)
clerk = Agent(
    name="Clerk",
    handoff_description="Writes reports.",
    instructions=greeting,
    tools=[add, weather],
    mcp_servers=[echo],
    output_type=Report,
)
desk = Agent(
    name="Front Desk", instructions=greeting, handoffs=[clerk], input_guardrails=[no_secrets]
)
talker = Agent(name="Talker", instructions="You talk.", tools=[add])
cashier = Agent(name="Cashier", instructions="You pay.", tools=[wire_money])
