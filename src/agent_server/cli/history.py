"""``agent-server runs retry``, ``fork``, ``compare`` and ``export``.

Leans on the client and on how a run is shown. Refuses to hide a side effect: what may happen again is
said before the run is followed.
"""

import json
import sys
from pathlib import Path
from typing import Any, get_args

import anyio
from rich.console import Console
from rich.table import Table

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import printable
from agent_server.cli.run import EXIT_FAILED, EXIT_OK, Show, see_through
from agent_server.cli.runs import LOOKING
from agent_server.cli.tree import usage_line
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.history import Brief, ForkedRun, Redact


async def retry_run(where: Target, run_id: str, budget: str | None, show: Show) -> int:
    """Retry and follow. Answers the exit code."""
    async with connect(where) as client:
        made = await client.runs.retry(run_id, budget=_budget(budget))
        _warn(made, show)
        return await see_through(client, made.id, where, show)


async def fork_run(
    where: Target, run_id: str, start: str | None, changes: dict[str, str | None], show: Show
) -> int:
    """Fork and follow. Answers the exit code."""
    fields: JsonObject = {name: value for name, value in changes.items() if value is not None}
    if "budget" in fields:
        fields["budget"] = _budget(fields["budget"])
    if "input" in fields:
        fields["input"] = _json_or_text(fields["input"])
    async with connect(where) as client:
        made = await client.runs.fork(run_id, start, **fields)
        _warn(made, show)
        return await see_through(client, made.id, where, show)


async def compare_runs(where: Target, run_id: str, other_id: str, as_json: bool) -> int:
    """Print the comparison; 1 when the runs differ."""
    async with connect(where, LOOKING) as client:
        found = await client.runs.compare(run_id, other_id)
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
        return EXIT_OK if found.same else EXIT_FAILED
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", found.a.id, found.b.id):
        table.add_column(column)
    for name, a, b in zip(
        ("status", "steps", "used", "time", "plan", "output"),
        _column(found.a),
        _column(found.b),
        strict=True,
    ):
        table.add_row(name, a, b)
    console = Console(highlight=False)
    console.print(table)
    for step in found.steps:
        what = f"only in {step.only_in}" if step.only_in else f"differs: {', '.join(step.changed)}"
        console.print(f"  {printable(step.step)} ({printable(step.name)}) {what}", markup=False)
    said = "The same." if found.same else f"First difference: {found.first_difference}"
    console.print(printable(said), markup=False)
    return EXIT_OK if found.same else EXIT_FAILED


async def export_run(where: Target, run_id: str, output: Path | None, redact: str) -> int:
    """Write the export to ``output``, or print it."""
    if redact not in get_args(Redact):
        raise InvalidRequest(f"--redact is {redact!r}; it must be none, secrets or content.")
    async with connect(where, LOOKING) as client:
        export = await client.runs.export(run_id, redact=redact)  # type: ignore[arg-type]  # checked
    text = json.dumps(export.model_dump(mode="json"), indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        await anyio.Path(output).write_text(text, encoding="utf-8")
        sys.stderr.write(f"Wrote {output}: {len(export.steps)} steps.\n")
    return EXIT_OK


def _warn(made: ForkedRun, show: Show) -> None:
    if show.silent:
        return
    sys.stderr.write(
        f"{made.id} shares {made.shared_tasks} tasks and {made.shared_steps} steps "
        f"of {made.forked_from}.\n"
    )
    for one in made.will_repeat:
        told = printable(json.dumps(one.arguments))[:200]
        sys.stderr.write(f"  May happen again: {printable(one.name)} {told} ({one.effect})\n")


def _column(brief: Brief) -> list[str]:
    took = "" if brief.duration_s is None else f"{brief.duration_s:.2f} s"
    output = brief.error if brief.output is None else json.dumps(brief.output, ensure_ascii=False)
    return [
        brief.status.value,
        str(brief.steps),
        usage_line(brief.usage),
        took,
        printable("\n".join(brief.plan)),
        printable((output or "")[:500]),
    ]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _budget(text: str | None) -> JsonObject | None:
    if text is None:
        return None
    value = _json_or_text(text)
    if not isinstance(value, dict):
        raise InvalidRequest('--budget must be a JSON object, such as {"max_tokens": 5000}.')
    return value
