"""The approach ``react``: reason, act, look at the result, and again until the answer is there.

After Yao et al., "ReAct: Synergizing Reasoning and Acting in Language Models" (2022), in the form
that models with native tool calls have made of it: the SDK's own loop. Leans on that loop, and
refuses to add a word to what the user's agent says.
"""

from agent_server.reasoning.approach import AgentResult, ReasoningTask


class React:
    """The default: the user's agent as it is."""

    name = "react"
    description = "Reason and call tools in turns until the answer is found: the agent as it is."

    async def solve(self, task: ReasoningTask) -> AgentResult:
        return await task.run()
