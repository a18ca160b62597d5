"""The plan as a model writes it: the shape it is asked for, and a forgiving reading of the answer.

Leans on Pydantic and on the SDK's output types. Refuses to judge the plan: what can be read
becomes a ``Plan``, what cannot becomes faults that go back to the model.

The shape is strict in the sense of structured outputs: every field required, no free-form
object. What is free-form in a plan (a JSON Schema, an action's parameters) is therefore JSON
written as text. The reading takes the plain object as well, since models without strict mode
write it so.
"""

import json
from typing import Annotated, Any

from agents import AgentOutputSchemaBase
from agents.strict_schema import ensure_strict_json_schema
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError
from agent_server.domain.plans import OnFailure, Plan, PlanAction, PlanTask

_SCHEMA_WORDS = frozenset(
    {"type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf"}
)


def _expected(value: Any) -> Any:
    """A text that is a JSON Schema becomes one; other texts stay texts."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            read = json.loads(value)
        except ValueError:
            return value
        if isinstance(read, dict) and _SCHEMA_WORDS & read.keys():
            return read
    return value or None


def _parameters(value: Any) -> Any:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from error
    return value


def _list(value: Any) -> Any:
    return [] if value is None else value


def _blank(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


Names = Annotated[list[str], BeforeValidator(_list)]
MaybeText = Annotated[str | None, BeforeValidator(_blank)]


class _Draft(BaseModel):
    model_config = ConfigDict(extra="ignore")


class TaskDraft(_Draft):
    """One unit of the work."""

    id: str = Field(description="Short and unique: t1, t2, …")
    description: str = Field(
        description="What to do, complete in itself: who does it sees nothing else of the plan."
    )
    agent: MaybeText = Field(
        default=None, description="Name of the agent that does it; null if none of them fits."
    )
    tools: Names = Field(default_factory=list, description="Names of the tools that it needs.")
    expected_output: Annotated[
        str | JsonObject | None,
        BeforeValidator(_expected),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]}),
    ] = Field(
        default=None,
        description="What the result looks like: a sentence, or a JSON Schema as JSON text.",
    )
    depends_on: Names = Field(
        default_factory=list, description="Ids of the tasks whose results it needs."
    )
    when: MaybeText = Field(
        default=None,
        description="A condition over results of tasks it depends on, such as "
        "nodes.t1.output == 'yes'; null to run always.",
    )
    on_failure: OnFailure = Field(
        default="retry",
        description="retry: try again, then fail; fail: fail at once; continue: go on without.",
    )


class ActionDraft(_Draft):
    """What happens outside when something happened."""

    trigger: str = Field(description="An event, such as run.succeeded or task.completed:t1.")
    action: str = Field(description="Name of the action.")
    parameters: Annotated[
        JsonObject, BeforeValidator(_parameters), WithJsonSchema({"type": "string"})
    ] = Field(default_factory=dict, description="The action's parameters: a JSON object as text.")


class PlanDraft(_Draft):
    """A goal, broken into tasks and actions."""

    tasks: list[TaskDraft]
    actions: Annotated[list[ActionDraft], BeforeValidator(_list)] = Field(default_factory=list)


class PlanOutput(AgentOutputSchemaBase):
    """The planner's output type. An answer that cannot be read is handed on as it is, so that it
    is repaired by the model instead of ending the run."""

    def is_plain_text(self) -> bool:
        return False

    def name(self) -> str:
        return "plan"

    def json_schema(self) -> dict[str, Any]:
        schema = ensure_strict_json_schema(PlanDraft.model_json_schema())
        _drop_defaults(schema)
        return schema

    def is_strict_json_schema(self) -> bool:
        return True

    def validate_json(self, json_str: str) -> Any:
        try:
            return json.loads(json_str)
        except ValueError:
            return json_str


def _drop_defaults(schema: Any) -> None:
    """Strict mode requires every field and refuses defaults."""
    if isinstance(schema, dict):
        if not isinstance(schema.get("default"), dict) or "type" in schema:
            schema.pop("default", None)
        for value in schema.values():
            _drop_defaults(value)
    elif isinstance(schema, list):
        for value in schema:
            _drop_defaults(value)


def read_plan(answer: Any, revision: int) -> tuple[Plan | None, list[FieldError]]:
    """``answer`` as a plan, or everything that keeps it from being one."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            return None, [FieldError(path="plan", message=f"the plan is not JSON: {error}")]
    try:
        draft = PlanDraft.model_validate(answer)
    except ValidationError as error:
        return None, [
            FieldError(path=".".join(map(str, e["loc"])) or "plan", message=e["msg"])
            for e in error.errors()
        ]
    return (
        Plan(
            tasks=tuple(PlanTask(**task.model_dump()) for task in draft.tasks),
            actions=tuple(PlanAction(**action.model_dump()) for action in draft.actions),
            revision=revision,
        ),
        [],
    )
