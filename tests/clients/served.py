"""The agents that the clients of these tests talk to."""

from agents import Agent, function_tool


@function_tool
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


clerk = Agent(name="clerk", instructions="You are a clerk.", tools=[add])
