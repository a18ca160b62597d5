"""The approach ``chain_of_thought``: think step by step first, then answer.

After Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models" (2022),
and the two-pass form without examples of Kojima et al. (2022): one pass works the matter out, a
second one reads that and gives the answer alone. Leans on the SDK's clones, and refuses to let
the thinking into the output, which keeps its type.
"""

from dataclasses import dataclass
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.reasoning.approach import AgentResult, ReasoningTask, as_items, message
from agent_server.reasoning.direct import without_tools

THINK = (
    "Work this out step by step before answering. Name what is asked, what is known and what "
    "follows from it, and check each step. Write down the reasoning; the answer comes later."
)
ANSWER = (
    "Using that reasoning, give the answer now, complete and in the form that was asked for. "
    "Do not repeat the reasoning."
)


@dataclass(frozen=True)
class Reasoned:
    """The answer, with a session that remembers the question and the answer only."""

    output: Any
    text: str
    session_items: tuple[JsonObject, ...] = ()
    new_items: tuple[JsonObject, ...] = ()
    calls: tuple[JsonObject, ...] = ()


class ChainOfThought:
    """The agent's tools serve the thinking; the answer is one model call."""

    name = "chain_of_thought"
    description = "Think step by step first, then answer from the reasoning."

    async def solve(self, task: ReasoningTask) -> AgentResult:
        asked = as_items(task.input)
        thinker = task.agent.clone(
            handoffs=[],
            output_type=None,
            output_guardrails=[],
            tool_use_behavior="run_llm_again",
        )
        thought = await task.run(thinker, [*asked, message("user", THINK)], step="think")
        if thought.calls:
            return thought
        speaker = without_tools(task.agent, input_guardrails=[])
        answer = await task.run(
            speaker,
            [*asked, message("assistant", thought.text), message("user", ANSWER)],
            step="answer",
            max_turns=1,
            listens=task.listens,
        )
        kept = (*asked, *answer.new_items) if answer.session_items else ()
        return Reasoned(answer.output, answer.text, kept, tuple(answer.new_items))
