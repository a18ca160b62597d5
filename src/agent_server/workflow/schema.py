"""The JSON Schema of a workflow's definition, for editors and for other programs.

Leans on the domain's models, which it is made from. Refuses to say what only validation can: that
names exist, that nodes can be reached, that expressions can be read.
"""

from agent_server.domain.base import JsonObject
from agent_server.domain.workflows import WorkflowDefinition


def definition_schema() -> JsonObject:
    """Draft 2020-12. ``docs/workflow.schema.json`` holds it."""
    schema = WorkflowDefinition.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Workflow",
        "description": "A workflow of Agent Server; docs/workflows.md says what each part means.",
    }
