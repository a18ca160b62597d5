"""The agents that the clients of these tests talk to."""

from agents import Agent, function_tool


@function_tool
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@function_tool(needs_approval=True)
def wire_money(amount: int) -> str:
    """Send money, for good."""
    return f"sent {amount}"


clerk = Agent(name="clerk", instructions="You are a clerk.", tools=[add])
banker = Agent(name="banker", instructions="You are a banker.", tools=[wire_money])
