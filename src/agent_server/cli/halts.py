"""What ``runs pause|resume|cancel`` and ``plan show|edit`` do.

Leans on the client; without a server, on an embedded one that carries out nothing. Refuses to
judge a plan: the server does, and says every fault.
"""

import json
import sys
from typing import Any, Literal, cast

import yaml
from pydantic import ValidationError

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import printable
from agent_server.cli.output import new_table, print_json, wide_console
from agent_server.cli.runs import LOOKING
from agent_server.cli.tree import standing
from agent_server.domain.errors import FieldError, InvalidRequest
from agent_server.domain.plans import PlanEdit

Verb = Literal["cancel", "pause", "resume"]


async def steer(
    where: Target,
    verb: str,
    run_id: str | None,
    task: str | None,
    filters: dict[str, str],
    reason: str,
) -> None:
    """Pause, resume or cancel, and say how each run then stands."""
    async with connect(where, LOOKING) as client:
        runs = client.runs
        if run_id is None:
            more = {"reason": reason} if reason else {}
            done = await runs.many(cast(Verb, verb), **filters, **more)
            for run in done.data:
                sys.stdout.write(f"{run.id}: {standing(run.status, run.waiting_for)}\n")
            for refused in done.refused:
                sys.stdout.write(f"{refused}: left alone\n")
            said = "There are more: repeat the command.\n" if done.more else ""
            sys.stdout.write(said or ("" if done.data or done.refused else "No such runs.\n"))
            return
        if verb == "cancel" and task is not None:
            stopped = await runs.cancel_task(run_id, task, reason=reason)
            sys.stdout.write(f"{stopped.id}: {stopped.status}\n")
            return
        if verb == "cancel":
            run = await runs.cancel(run_id, reason)
        elif verb == "pause":
            run = await runs.pause(run_id, task=task)
        else:
            run = await runs.resume(run_id, task=task)
    sys.stdout.write(f"{run.id}: {standing(run.status, run.waiting_for)}\n")


async def show_plan(where: Target, run_id: str, *, as_json: bool) -> None:
    """Print the plan as it is."""
    async with connect(where, LOOKING) as client:
        plan = await client.runs.plan(run_id)
    if as_json:
        print_json(plan.model_dump(mode="json"))
        return
    table = new_table("task", "agent", "status", "after", "what")
    for task in plan.tasks:
        what = " ".join(printable(task.description).split())
        table.add_row(task.id, task.agent or "–", task.status, ", ".join(task.depends_on), what)
    wide_console().print(table)


async def edit_plan(where: Target, run_id: str, edit: PlanEdit, *, resume: bool) -> None:
    """Put ``edit`` in place of the plan under review, and print what that changed."""
    async with connect(where, LOOKING) as client:
        before = await client.runs.plan(run_id)
        changed = await client.runs.edit_plan(run_id, edit, revision=before.revision)
        sys.stdout.write(json.dumps(changed.model_dump(mode="json"), indent=2) + "\n")
        if resume:
            run = await client.runs.resume(run_id)
            sys.stdout.write(f"{run.id}: {standing(run.status, run.waiting_for)}\n")


def read_plan(text: str) -> PlanEdit:
    """A plan from YAML or JSON, as ``plan show --json`` prints one too. Raises
    ``InvalidRequest``."""
    try:
        found: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"The plan cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest("A plan is an object with 'tasks' and perhaps 'actions'.")
    found.pop("revision", None)
    for task in found.get("tasks") or ():
        if isinstance(task, dict):
            task.pop("status", None)
            task.pop("output", None)
    try:
        return PlanEdit.model_validate(found)
    except ValidationError as error:
        faults = [
            FieldError(path=".".join(map(str, e["loc"])), message=e["msg"]) for e in error.errors()
        ]
        raise InvalidRequest("The plan does not fit.", errors=faults) from error
