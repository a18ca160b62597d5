"""A real server in this process, with tools that the tests of workflows call."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from agent_server.client import AgentServerClient
from agent_server.domain.runs import Run
from agent_server.server import create_app
from tests.api.harness import listening, settings

AGENTS = '''
from agents import Agent, function_tool

from tests.api import gates


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
def echo(value: str) -> str:
    """Say it again."""
    return value


@function_tool(failure_error_function=None)
def broken() -> str:
    """It never works."""
    raise ValueError("broken")


@function_tool
async def hold() -> str:
    """Wait for the test."""
    return await gates.current[-1].hold()


clerk = Agent(name="Clerk", instructions="You help.", tools=[add])
'''


@asynccontextmanager
async def serving(
    folder: Path, *, agents: str = AGENTS, **changes: Any
) -> AsyncIterator[tuple[AgentServerClient, FastAPI]]:
    """A client of a server in ``folder``, and its application."""
    (folder / "agents.py").write_text(agents)
    chosen = {
        "data_dir": folder / "data",
        "agents": str(folder / "agents.py"),
        "model": "demo",
        "shutdown_grace_s": 0.5,
        "access_log": False,
        **changes,
    }
    app = create_app(settings(**chosen))
    async with listening(app) as port:
        async with AgentServerClient(f"http://127.0.0.1:{port}") as client:
            yield client, app


async def carried_out(client: AgentServerClient, workflow: Any, **variables: Any) -> Run:
    """The run of ``workflow`` at its end."""
    run = await client.runs.create(workflow=workflow, variables=variables or None)
    return await client.runs.wait(run.id, timeout_s=30)
