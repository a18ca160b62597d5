"""``agent-server approvals …``, ``reconcile …`` and ``runs signal``: the commands alone.

Leans on Typer and on the options that all commands share. Refuses logic, as ``cli.app`` does.
"""

from typing import Annotated, List  # noqa: UP035

import typer

from agent_server.cli import work
from agent_server.cli.options import ApiKeyOption, JsonOption, ServerOption, Text, leave

approvals_app = typer.Typer(help="What runs ask consent for: see it and decide.")
reconcile_app = typer.Typer(help="Calls that may or may not have happened: say how they went.")

Approvals = Annotated[List[str], typer.Argument(metavar="APPROVAL…")]  # noqa: UP006
RunArgument = Annotated[str, typer.Argument(metavar="RUN")]
StepArgument = Annotated[
    Text, typer.Argument(metavar="[STEP]", help="Its key; default: the one that is in doubt.")
]
ReasonOption = Annotated[str, typer.Option(help="Why; kept, and told to who asked.")]


def register(app: typer.Typer, runs_app: typer.Typer) -> None:
    """Add the commands of this file to the others."""
    app.add_typer(approvals_app, name="approvals")
    app.add_typer(reconcile_app, name="reconcile")
    runs_app.command("signal")(signal)


@approvals_app.command("list")
def approvals_list(
    status: Annotated[
        str, typer.Option(help="`pending`, `approved`, `rejected`, …, or `all`.")
    ] = "pending",
    run: Annotated[Text, typer.Option(help="Only of this run.")] = None,
    tool: Annotated[Text, typer.Option(help="Only about this tool, or workflow node.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 50,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List what waits for a decision, the newest first."""
    filters = {"status": None if status == "all" else status, "run_id": run, "subject": tool}
    leave(work.consent.list_approvals, work.connect.target(server, api_key), limit, filters, json)


@approvals_app.command("show")
def approvals_show(
    approval: Annotated[str, typer.Argument(metavar="APPROVAL")],
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Show one approval: who asks, for which call, with exactly which arguments."""
    leave(work.consent.show_approval, work.connect.target(server, api_key), approval, json)


@approvals_app.command("approve")
def approvals_approve(
    approvals: Approvals,
    edit: Annotated[
        Text, typer.Option(help="Call with these arguments instead: JSON, or `@FILE`.")
    ] = None,
    reason: ReasonOption = "",
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Consent to the calls. Leaves with 1 if one of them was not for you to decide any more."""
    if edit is not None and len(approvals) > 1:
        raise typer.BadParameter("--edit goes with one approval.")
    leave(
        work.consent.decide,
        work.connect.target(server, api_key),
        "approve",
        approvals,
        edit,
        reason,
        json,
    )


@approvals_app.command("reject")
def approvals_reject(
    approvals: Approvals,
    reason: ReasonOption = "",
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Refuse the calls; the agent is told the reason."""
    leave(
        work.consent.decide,
        work.connect.target(server, api_key),
        "reject",
        approvals,
        None,
        reason,
        json,
    )


@reconcile_app.command("list")
def reconcile_list(
    server: ServerOption = None, api_key: ApiKeyOption = None, json: JsonOption = False
) -> None:
    """List the calls in doubt of all runs that wait."""
    leave(work.consent.list_doubts, work.connect.target(server, api_key), json)


@reconcile_app.command("happened")
def reconcile_happened(
    run: RunArgument,
    step: StepArgument = None,
    result: Annotated[
        Text, typer.Option(help="What the call gave: JSON, a text, or `@FILE`; default: nothing.")
    ] = None,
    reason: ReasonOption = "",
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """The call took effect: the agent gets its result, and it is not made again."""
    leave(
        work.consent.reconcile,
        work.connect.target(server, api_key),
        run,
        step,
        "happened",
        result,
        reason,
        json,
    )


def _reconcile_without_result(outcome: str, words: str) -> None:
    def command(
        run: RunArgument,
        step: StepArgument = None,
        reason: ReasonOption = "",
        server: ServerOption = None,
        api_key: ApiKeyOption = None,
        json: JsonOption = False,
    ) -> None:
        leave(
            work.consent.reconcile,
            work.connect.target(server, api_key),
            run,
            step,
            outcome,
            None,
            reason,
            json,
        )

    reconcile_app.command(outcome.replace("_", "-"), help=words)(command)


_reconcile_without_result("did_not_happen", "The call had no effect: it is made now.")
_reconcile_without_result("fail", "Whatever it did: what needed the call fails.")


def signal(
    run: RunArgument,
    name: str,
    payload: Annotated[
        Text, typer.Option(help="What it carries: JSON, a text, or `@FILE`; default: null.")
    ] = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Send a signal to a run. One that nobody waits for yet is kept."""
    leave(work.consent.send_signal, work.connect.target(server, api_key), run, name, payload, json)
