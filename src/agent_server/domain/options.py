"""What one run may change of its agent: more instructions, tools of the caller's, the answer's form.

Leans on the domain's base. Refuses to know the SDK: ``inference.tailored`` makes an agent of it.
"""

from pydantic import Field

from agent_server.domain.base import Frozen, JsonObject


class ClientTool(Frozen):
    """A function that the caller carries out: a call of it ends the run, which then asks for it."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    description: str = ""
    parameters: JsonObject = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class RunOptions(Frozen):
    """For this run alone. None leaves what the agent says."""

    instructions: str | None = Field(default=None, description="Said after the agent's own.")
    tools: tuple[ClientTool, ...] = Field(
        default=(), max_length=128, description="Functions that the caller carries out."
    )
    tool_choice: str | None = Field(
        default=None, description="`auto`, `none`, `required`, or the name of a tool."
    )
    parallel_tool_calls: bool | None = None
    output_schema: JsonObject | None = Field(
        default=None, description="A JSON Schema that the answer must fit."
    )
    output_name: str = "answer"
    output_strict: bool = False
    repair: bool = Field(
        default=True, description="Whether an answer that does not fit goes back to the agent."
    )
    max_output_tokens: int | None = Field(
        default=None, ge=1, description="Ceiling of each model call's answer."
    )
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    reasoning: JsonObject | None = None
    verbosity: str | None = None
    truncation: str | None = None
    alone: bool = Field(
        default=False, description="Without the agent's tools, handoffs and instructions."
    )
    steerable: bool = Field(
        default=False, description="Hear what is said into the run, though it has no session."
    )
    previous: str | None = Field(
        default=None, max_length=60, description="The run whose conversation this one continues."
    )
    count: bool = Field(
        default=False,
        description="End before the first model call, with `input_counted` and what it would take "
        "in as the usage.",
    )
    pieces: bool = Field(
        default=False, description="Keep where a message was cut into deltas, to replay them."
    )
    echo: JsonObject = Field(
        default_factory=dict, description="Kept for who submitted the run; no agent sees it."
    )
