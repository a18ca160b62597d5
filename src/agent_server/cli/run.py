"""``agent-server run``: submit one run, show it live, print its answer.

Leans on the client, the display and, without a server, on an embedded one. Refuses to lose a
run: leaving it says how to come back.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agent_server.cli import follow as following
from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import printable
from agent_server.cli.questions import Decision, tell_how_to_answer
from agent_server.cli.terminal import somebody_there
from agent_server.client import AgentServerClient
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest, InvalidWorkflow
from agent_server.domain.runs import RunStatus
from agent_server.workflow.source import Source, read_source

EXIT_OK, EXIT_FAILED, EXIT_WAITING, EXIT_DETACHED = 0, 1, 3, 130


@dataclass(frozen=True)
class Show:
    """How a run is told: ``json`` only its final JSON, ``quiet`` only its answer."""

    json: bool = False
    quiet: bool = False
    decision: Decision | None = None
    """What to say to whatever the run asks for; None asks whoever is there."""

    @property
    def silent(self) -> bool:
        return self.json or self.quiet


def decision_of(approve: bool | None) -> Decision | None:
    """What ``--approve`` and ``--reject`` mean."""
    return None if approve is None else "approve" if approve else "reject"


async def run(
    where: Target, fields: JsonObject, show: Show, overrides: Mapping[str, Any] | None = None
) -> int:
    """Submit the run that ``fields`` describe and follow it. Answers the exit code."""
    async with connect(where, overrides) as client:
        accepted = await client.runs.create(**fields)
        return await see_through(client, accepted.id, where, show)


async def follow(where: Target, run_id: str, show: Show) -> int:
    """Follow a run that was submitted before. Answers the exit code."""
    async with connect(where) as client:
        await client.runs.get(run_id)
        return await see_through(client, run_id, where, show)


async def see_through(client: AgentServerClient, run_id: str, where: Target, show: Show) -> int:
    """Show the run, answer what it asks as far as somebody is there, and print how it ended or
    what it waits for. Answers the exit code."""
    asking = somebody_there() and not show.json
    followed = await following.follow(
        client,
        run_id,
        following.display_for(Console(highlight=False), silent=show.silent),
        decision=show.decision,
        person=Console(stderr=True, highlight=False) if asking else None,
        alone=where.url is None,
    )
    if followed is None:
        sys.stderr.write(come_back(run_id, where))
        return EXIT_DETACHED
    run = followed.run
    if show.json:
        following.print_run_json(run)
    elif run.status.ended:
        following.print_answer(run, plain=show.quiet)
    if run.status.ended:
        return EXIT_OK if run.status is RunStatus.SUCCEEDED else EXIT_FAILED
    tell_how_to_answer(followed.asks, where.flags, seen=asking)
    if not followed.asks and run.waiting_for is not None:
        sys.stderr.write(f"The run waits: {printable(run.waiting_for.detail)}\n")
    sys.stderr.write(f"Go on with:\n  agent-server runs follow {run.id}{where.flags}\n")
    return EXIT_WAITING


def come_back(run_id: str, where: Target) -> str:
    """What to do after leaving a run."""
    command = f"agent-server runs follow {run_id}{where.flags}"
    if where.url:
        return f"\nLeft the run, which goes on at {where.url}. Come back with:\n  {command}\n"
    return (
        "\nLeft the run. It stands still until a server starts in this folder, and loses nothing. "
        f"Go on with:\n  {command}\n"
    )


def request(
    text: str | None,
    *,
    agent: str | None,
    workflow: Path | None,
    variables: str | None,
    **common: str | None,
) -> JsonObject:
    """The fields of the run that the options describe. Raises ``InvalidRequest``."""
    fields: JsonObject = {name: value for name, value in common.items() if value is not None}
    if workflow is not None:
        fields["workflow"] = read_workflow(workflow).data
        if variables is not None:
            fields["variables"] = json_object(variables, "--variables")
    elif agent is not None:
        fields |= {"agent": agent, "input": _text(text)}
    else:
        fields["goal"] = _text(text)
    return fields


def read_text(path: Path) -> str:
    """What the file holds. Raises ``InvalidRequest``."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidRequest(f"The file {str(path)!r} cannot be read: {reason}.") from error


def read_workflow(path: Path) -> Source:
    """The definition in a YAML or JSON file. Raises ``InvalidRequest`` with its line."""
    text = read_text(path)
    try:
        return read_source(text)
    except InvalidWorkflow as error:
        told = error.errors[0]
        line = f", line {told.line}" if told.line else ""
        raise InvalidRequest(
            f"The workflow file {str(path)!r}{line} is not a workflow: {told.message}.",
            hint=error.hint,
        ) from error


def json_object(text: str, option: str) -> JsonObject:
    """The object that an option holds. Raises ``InvalidRequest``."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{option} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f'{option} must be a JSON object, such as {{"text": "hello"}}.')
    return value


def _text(text: str | None) -> str:
    return sys.stdin.read().strip() if text == "-" else (text or "")
