"""``agent-server workflow …``: the commands and their options, and nothing behind them.

Leans on Typer and on the options that all commands share. Refuses logic, as ``cli.app`` does.
"""

from pathlib import Path
from typing import Annotated, List  # noqa: UP035

import typer

from agent_server.cli import work
from agent_server.cli.options import (
    AgentsOption,
    ApiKeyOption,
    ApproveOption,
    JsonOption,
    Many,
    QuietOption,
    ServerOption,
    Text,
    do,
    leave,
)

workflow_app = typer.Typer(help="Workflows: check, see, run and keep them.", no_args_is_help=True)
Files = Annotated[List[Path], typer.Argument(help="YAML or JSON files.")]  # noqa: UP006
Workflow = Annotated[
    str, typer.Argument(metavar="WORKFLOW", help="A file, or a stored `name` or `name@version`.")
]


@workflow_app.command("validate")
def validate(
    files: Files,
    agents: AgentsOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Say everything that is wrong with workflow files. With `--server` or `--agents`, the names
    of agents and tools are looked up, too."""
    leave(work.workflows.validate, work.connect.target(server, api_key), files, agents, json)


@workflow_app.command("show")
def show(
    workflow: Workflow,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Print a workflow's definition and, of a stored one, its versions."""
    do(work.workflows.show, work.connect.target(server, api_key), workflow, as_json=json)


@workflow_app.command("run")
def run(
    workflow: Workflow,
    variable: Annotated[
        Many, typer.Option("--variable", "-v", help="An input, `name=value`; JSON or a text.")
    ] = None,
    variables: Annotated[Text, typer.Option(help="All inputs, a JSON object.")] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Only say which way it would go; calls nothing.")
    ] = False,
    output: Annotated[
        Many, typer.Option("--output", help="With --dry: what a node gives, `node=value`.")
    ] = None,
    fail: Annotated[
        Many, typer.Option("--fail", help="With --dry: a node that fails, `node` or `node=code`.")
    ] = None,
    model: Annotated[Text, typer.Option(help="Model of every agent that names none.")] = None,
    session: Annotated[Text, typer.Option(help="Session that the run belongs to.")] = None,
    approve: ApproveOption = None,
    agents: AgentsOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a workflow and watch it. A file's `agents.py` beside it is served, if there is one and
    no other is named."""
    if (output or fail) and not dry:
        raise typer.BadParameter("--output and --fail go with --dry.")
    work.connect.warn_of_unknown_variables()
    asked = work.workflows.Asked.read(workflow, variable or [], variables, agents)
    where = work.connect.target(server, api_key)
    shown = work.run.Show(json=json, quiet=quiet, decision=work.run.decision_of(approve))
    if dry:
        leave(work.workflows.dry_run, where, asked, output or [], fail or [], json)
    leave(work.workflows.run, where, asked, {"model": model, "session_id": session}, shown)


@workflow_app.command("graph")
def graph(
    workflow: Annotated[
        Text, typer.Argument(help="A file, or a stored `name` or `name@version`.")
    ] = None,
    run: Annotated[Text, typer.Option("--run", help="A run instead, with its states.")] = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print Mermaid text.")] = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Draw a workflow, or a run with how far each node is, as a tree or as Mermaid text."""
    if (workflow is None) == (run is None):
        raise typer.BadParameter("name a workflow, or a run with --run.")
    do(
        work.workflows.graph,
        work.connect.target(server, api_key),
        workflow,
        run,
        as_mermaid=mermaid,
        as_json=json,
    )


@workflow_app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 50,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List the stored workflows, the youngest first."""
    do(
        work.workflows.list_workflows,
        work.connect.target(server, api_key),
        limit=limit,
        as_json=json,
    )


@workflow_app.command("push")
def push(
    files: Files,
    agents: AgentsOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Store workflow files under their names; what changed becomes a new version."""
    do(
        work.workflows.push,
        work.connect.target(server, api_key),
        files,
        agents=agents,
        as_json=json,
    )


@workflow_app.command("delete")
def delete(name: str, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """Delete a stored workflow with all its versions. Runs under way go on."""
    do(work.workflows.delete, work.connect.target(server, api_key), name)
