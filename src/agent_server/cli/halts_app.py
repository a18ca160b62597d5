"""``agent-server runs pause|resume|cancel`` and ``plan show|edit``: the commands alone.

Leans on Typer and on the options that all commands share. Refuses logic, as ``cli.app`` does.
"""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from agent_server.cli import work
from agent_server.cli.options import ApiKeyOption, JsonOption, ServerOption, Text, do

plan_app = typer.Typer(help="The plan of a goal, also before it is carried out.")

RunOption = Annotated[Text, typer.Argument(metavar="[RUN]", help="Which run; or give filters.")]
TaskOption = Annotated[Text, typer.Option(help="Only this task of the run, by its id.")]
AgentOption = Annotated[Text, typer.Option(help="Every run of this agent.")]
SessionOption = Annotated[Text, typer.Option(help="Every run of this session.")]
WorkflowOption = Annotated[Text, typer.Option(help="Every run of this workflow.")]
StatusOption = Annotated[Text, typer.Option(help="Every run with this status.")]
ReasonOption = Annotated[str, typer.Option(help="Why; said in what ends.")]
VERBS = {
    "pause": "Let a run, one task of it, or every run that fits, stand still until it is resumed.",
    "resume": "Let what is paused go on; of a run whose plan waits for review, the plan.",
    "cancel": "Cancel a run, one task of it, or every run that fits; what is in flight stops.",
}


def register(app: typer.Typer, runs_app: typer.Typer) -> None:
    """Add the commands of this file to the others."""
    for verb, words in VERBS.items():
        runs_app.command(verb, help=words)(_command(verb))
    app.add_typer(plan_app, name="plan")


def _command(verb: str) -> Callable[..., None]:
    def command(
        run_id: RunOption = None,
        task: TaskOption = None,
        agent: AgentOption = None,
        session: SessionOption = None,
        workflow: WorkflowOption = None,
        status: StatusOption = None,
        reason: ReasonOption = "",
        server: ServerOption = None,
        api_key: ApiKeyOption = None,
    ) -> None:
        filters = {"agent": agent, "session_id": session, "workflow": workflow, "status": status}
        _steer(verb, run_id, task, filters, reason, server, api_key)

    if verb != "cancel":  # the others keep no reason: Typer does not offer what the signature hides
        taken = signature(command)
        kept = [one for name, one in taken.parameters.items() if name != "reason"]
        command.__signature__ = taken.replace(parameters=kept)  # type: ignore[attr-defined]
    return command


def _steer(
    verb: str,
    run_id: str | None,
    task: str | None,
    filters: dict[str, str | None],
    reason: str,
    server: str | None,
    api_key: str | None,
) -> None:
    chosen = {name: value for name, value in filters.items() if value is not None}
    if (run_id is None) == (not chosen):
        raise typer.BadParameter("give a run, or filters that say which runs.")
    if task is not None and run_id is None:
        raise typer.BadParameter("--task goes with a run.")
    do(work.halts.steer, work.connect.target(server, api_key), verb, run_id, task, chosen, reason)


@plan_app.command("show")
def plan_show(
    run_id: str, server: ServerOption = None, api_key: ApiKeyOption = None, json: JsonOption = False
) -> None:
    """Print a run's plan and how far each task is; ``--json`` is what `plan edit` reads."""
    do(work.halts.show_plan, work.connect.target(server, api_key), run_id, as_json=json)


@plan_app.command("edit")
def plan_edit(
    run_id: str,
    file: Annotated[Path, typer.Option(help="The new plan, as JSON or YAML.")],
    resume: Annotated[bool, typer.Option("--resume", help="Then let the run go on.")] = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Edit a plan that waits for review (`run --review`), and print what changed."""
    edit = work.halts.read_plan(work.run.read_text(file))
    do(work.halts.edit_plan, work.connect.target(server, api_key), run_id, edit, resume=resume)
