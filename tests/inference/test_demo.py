"""The demo model plans, calls tools and answers, from what any model sees."""

import json
from typing import Any

import pytest
from agents import Agent, ModelSettings, RunConfig, Runner, function_tool
from agents.agent_output import AgentOutputSchema
from agents.items import ModelResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from agent_server.domain.plans import Plan, PlanTask
from agent_server.inference.demo import DemoModel
from agent_server.inference.demo_fill import Filler
from agent_server.inference.demo_reply import LABEL, Offered, find_expression, reply
from agent_server.inference.models import FastModel, ModelRequest, respond
from agent_server.inference.openai_model import text_of
from agent_server.inference.providers import Providers
from agent_server.planning.draft import PlanOutput
from agent_server.registry.builtin_tools import calculator, current_time, text_statistics
from agent_server.settings import Settings

GOAL = "Compare three ways to store chat history and recommend one"
LISTS = """

Available agents:
- agent clerk: Files things.

Available tools:
- tool calculator: Computes.
- tool current_time: Tells the time.
- tool text_statistics: Counts words.
"""


class Draft(BaseModel):
    tasks: list[PlanTask]


async def plan_for(goal: str, lists: str = LISTS, schema: Any = None) -> Plan:
    request = ModelRequest(
        "Plan.", f"Goal:\n{goal}{lists}", ModelSettings(), [], schema or PlanOutput(), []
    )
    made = json.loads(text_of(await respond(DemoModel(), request, None)))
    return Plan(tasks=tuple(PlanTask.model_validate(task) for task in made["tasks"]))


@pytest.mark.parametrize(
    "goal",
    [GOAL, "Compare SQLite, Redis or files for a cache", "tea vs coffee?", "Plan a party", "x"],
)
async def test_a_plan_has_parallel_tasks_and_one_that_builds_on_them(goal: str) -> None:
    tasks = (await plan_for(goal)).tasks
    ids = [task.id for task in tasks]
    assert len(tasks) >= 3 and len(set(ids)) == len(ids)
    assert not tasks[0].depends_on and not tasks[1].depends_on
    assert set(tasks[-1].depends_on) == set(ids[:-1])
    for n, task in enumerate(tasks):
        assert set(task.depends_on) <= set(ids[:n])
        assert set(task.tools) <= {"calculator", "current_time", "text_statistics"}


async def test_a_plan_uses_no_tool_that_is_not_listed() -> None:
    tasks = (await plan_for(GOAL, "\n\nAvailable tools:\n- tool calculator: Computes.")).tasks
    assert {tool for task in tasks for tool in task.tools} == {"calculator"}
    assert not any(task.tools for task in (await plan_for(GOAL, "")).tasks)


async def test_a_plan_for_named_options_has_a_task_for_each() -> None:
    tasks = (await plan_for("Compare SQLite, Redis or PostgreSQL and recommend one")).tasks
    for option in ("SQLite", "Redis", "PostgreSQL"):
        assert any(f"against {option}." in task.description for task in tasks)


async def test_a_plan_of_what_is_left_takes_ids_that_no_finished_task_has() -> None:
    done = "\n\nFinished tasks (keep them):\n- facts: Collect.\n  result: x\n- score: y"
    ids = {task.id for task in (await plan_for(GOAL, LISTS + done)).tasks}
    assert not ids & {"facts", "score"}


async def test_a_plan_fits_another_schema_with_tasks_too() -> None:
    assert len((await plan_for(GOAL, schema=AgentOutputSchema(Draft, False))).tasks) >= 3


async def test_an_agent_on_the_demo_model_calls_tools_side_by_side_and_quotes_them() -> None:
    agent = Agent(name="A", model=DemoModel(), tools=[calculator, text_statistics, current_time])
    asked = "Compute 17 * 3 and count the words of this."
    result = await Runner.run(agent, asked, run_config=RunConfig(tracing_disabled=True))
    calls = [item for item in result.raw_responses[0].output if item.type == "function_call"]
    assert [call.name for call in calls] == ["calculator", "text_statistics"]
    assert len({call.call_id for call in calls}) == 2
    assert result.final_output.startswith(LABEL)
    assert "→ 51" in result.final_output and "'words': 9" in result.final_output


async def test_results_of_earlier_tasks_are_passed_on() -> None:
    asked = (
        "Write the answer.\n\nExpected result: text.\n\nThe larger goal: 1 + 1\n\nResults of "
        'earlier tasks. They are information:\n\n<result task="facts" status="succeeded">\n'
        f"{LABEL} SQLite is small.\n</result>"
    )
    request = ModelRequest(None, asked, ModelSettings(), [calculator], None, [])
    said = text_of(await respond(DemoModel(), request, None))
    assert said.startswith(f"{LABEL} Write the answer.") and "- facts: SQLite is small." in said


async def test_an_unknown_tool_is_called_only_when_the_message_is_about_it() -> None:
    seen: list[tuple[str, int]] = []

    @function_tool
    def lookup_invoice(customer: str, number: int) -> str:
        """Finds an invoice."""
        seen.append((customer, number))
        return "paid"

    agent = Agent(name="A", model=DemoModel(), tools=[lookup_invoice])
    config = RunConfig(tracing_disabled=True)
    assert (
        "paid"
        in (await Runner.run(agent, "Is invoice 7 of Acme paid?", run_config=config)).final_output
    )
    assert seen == [("Acme", 7)]
    await Runner.run(agent, "Good morning", run_config=config)
    assert len(seen) == 1


async def test_a_handoff_that_is_asked_for_is_taken() -> None:
    billing = Agent(name="Billing", model=DemoModel())
    front = Agent(name="Front", model=DemoModel(), handoffs=[billing])
    config = RunConfig(tracing_disabled=True)
    result = await Runner.run(front, "A billing question", run_config=config)
    assert result.last_agent.name == "Billing" and result.final_output.startswith(LABEL)


async def test_a_structured_answer_fits_its_type() -> None:
    class Report(BaseModel):
        verdict: str = Field(max_length=40)
        score: int = Field(ge=1, le=5)
        tags: list[str] = Field(min_length=2)

    agent = Agent(name="A", model=DemoModel(), output_type=Report)
    config = RunConfig(tracing_disabled=True)
    found = (await Runner.run(agent, "Rate it with 9", run_config=config)).final_output
    assert isinstance(found, Report) and found.verdict.startswith(LABEL) and found.score == 5


def test_a_schema_in_the_message_is_answered_with_json_that_fits() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = f"Count.\n\nAnswer with JSON alone that fits this JSON Schema:\n{json.dumps(schema)}"
    said = json.loads(reply(None, [{"role": "user", "content": asked}]).text)
    assert not list(Draft202012Validator(schema).iter_errors(said))


async def test_every_door_says_the_same_and_the_same_again() -> None:
    request = ModelRequest("Be kind.", "Hello there", ModelSettings(), [], None, [])
    model = DemoModel()
    assert isinstance(model, FastModel)
    heard: list[str] = []
    texts = {text_of(await respond(model, request, heard.append)) for _ in range(2)}
    assert len(heard) > 4 and {"".join(heard[: len(heard) // 2])} == texts
    streamed = [
        event
        async for event in model.stream_response(
            "Be kind.", "Hello there", ModelSettings(), [], None, [], request.tracing
        )
    ]
    deltas = [event.delta for event in streamed if event.type == "response.output_text.delta"]
    assert {"".join(deltas)} == texts
    last = streamed[-1]
    assert last.type == "response.completed" and last.response.usage is not None
    assert last.response.usage.output_tokens > 5


async def test_call_ids_are_new_at_each_point_of_a_conversation() -> None:
    tools = [Offered("calculator", "", calculator.params_json_schema)]
    first = reply(None, [{"role": "user", "content": "1 + 1"}], tools)
    history = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    again = reply(None, [*history, {"role": "user", "content": "1 + 1"}], tools)
    assert first.calls[0].call_id != again.calls[0].call_id
    assert first == reply(None, [{"role": "user", "content": "1 + 1"}], tools)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is 2+2*3?", "2+2*3"),
        ("compute (4 + 6) / 2.", "(4 + 6) / 2"),
        ("2 ** 10 please", "2 ** 10"),
        ("On 2024-01-02 it rained", None),
        ("no numbers", None),
    ],
)
def test_an_expression_is_found_in_a_text(text: str, found: str | None) -> None:
    assert find_expression(text) == found


scalars = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "enum": ["red", "blue"]},
        {"type": "string", "minLength": 3, "maxLength": 5},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": 3, "maximum": 9},
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "boolean"},
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "null"}, {"type": "integer"}]},
        {"const": "x"},
    ]
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda i: {"type": "array", "items": i, "minItems": 2}, inner),
        st.dictionaries(st.sampled_from(["a", "text", "zone", "name"]), inner, min_size=1).map(
            lambda p: {
                "type": "object", "properties": p, "required": list(p), "additionalProperties": False,
            }  # fmt: skip
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(schemas, st.text(max_size=60))
def test_what_is_filled_fits_its_schema(schema: dict[str, Any], message: str) -> None:
    value = Filler(message).value(schema)
    assert not list(Draft202012Validator(schema).iter_errors(value))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
async def test_any_message_is_answered(message: str) -> None:
    request = ModelRequest(None, message, ModelSettings(), [calculator], None, [])
    response: ModelResponse = await respond(DemoModel(), request, None)
    assert response.output


async def test_the_providers_know_the_demo_model_as_any_other() -> None:
    providers = Providers(Settings(_env_file=None, model="demo"))  # type: ignore[call-arg]
    assert isinstance(providers.get_model(None), DemoModel)
    assert {"id": "demo", "provider": "demo", "default": True} in providers.describe()
    await providers.aclose()
