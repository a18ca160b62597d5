"""The agents that both servers run, unchanged, and the two tools they call.

Leans on the SDK alone. Refuses to choose a provider: the model's name steers the mock.
"""

import asyncio

from agents import Agent, function_tool


@function_tool
def look_up(topic: str, page: int) -> str:
    """Look a topic up in the handbook.

    Args:
        topic: What to look up.
        page: The page to start from.
    """
    return f"Page {page} of the handbook has three paragraphs on {topic}."


@function_tool
async def nap(seconds: float) -> str:
    """Wait.

    Args:
        seconds: For how long.
    """
    await asyncio.sleep(seconds)
    return "rested"


plain = Agent(name="plain", instructions="Answer in one sentence.", model="mock-plain")
tools = Agent(
    name="tools",
    instructions="Look things up before you answer.",
    tools=[look_up],
    model="mock-tools",
)
stream = Agent(name="stream", instructions="Answer at length.", model="mock-stream")
paced = Agent(name="paced", instructions="Answer at length.", model="mock-paced")
stamped = Agent(name="stamped", instructions="Answer at length.", model="mock-stamped")
slow = Agent(name="slow", instructions="Take your time.", model="mock-slow")
BY_NAME = {agent.name: agent for agent in (plain, tools, stream, paced, stamped, slow)}
