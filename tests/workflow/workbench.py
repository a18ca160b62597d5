"""Workflows on the real engine: their handlers, with tools that the test can hold and count."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from agent_server.actions.handler import Actions, ActionServices
from agent_server.actions.ssrf import GuardedHttp
from agent_server.domain.approvals import Decide
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ToolError, UnknownWorkflow
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import Run
from agent_server.execution.ports import TaskContext
from agent_server.execution.runs import Runs
from agent_server.workflow.steps import MAX_NODES
from agent_server.workflow.tasks import handlers
from tests.execution.kit import control, finished, running, submit
from tests.support.until import until


class Bench:
    """A runs' door and the tools' doings. ``calls`` are the values that ``note`` was given."""

    runs: Runs

    def __init__(self, stored: dict[str, JsonObject] | None = None) -> None:
        self.calls: list[Any] = []
        self.gate = asyncio.Event()
        self.reached = asyncio.Event()
        self.failed = asyncio.Event()
        self._stored = stored or {}

    async def call_tool(
        self, ctx: TaskContext, name: str, arguments: JsonObject, *, key: str
    ) -> Any:
        if name == "fail":
            self.failed.set()
            raise ToolError(f"It failed: {arguments.get('value')}")
        if name == "hold":
            self.reached.set()
            await self.gate.wait()
        self.calls.append(arguments.get("value"))
        return arguments.get("value")

    async def agent(self, ctx: TaskContext) -> Any:
        return {"heard": ctx.payload["input"]}

    async def definition(self, tenant: Tenant, name: str, version: str | None) -> JsonObject:
        if name not in self._stored:
            raise UnknownWorkflow(f"There is no stored workflow {name!r}.")
        return {**self._stored[name], "name": name, "version": version or "1"}

    async def run(self, *nodes: JsonObject, **fields: Any) -> Run:
        """The run of these nodes at its end."""
        return await finished(self.runs, await self.submit(*nodes, **fields))

    async def submit(self, *nodes: JsonObject, **fields: Any) -> Run:
        variables = fields.pop("given", None)
        workflow = {"name": "w", "nodes": list(nodes), **fields}
        return await submit(self.runs, workflow=workflow, variables=variables)

    async def signal(self, run: Run, name: str, payload: Any) -> None:
        await control(self.runs).signal(DEFAULT_TENANT, run.id, name, payload, by="test")

    async def decide(self, run: Run, decision: Any, reason: str) -> None:
        """Decide about the one approval that the run waits for."""
        door = control(self.runs)
        page = await door.approvals(DEFAULT_TENANT, status="pending", run_id=run.id, limit=2)
        (asked,) = page.data
        decide = Decide(decision=decision, reason=reason)
        await door.decide(DEFAULT_TENANT, asked.id, decide, by="test")

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when it holds, soon."""
        await until(holds)

    async def codes(self, run: Run) -> list[str]:
        """The codes of the errors with which the run's tasks and the run itself failed."""
        events = await self.runs.events(DEFAULT_TENANT, run.id, 0, 10_000)
        told = [json.loads(event.data) for event in events]
        return [event["error"]["code"] for event in told if "error" in event]

    async def tasks(self, run: Run) -> dict[str, str]:
        return {t.path: t.status for t in await self.runs.tasks(DEFAULT_TENANT, run.id)}


@asynccontextmanager
async def bench(url: str, bench: Bench | None = None, **settings: Any) -> AsyncIterator[Bench]:
    made = bench or Bench()
    services = ActionServices(http=GuardedHttp(), call_tool=made.call_tool, sleep=asyncio.sleep)
    kinds = handlers(
        agent=made.agent,
        call_tool=made.call_tool,
        actions=Actions(services),
        max_parallel=20,
        max_nodes=settings.get("max_run_nodes", MAX_NODES),
        stored=made,
    )
    async with running(url, kinds, **settings) as made.runs:
        yield made


def note(id: str, value: Any = None, **fields: Any) -> JsonObject:
    """A tool that notes the value it is given: by default the node's id."""
    arguments = {"value": id if value is None else value}
    return {"id": id, "type": "tool", "tool": "note", "arguments": arguments, **fields}
