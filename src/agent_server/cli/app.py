"""The commands and their options, and nothing behind them.

Leans on Typer alone, so that ``--help`` answers at once: ``work`` imports what a command does when
it runs. Refuses logic: a command turns its options into one call.
"""

from typing import Annotated, Any

import typer

from agent_server import __version__
from agent_server.cli import consent_app, halts_app, work
from agent_server.cli.history_app import register
from agent_server.cli.memory_app import memory_app
from agent_server.cli.options import (
    AgentsOption,
    ApiKeyOption,
    ApproveOption,
    File,
    JsonOption,
    Number,
    QuietOption,
    ServerOption,
    Text,
    do,
    leave,
)
from agent_server.cli.workflow_app import workflow_app

app = typer.Typer(
    name="agent-server",
    help="Durable services from agents written with the OpenAI Agents SDK.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs_app = typer.Typer(help="Look at runs, follow and cancel them.", no_args_is_help=True)
db_app = typer.Typer(help="The database: its schema, its move to another.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
register(app, runs_app)
halts_app.register(app, runs_app)
consent_app.register(app, runs_app)
app.add_typer(db_app, name="db")
app.add_typer(memory_app, name="memory")
app.add_typer(workflow_app, name="workflow")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"agent-server {__version__}")
        raise typer.Exit()


@app.command()
def serve(
    host: Annotated[Text, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[Number, typer.Option(help="Port to listen on; 0 picks one.")] = None,
    role: Annotated[Text, typer.Option(help="`all`, `api` or `worker`.")] = None,
    reload: Annotated[bool, typer.Option("--reload", help="Reload on change.")] = False,
    agents: AgentsOption = None,
    generate_key: Annotated[
        bool,
        typer.Option("--generate-key", help="Make and print an API key if none is set."),
    ] = False,
) -> None:
    """Serve agents over HTTP."""
    options: dict[str, Any] = {"host": host, "port": port, "role": role, "agents": agents}
    work.serve.serve({**options, "reload": reload or None}, generate_key=generate_key)


@app.command()
def run(
    text: Annotated[
        Text,
        typer.Argument(metavar="GOAL", help="The goal, or the agent's input; `-` reads stdin."),
    ] = None,
    agent: Annotated[
        Text, typer.Option("--agent", "-a", help="Run this agent instead of planning.")
    ] = None,
    workflow: Annotated[
        File, typer.Option("--workflow", "-w", help="Run the workflow in this file.")
    ] = None,
    variables: Annotated[
        Text, typer.Option("--variables", help="The workflow's inputs, a JSON object.")
    ] = None,
    model: Annotated[Text, typer.Option(help="Model of every agent that names none.")] = None,
    session: Annotated[Text, typer.Option(help="Session that the run belongs to.")] = None,
    on_busy: Annotated[
        Text,
        typer.Option(
            help="While another run is on that session: `queue`, `reject`, `interrupt` or `steer`."
        ),
    ] = None,
    subject: Annotated[Text, typer.Option(help="The person whose data the run handles.")] = None,
    approach: Annotated[Text, typer.Option(help="How tasks are reasoned about.")] = None,
    review: Annotated[
        bool, typer.Option("--review", help="Stop once the goal is planned, for you to see it.")
    ] = False,
    approve: ApproveOption = None,
    agents: AgentsOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Carry out a goal, an agent or a workflow, and watch it."""
    if workflow is None and not text:
        raise typer.BadParameter("say what to do: a goal, or an agent's input.")
    if workflow is not None and (text or agent):
        raise typer.BadParameter("--workflow goes without a goal and without --agent.")
    if variables is not None and workflow is None:
        raise typer.BadParameter("--variables goes with --workflow.")
    work.connect.warn_of_unknown_variables()
    fields = work.run.request(
        text,
        agent=agent,
        workflow=workflow,
        variables=variables,
        model=model,
        session_id=session,
        on_busy=on_busy,
        subject=subject,
        approach=approach,
        review="plan" if review else None,
    )
    overrides = {"agents": agents} if agents else {}
    show = work.run.Show(json=json, quiet=quiet, decision=work.run.decision_of(approve))
    leave(work.run.run, work.connect.target(server, api_key), fields, show, overrides)


@runs_app.command("list")
def runs_list(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 20,
    status: Annotated[Text, typer.Option(help="Only with this status.")] = None,
    agent: Annotated[Text, typer.Option(help="Only of this agent.")] = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List runs, the newest first."""
    filters = {"status": status, "agent": agent}
    do(
        work.runs.list_runs,
        work.connect.target(server, api_key),
        limit=limit,
        as_json=json,
        filters=filters,
    )


@runs_app.command("show")
def runs_show(
    run_id: str, server: ServerOption = None, api_key: ApiKeyOption = None, json: JsonOption = False
) -> None:
    """Show one run as it is: its plan, tasks, steps and answer."""
    do(work.runs.show_run, work.connect.target(server, api_key), run_id, as_json=json)


@runs_app.command("follow")
def runs_follow(
    run_id: str,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    approve: ApproveOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Follow a run to its end. Without a server, one in this process carries it on."""
    show = work.run.Show(json=json, quiet=quiet, decision=work.run.decision_of(approve))
    leave(work.run.follow, work.connect.target(server, api_key), run_id, show)


@app.command("agents")
def agents_list(
    agents: AgentsOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List the agents that are served."""
    do(work.runs.list_agents, work.connect.target(server, api_key), agents=agents, as_json=json)


@app.command()
def config(json: JsonOption = False) -> None:
    """Print every setting: value, origin, meaning. Secrets are masked."""
    work.connect.warn_of_unknown_variables()
    work.configuration.print_config(as_json=json)


@app.command()
def doctor() -> None:
    """Check what a server here would stand on, with a remedy for each fault."""
    if not work.doctor.doctor():
        raise typer.Exit(1)


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the database to the newest schema; the server does so at its start, too."""
    do(work.database.upgrade_database)


@db_app.command("check")
def db_check() -> None:
    """Look for stored values that cannot be read, and say where they are."""
    do(work.database.check_database)


@db_app.command("vacuum")
def db_vacuum(
    days: Annotated[
        Number, typer.Option("--days", min=1, help="Age of runs that succeeded or were cancelled.")
    ] = None,
    failed_days: Annotated[
        Number, typer.Option("--failed-days", min=1, help="Age of runs that failed.")
    ] = None,
    detail_days: Annotated[
        Number, typer.Option("--detail-days", min=1, help="Age at which events and steps go.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many, and delete nothing.")
    ] = False,
) -> None:
    """Delete runs that ended long ago, or their events and steps; default: by the settings."""
    do(work.database.vacuum_database, days, failed_days, detail_days, dry_run)


@db_app.command("move-blobs")
def db_move_blobs() -> None:
    """Move large values to AGENT_SERVER_BLOBS, from the database and AGENT_SERVER_BLOBS_ALSO."""
    do(work.database.move_blobs)


@db_app.command("copy")
def db_copy(
    source: Annotated[str, typer.Option("--from", help="URL of the database that is copied.")],
    target: Annotated[str, typer.Option("--to", help="URL of an empty database.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a copy that was cut off.")
    ] = False,
) -> None:
    """Copy everything from SQLite to PostgreSQL, or back; stop the servers first."""
    do(work.database.copy_database, source, target, resume)
