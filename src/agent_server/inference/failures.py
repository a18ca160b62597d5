"""What the SDK raised, as the errors that end a run.

Leans on the SDK's exceptions and on the error tree. Refuses to know what was running.
"""

import json
from typing import Any

from agents import (
    Agent,
    AgentsException,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
)
from agents import MaxTurnsExceeded as SdkMaxTurnsExceeded
from agents import (
    ModelBehaviorError,
    OutputGuardrailTripwireTriggered,
    ToolGuardrailFunctionOutput,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
    UserError,
)
from agents.exceptions import ModelRefusalError, ModelTimeoutError, ToolTimeoutError
from pydantic_core import to_jsonable_python

from agent_server.domain.errors import (
    AgentServerError,
    GuardrailTripped,
    MaxTurnsExceeded,
    ModelError,
    ModelMalformed,
    ModelTimeout,
    RunError,
    ToolError,
)
from agent_server.inference.models import as_model_error

SEE_LOG = "The server's log has the traceback; correct the agents file and submit the run again."


def as_run_error(error: Exception, agent: Agent[Any], max_turns: int) -> AgentServerError:
    """``error``, raised while ``agent`` ran, as what is recorded in the run."""
    if isinstance(error, AgentServerError):
        return error
    who = f"Agent {agent.name!r}"
    if isinstance(error, InputGuardrailTripwireTriggered):
        found = error.guardrail_result
        return _tripped(who, "input", found.guardrail.get_name(), found.output)
    if isinstance(error, OutputGuardrailTripwireTriggered):
        output_found = error.guardrail_result
        return _tripped(who, "output", output_found.guardrail.get_name(), output_found.output)
    if isinstance(error, ToolInputGuardrailTripwireTriggered):
        return _tripped(who, "tool input", error.guardrail.get_name(), error.output)
    if isinstance(error, ToolOutputGuardrailTripwireTriggered):
        return _tripped(who, "tool output", error.guardrail.get_name(), error.output)
    if isinstance(error, SdkMaxTurnsExceeded):
        return MaxTurnsExceeded(
            f"{who} had no answer after {max_turns} turns.",
            hint="Raise AGENT_SERVER_MAX_TURNS, or give the agent a smaller task.",
        )
    if isinstance(error, ModelBehaviorError):
        return ModelMalformed(
            f"The model of {who[0].lower()}{who[1:]} answered something unusable: {error}",
            hint="Submit the run again, or use a model that follows tools and schemas better.",
        )
    if isinstance(error, ModelRefusalError):
        return ModelError(str(error), hint="Rephrase the input.")
    if isinstance(error, ModelTimeoutError):
        return ModelTimeout(str(error), hint="The agent's model settings set this timeout.")
    if isinstance(error, ToolTimeoutError):
        return ToolError(str(error), hint="Raise the tool's timeout.")
    if isinstance(error, UserError):
        cause = error.__cause__
        if isinstance(cause, AgentServerError) and not isinstance(cause, ToolError):
            return cause
        if cause is not None:
            # A replayed failure is a ToolError that already names the type it had at first.
            replayed = isinstance(cause, ToolError)
            why = str(cause) if replayed else f"{type(cause).__name__}: {cause}"
            return ToolError(f"{str(error).partition(':')[0]}: {why}", hint=SEE_LOG)
        return RunError(f"{who} cannot run: {error}", hint=SEE_LOG)
    model_error = as_model_error(error)
    if model_error is not None:
        return model_error
    if isinstance(error, AgentsException):
        return RunError(f"{who} failed: {error}", hint=SEE_LOG)
    return RunError(f"{who} failed: {type(error).__name__}: {error}", hint=SEE_LOG)


def _tripped(
    who: str,
    kind: str,
    name: str,
    output: GuardrailFunctionOutput | ToolGuardrailFunctionOutput,
) -> GuardrailTripped:
    said = ""
    if output.output_info is not None:
        value = to_jsonable_python(output.output_info, fallback=str)
        said = f" It says: {value if isinstance(value, str) else json.dumps(value)}"
    return GuardrailTripped(
        f"{who} was stopped by the {kind} guardrail {name!r}.{said}",
        hint="The guardrail did its work; change the input if it was meant well.",
    )
