"""``agent-server runs …`` and ``agent-server agents``: look at what is there.

Leans on the client; without a server, on an embedded one that carries out nothing. Refuses to
format for machines but by ``--json``, which is the API's own answer.
"""

import json

from rich.text import Text

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import print_error, printable
from agent_server.cli.follow import print_answer
from agent_server.cli.output import new_table, print_json, wide_console
from agent_server.cli.tree import render, standing, usage_line
from agent_server.cli.view import view_of
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.runs import Run

LOOKING = {"role": "api"}
"""An embedded server that only answers: it takes up no run."""
STYLES = {"succeeded": "green", "running": "cyan", "waiting": "yellow", "queued": "dim"}


async def list_runs(
    where: Target, *, limit: int, as_json: bool, filters: dict[str, str | None]
) -> None:
    """Print the newest runs."""
    async with connect(where, LOOKING) as client:
        page = await client.runs.list(limit=limit, **filters)
    if as_json:
        print_json([run.model_dump(mode="json") for run in page.data])
        return
    table = new_table("run", "status", "what", "created", "used")
    for run in page.data:
        table.add_row(
            run.id,
            Text(standing(run.status, run.waiting_for), STYLES.get(run.status.value, "red")),
            Text(" ".join(printable(title(run)).split()), overflow="ellipsis", no_wrap=True),
            f"{run.created_at:%Y-%m-%d %H:%M:%S}",
            usage_line(run.usage),
        )
    wide_console().print(table if page.data else "No runs.")


async def show_run(where: Target, run_id: str, *, as_json: bool) -> None:
    """Print one run: its tree as it is, and its answer."""
    async with connect(where, LOOKING) as client:
        run = await client.runs.get(run_id)
        events = [] if as_json else await client.runs.stored_events(run_id)
    if as_json:
        print_json(run.model_dump(mode="json"))
        return
    console = wide_console()
    console.print(render(view_of(events), width=console.width))
    if run.status.ended:
        print_answer(run, plain=False)


async def list_agents(where: Target, *, agents: str | None, as_json: bool) -> None:
    """Print the agents that are served, and what could not be loaded."""
    overrides = {**LOOKING, "agents": agents} if agents else LOOKING
    async with connect(where, overrides) as client:
        served, errors = await client.agents_and_errors()
    if as_json:
        print_json([agent.model_dump(mode="json") for agent in served])
        return
    table = new_table("agent", "model", "tools", "hands off to", "from")
    for agent in served:
        table.add_row(
            agent.name,
            agent.model or "",
            ", ".join((*agent.tools, *(f"mcp:{name}" for name in agent.mcp_servers))),
            ", ".join(agent.handoffs),
            agent.source,
        )
    wide_console().print(
        table if served else "No agents are served: write agents.py, or set AGENT_SERVER_AGENTS."
    )
    for error in errors:
        line = f", line {error.line}" if error.line else ""
        kept = " Its last good version is served." if error.serving_last_good else ""
        print_error(
            ErrorInfo(code="agents_file", message=f"{error.source}{line}: {error.message}{kept}")
        )


def title(run: Run) -> str:
    """The goal, the agent with its input, or the workflow of a run."""
    if run.kind == "goal":
        return run.goal or ""
    if run.kind == "agent":
        said = run.input if isinstance(run.input, str) else json.dumps(run.input)
        return f"{run.agent}: {said}"
    return f"workflow {run.workflow or ''}".strip()
