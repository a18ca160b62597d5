"""``agent-server workflow …``: a file is looked at here, a name is asked of the server.

Leans on the client, and on the workflow room for files, so that no server is needed to check or
draw one. Refuses to guess which of the two a word is: a path, or anything with a YAML or JSON
ending, is a file.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from agent_server.cli import run as running
from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import print_error, printable
from agent_server.cli.follow import short_json
from agent_server.cli.graph import tree_of
from agent_server.cli.output import new_table, print_json, wide_console
from agent_server.cli.runs import LOOKING
from agent_server.cli.tree import MARKS, arguments, short
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, InvalidRequest, InvalidWorkflow
from agent_server.domain.stored_workflows import DryRun, WorkflowGraph, WorkflowReport
from agent_server.workflow.calls import split_name
from agent_server.workflow.picture import draw
from agent_server.workflow.source import Source, read_source
from agent_server.workflow.validation import validate as check

UNTOLD = frozenset({"output_schema", "workflow", "on_expiry", "on_reject", "timeout_s"})
"""What a dry run's lines leave out: it is the definition's, the same each time."""
UNCHECKED = "The names of agents and tools were not looked up: --agents or --server does that."


@dataclass(frozen=True)
class Asked:
    """What is to be run."""

    workflow: str | JsonObject
    source: Source | None
    """Where it comes from a file."""
    variables: JsonObject | None
    agents: str | None

    @classmethod
    def read(
        cls, workflow: str, given: Sequence[str], variables: str | None, agents: str | None
    ) -> "Asked":
        """Raises ``InvalidRequest`` for a file or a value that cannot be read."""
        values: JsonObject = running.json_object(variables, "--variables") if variables else {}
        values |= pairs(given, "--variable")
        source = None
        if is_file(workflow):
            path = Path(workflow)
            source = running.read_workflow(path)
            beside = path.parent / "agents.py"
            if agents is None and "AGENT_SERVER_AGENTS" not in os.environ and beside.exists():
                agents = str(beside)
        return cls(source.data if source else workflow, source, values or None, agents)

    @property
    def overrides(self) -> Mapping[str, Any]:
        return {"agents": self.agents} if self.agents else {}

    def placed(self, error: InvalidWorkflow) -> InvalidWorkflow:
        """``error`` with the lines of the file."""
        if self.source is not None:
            error.errors = tuple(
                e.model_copy(update={"line": self.source.line_of(e.path)}) for e in error.errors
            )
        return error


def is_file(workflow: str) -> bool:
    path = Path(workflow)
    return path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1 or path.is_file()


def pairs(given: Sequence[str], option: str) -> JsonObject:
    """``name=value`` for each; a value that is not JSON is a text."""
    found: JsonObject = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"{option} {pair!r} is not `name=value`.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


async def run(where: Target, asked: Asked, more: JsonObject, show: running.Show) -> int:
    """Run it and follow it. Answers the exit code."""
    fields = {name: value for name, value in more.items() if value is not None}
    fields |= {"workflow": asked.workflow, "variables": asked.variables}
    try:
        return await running.run(where, fields, show, asked.overrides)
    except InvalidWorkflow as error:
        raise asked.placed(error) from error


async def dry_run(
    where: Target, asked: Asked, outputs: Sequence[str], fail: Sequence[str], as_json: bool
) -> int:
    """Print which way it would go. Answers the exit code."""
    errors = dict(pair.partition("=")[::2] for pair in fail)
    errors = {node: code or "tool_error" for node, code in errors.items()}
    try:
        async with connect(where, {**LOOKING, **asked.overrides}) as client:
            found = await client.workflows.dry_run(
                asked.workflow,
                asked.variables,
                outputs=pairs(outputs, "--output"),
                errors=errors,
            )
    except InvalidWorkflow as error:
        raise asked.placed(error) from error
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_dry_run(found)
    return 0 if found.status == "succeeded" else 1


def print_dry_run(found: DryRun) -> None:
    console = wide_console()
    width = max((len(f"{n.path} {n.node}") for n in found.nodes), default=0)
    for node in found.nodes:
        mark, style = MARKS[node.status]
        name = printable(f"{node.path} {node.node}".ljust(width))
        line = Text.assemble((f"{mark} ", style), name, (f"  {node.type}", "dim"))
        told = {name: v for name, v in (node.input or {}).items() if name not in UNTOLD}
        if told:
            line.append(f"  {printable(arguments(told))}")
        if node.status == "succeeded":
            line.append(f" → {printable(short(node.output))}", "dim italic" if node.made_up else "")
        elif node.error or node.reason:
            why = node.error.message if node.error else str(node.reason)
            line.append(f"  {printable(why)}", style)
        console.print(line, no_wrap=True, overflow="ellipsis")
    if any(node.made_up for node in found.nodes):
        console.print(Text("What nobody said was made up: --output node=value says it.", "dim"))
    if found.error is not None:
        print_error(found.error)
    else:
        sys.stdout.write(f"\nAnswer:\n{short_json(found.output)}\n")


async def validate(where: Target, files: Sequence[Path], agents: str | None, as_json: bool) -> int:
    """Print what is wrong with each file. Answers the exit code."""
    reports: dict[str, WorkflowReport] = {}
    for path in files:
        text = running.read_text(path)
        if where.url or agents:
            async with connect(where, {**LOOKING, **({"agents": agents} if agents else {})}) as c:
                reports[str(path)] = await c.workflows.validate(text)
        else:
            reports[str(path)] = _checked_here(text)
    if as_json:
        print_json({path: report.model_dump(mode="json") for path, report in reports.items()})
    else:
        for name, report in reports.items():
            if report.valid:
                sys.stdout.write(f"{name}: valid\n")
                continue
            count = len(report.errors)
            message = f"{name} has {count} {'error' if count == 1 else 'errors'}:"
            print_error(ErrorInfo(code="", message=message, errors=report.errors))
        if not (where.url or agents):
            sys.stderr.write(UNCHECKED + "\n")
    return 0 if all(report.valid for report in reports.values()) else 1


def _checked_here(text: str) -> WorkflowReport:
    try:
        source = read_source(text)
        check(source.data, line=source.line_of)
    except InvalidWorkflow as error:
        return WorkflowReport(valid=False, errors=error.errors)
    return WorkflowReport(valid=True)


async def show(where: Target, workflow: str, *, as_json: bool) -> None:
    """Print a definition, and the versions of a stored one."""
    if is_file(workflow):
        data = running.read_workflow(Path(workflow)).data
        if as_json:
            print_json(data)
        else:
            sys.stdout.write(_yaml(data))
        return
    name, version = split_name(workflow)
    async with connect(where, LOOKING) as client:
        stored = await client.workflows.get(name, version)
        versions = (await client.workflows.versions(name, limit=10)).data
    if as_json:
        print_json(stored.model_dump(mode="json"))
        return
    sys.stdout.write(_yaml({**stored.definition, "version": stored.version}))
    table = new_table("version", "created", "by")
    for found in versions:
        mark = f"{found.version}{' (shown)' if found.version == stored.version else ''}"
        table.add_row(mark, f"{found.created_at:%Y-%m-%d %H:%M:%S}", printable(found.created_by))
    console = wide_console()
    console.print()
    console.print(table)


def _yaml(definition: JsonObject) -> str:
    first = ("name", "version", "description", "inputs", "variables", "nodes")
    ordered = {k: definition[k] for k in first if k in definition} | definition
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)


async def graph(
    where: Target, workflow: str | None, run_id: str | None, *, as_mermaid: bool, as_json: bool
) -> None:
    """Print a workflow, or a run, as a tree, as Mermaid text or as JSON."""
    found = await _graph(where, workflow, run_id)
    if as_json:
        print_json(found.model_dump(mode="json"))
    elif as_mermaid:
        sys.stdout.write(found.mermaid)
    else:
        console = wide_console()
        console.print(tree_of(found, console.width))


async def _graph(where: Target, workflow: str | None, run_id: str | None) -> WorkflowGraph:
    if workflow is not None and is_file(workflow):
        source = running.read_workflow(Path(workflow))
        return draw(check(source.data, line=source.line_of))
    async with connect(where, LOOKING) as client:
        if run_id is not None:
            return await client.runs.graph(run_id)
        return await client.workflows.graph(*split_name(workflow or ""))


async def list_workflows(where: Target, *, limit: int, as_json: bool) -> None:
    """Print the stored workflows."""
    async with connect(where, LOOKING) as client:
        page = await client.workflows.list(limit=limit)
    if as_json:
        print_json([found.model_dump(mode="json") for found in page.data])
        return
    table = new_table("workflow", "version", "created", "description")
    for found in page.data:
        words = Text(" ".join(printable(found.description).split()), overflow="ellipsis")
        table.add_row(found.name, found.version, f"{found.created_at:%Y-%m-%d %H:%M:%S}", words)
    empty = "No workflows are stored: `agent-server workflow push FILE` stores one."
    wide_console().print(table if page.data else empty)


async def push(where: Target, files: Sequence[Path], *, agents: str | None, as_json: bool) -> None:
    """Store each file, and say which version it is now."""
    stored: list[JsonObject] = []
    async with connect(where, {**LOOKING, **({"agents": agents} if agents else {})}) as client:
        for path in files:
            text = running.read_text(path)
            name = running.read_workflow(path).data.get("name")
            if not isinstance(name, str) or not name:
                raise InvalidRequest(f"The workflow file {str(path)!r} has no 'name'.")
            found = await client.workflows.put(name, text)
            stored.append(found.model_dump(mode="json"))
            if not as_json:
                sys.stdout.write(f"{found.name}@{found.version}\n")
    if as_json:
        print_json(stored)


async def delete(where: Target, name: str) -> None:
    """Delete a stored workflow and say so."""
    async with connect(where, LOOKING) as client:
        await client.workflows.delete(name)
    sys.stdout.write(f"{name}: deleted\n")
