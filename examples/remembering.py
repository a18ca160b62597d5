"""An agent that remembers from one conversation to the next, and forgets when it is told to.

The section on memory in `examples/README.md` talks to it in three sessions.
"""

from agents import Agent

from agent_server.tools import forget, recall, remember

secretary = Agent(
    name="Secretary",
    handoff_description="Remembers what people tell it.",
    instructions=(
        "You look after one person. When they tell you something that will matter later, remember it "
        "under a short key. Before you answer a question about them, recall what you know, and say "
        "where you know it from. When they ask you to forget something, forget it."
    ),
    tools=[remember, recall, forget],
)
