"""The page on workflows: its example is the one that the tests run, and it names everything."""

import re
from pathlib import Path

import yaml

from agent_server.domain.workflows import NODE_TYPES, Retry, WorkflowDefinition
from agent_server.workflow.expressions import expression
from agent_server.workflow.functions import FUNCTIONS

from .test_interpreter import TRIAGE

PAGE = (Path(__file__).parents[2] / "docs" / "workflows.md").read_text(encoding="utf-8")


def test_its_example_is_the_workflow_that_the_interpreter_is_tested_with() -> None:
    block = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    assert yaml.safe_load(block) == yaml.safe_load(TRIAGE)


def test_it_names_every_field_node_and_function() -> None:
    fields = {
        field.alias or name
        for model in (WorkflowDefinition, Retry)
        for name, field in model.model_fields.items()
    }
    known = {*NODE_TYPES, *FUNCTIONS, *fields}
    assert [name for name in sorted(known) if f"`{name}`" not in PAGE] == []


def test_the_language_has_the_constructs_that_it_lists() -> None:
    scope = {"a": [1, 2, 3]}
    for source in ("a[0:2] + [7 // 2, 2 ** 3, 7 % 4]", "{'x': 1}['x'] in a and not a[0] > 1"):
        assert expression(source).evaluate(scope)
    assert expression("'y' if a[0] - 1 else 'n'").evaluate(scope) == "n"
