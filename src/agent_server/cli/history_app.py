"""``agent-server runs retry|fork|compare|export``, ``replay`` and ``test``: the commands alone.

Leans on Typer and on the options that all commands share. Refuses logic, as ``cli.app`` does.
"""

from pathlib import Path
from typing import Annotated, Optional

import typer

from agent_server.cli import work
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
    leave,
)

test_app = typer.Typer(
    help="Recorded runs as regression tests of your agents.", invoke_without_command=True
)
Paths = Optional[list[Path]]  # noqa: UP045  # Typer reads it at run time on Python 3.10
RedactOption = Annotated[
    str, typer.Option(help="`secrets`, or `content`: without any word that was said.")
]
BudgetOption = Annotated[
    Text, typer.Option(help="Ceilings instead of the run's, as JSON: '{\"max_tokens\": 5000}'.")
]


def register(app: typer.Typer, runs_app: typer.Typer) -> None:
    """Add the commands of this file to the others."""
    for name, command in (
        ("retry", retry),
        ("fork", fork),
        ("compare", compare),
        ("export", export),
    ):
        runs_app.command(name)(command)
    app.command("replay")(replay)
    app.add_typer(test_app, name="test")


def retry(
    run_id: str,
    budget: BudgetOption = None,
    approve: ApproveOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on where a run failed, as a new run, and follow that. What finished is not done again."""
    show = work.run.Show(json=json, quiet=quiet, decision=work.run.decision_of(approve))
    leave(work.history.retry_run, work.connect.target(server, api_key), run_id, budget, show)


def fork(
    run_id: str,
    start: Annotated[
        Text,
        typer.Option("--from", help="A task's id or path, or a step's key; default: all anew."),
    ] = None,
    input: Annotated[Text, typer.Option(help="What is given instead; JSON where it is.")] = None,
    instructions: Annotated[Text, typer.Option(help="Of the agent, from there on.")] = None,
    model: Annotated[Text, typer.Option(help="The model from there on.")] = None,
    approach: Annotated[Text, typer.Option(help="The approach of the task or run.")] = None,
    session: Annotated[Text, typer.Option(help="Go on in this session; default: a branch.")] = None,
    budget: BudgetOption = None,
    approve: ApproveOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do a part of a run again, with something changed, as a new run, and follow that."""
    changes = {
        **{"input": input, "instructions": instructions, "model": model, "approach": approach},
        **{"session_id": session, "budget": budget},
    }
    show = work.run.Show(json=json, quiet=quiet, decision=work.run.decision_of(approve))
    leave(work.history.fork_run, work.connect.target(server, api_key), run_id, start, changes, show)


def compare(
    run_id: str,
    other_id: str,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Show two runs side by side: plan, steps, output, cost, time. Leaves with 1 if they differ."""
    leave(work.history.compare_runs, work.connect.target(server, api_key), run_id, other_id, json)


def export(
    run_id: str,
    output: Annotated[
        File, typer.Option("--output", "-o", help="The file; default: print it.")
    ] = None,
    redact: RedactOption = "none",
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Write a whole run as one JSON file, to be kept, sent or replayed."""
    leave(work.history.export_run, work.connect.target(server, api_key), run_id, output, redact)


def replay(
    file: Annotated[Path, typer.Argument(help="A file of `runs export`.")],
    agents: AgentsOption = None,
    json: JsonOption = False,
) -> None:
    """Run the present code against a recorded run, offline, up to the first difference."""
    leave(work.replay.replay_file, file, agents, json)


@test_app.callback()
def test(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        leave(work.replay.run_tests, [], None, False)


@test_app.command("add")
def test_add(
    run_id: str,
    name: Annotated[Text, typer.Option(help="Of the test; default: the run's id.")] = None,
    folder: Annotated[
        File, typer.Option("--dir", help="Where tests are kept; default: tests/recorded.")
    ] = None,
    contains: Annotated[
        Text, typer.Option(help="Check only this, and other checks: a text in the output.")
    ] = None,
    schema: Annotated[File, typer.Option(help="A file with a JSON Schema of the output.")] = None,
    max_model_calls: Annotated[Number, typer.Option(min=0, help="At most so many.")] = None,
    max_tool_calls: Annotated[Number, typer.Option(min=0, help="At most so many.")] = None,
    max_cost_usd: Annotated[Text, typer.Option(help="At the present prices.")] = None,
    tools: Annotated[
        Text, typer.Option(help="Tools that are called in this order, comma-separated.")
    ] = None,
    redact: RedactOption = "none",
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Make a run a regression test: exact, or with checks."""
    checks = {
        "output_contains": contains,
        "output_schema": schema,
        "max_model_calls": max_model_calls,
        "max_tool_calls": max_tool_calls,
        "max_cost_usd": max_cost_usd,
        "tools": tools.split(",") if tools else None,
    }
    given = {key: value for key, value in checks.items() if value is not None}
    leave(
        work.replay.add_test,
        work.connect.target(server, api_key),
        run_id,
        name,
        folder,
        given,
        redact,
    )


@test_app.command("run")
def test_run(
    paths: Annotated[
        Paths, typer.Argument(help="Files or folders; default: tests/recorded.")
    ] = None,
    agents: AgentsOption = None,
    json: JsonOption = False,
) -> None:
    """Run the regression tests; leaves with 1 if one fails. `agent-server test` does the same."""
    leave(work.replay.run_tests, paths or [], agents, json)
