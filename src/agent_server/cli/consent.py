"""What ``approvals …``, ``reconcile …`` and ``runs signal`` do.

Leans on the client; without a server, on an embedded one that carries out nothing: what was decided
counts once a server runs on the same database. Refuses to judge: the server does.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import print_error, printable
from agent_server.cli.output import new_table, print_json, wide_console
from agent_server.cli.questions import (
    Decision,
    all_doubts,
    approval_panel,
    doubts_of,
    json_or_text,
)
from agent_server.cli.run import EXIT_FAILED, EXIT_OK, read_text
from agent_server.cli.runs import LOOKING
from agent_server.cli.tree import arguments
from agent_server.domain.errors import AgentServerError, InvalidRequest, NotFound
from agent_server.domain.runs import Step

STYLES = {"pending": "yellow", "approved": "green", "rejected": "red", "expired": "red"}


async def list_approvals(
    where: Target, limit: int, filters: dict[str, str | None], as_json: bool
) -> int:
    """Print the inbox, or what else the filters choose."""
    async with connect(where, LOOKING) as client:
        page = await client.approvals.list(limit=limit, **filters)
    if as_json:
        print_json(_rows(page.data))
        return EXIT_OK
    table = new_table("approval", "status", "what", "asked by", "run", "asked", "expires")
    for found in page.data:
        given = f"({arguments(found.arguments)})" if found.arguments is not None else ""
        table.add_row(
            found.id,
            Text(found.status, style=STYLES.get(found.status, "dim")),
            Text(_line(f"{found.subject}{given} {found.detail}"), overflow="ellipsis"),
            Text(printable(found.agent or "–")),
            found.run_id,
            f"{found.requested_at:%Y-%m-%d %H:%M:%S}",
            "never" if found.expires_at is None else f"{found.expires_at:%Y-%m-%d %H:%M:%S}",
        )
    wide_console().print(table if page.data else "Nothing waits for a decision.")
    if page.next_cursor is not None:
        sys.stderr.write("There are more: raise --limit, or name a --run or --tool.\n")
    return EXIT_OK


async def show_approval(where: Target, approval_id: str, as_json: bool) -> int:
    """Print one approval whole."""
    async with connect(where, LOOKING) as client:
        found = await client.approvals.get(approval_id)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        Console(highlight=False).print(approval_panel(found))
    return EXIT_OK


async def decide(
    where: Target,
    decision: Decision,
    approval_ids: Sequence[str],
    edit: str | None,
    reason: str,
    as_json: bool,
) -> int:
    """Approve or reject each, and say what counts then. Answers the exit code."""
    more: dict[str, Any] = {"reason": reason} if reason else {}
    if edit is not None:
        more["arguments"] = _value(edit, strict=True)
    decided = []
    failed = False
    async with connect(where, LOOKING) as client:
        for approval_id in approval_ids:
            try:
                found = await client.approvals.decide(approval_id, decision, **more)
            except AgentServerError as error:
                print_error(error.info())
                failed = True
                continue
            decided.append(found)
            if not as_json:
                replaces = f", in place of {found.replaces}" if found.replaces else ""
                sys.stdout.write(f"{found.id}: {found.status}{replaces}\n")
    if as_json:
        print_json(_rows(decided))
    return EXIT_FAILED if failed else EXIT_OK


async def list_doubts(where: Target, as_json: bool) -> int:
    """Print the calls in doubt."""
    async with connect(where, LOOKING) as client:
        found = [step async for step in all_doubts(client)]
    if as_json:
        print_json(_rows(found))
        return EXIT_OK
    table = new_table("run", "step", "call", "begun")
    for step in found:
        call = _line(f"{step.name}({arguments(step.input)})")
        begun = f"{step.started_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(step.run_id, step.key, Text(call, overflow="ellipsis"), begun)
    wide_console().print(table if found else "No call is in doubt.")
    return EXIT_OK


async def reconcile(
    where: Target,
    run_id: str,
    step: str | None,
    outcome: Literal["happened", "did_not_happen", "fail"],
    result: str | None,
    reason: str,
    as_json: bool,
) -> int:
    """Say how the call went. Answers the exit code."""
    async with connect(where, LOOKING) as client:
        if step is None:
            step = _only(await doubts_of(client, run_id), run_id)
        given = None if result is None else _value(result)
        run = await client.runs.reconcile(run_id, step, outcome, result=given, reason=reason)
    if as_json:
        print_json(run.model_dump(mode="json"))
    else:
        sys.stdout.write(f"{run.id} {step}: {outcome.replace('_', ' ')}\n")
    return EXIT_OK


async def send_signal(
    where: Target, run_id: str, name: str, payload: str | None, as_json: bool
) -> int:
    """Send it. Answers the exit code."""
    async with connect(where, LOOKING) as client:
        given = None if payload is None else _value(payload)
        sent = await client.runs.signal(run_id, name, given)
    if as_json:
        print_json(sent.model_dump(mode="json"))
    else:
        sys.stdout.write(f"{sent.id}: sent {sent.name} to {sent.run_id}\n")
    return EXIT_OK


def _only(doubts: Sequence[Step], run_id: str) -> str:
    """The key of the one call in doubt. Raises ``NotFound`` and ``InvalidRequest``."""
    if not doubts:
        raise NotFound(
            f"No call of the run {run_id!r} is in doubt.",
            hint="`agent-server reconcile list` shows those that are.",
        )
    if len(doubts) > 1:
        keys = ", ".join(step.key for step in doubts)
        raise InvalidRequest(f"Several calls are in doubt: name the step, one of {keys}.")
    return doubts[0].key


def _value(text: str, *, strict: bool = False) -> Any:
    """JSON, a text (unless ``strict``), or what the file after an ``@`` holds."""
    if text.startswith("@"):
        text = read_text(Path(text[1:]))
    found = json_or_text(text)
    if strict and isinstance(found, str) and found == text:
        raise InvalidRequest(f"The arguments are not JSON: {text[:200]!r}.")
    return found


def _rows(found: Sequence[BaseModel]) -> list[Any]:
    return [one.model_dump(mode="json") for one in found]


def _line(text: str) -> str:
    return " ".join(printable(text).split())
