"""A whole server in this process on a database of the test's choice, with a model by rule."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from agent_server.client import AgentServerClient, in_process
from agent_server.inference.providers import Providers
from agent_server.server import Parts, create_app
from agent_server.settings import Settings
from tests.support.durable import Rule, RuleModel, say

AGENTS = """
from agents import Agent

from agent_server.tools import forget, recall, remember, search_documents

clerk = Agent(name="Clerk", tools=[remember, recall, forget, search_documents])
"""
Json = dict[str, Any]


@dataclass
class Home:
    """The server, its client and its model."""

    parts: Parts
    client: AgentServerClient
    http: httpx2.AsyncClient
    model: RuleModel

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **query: Any,
    ) -> Any:
        """The JSON that the server answers, with the status that was expected."""
        answer = await self.http.request(
            method, f"/api/v1{path}", json=body, params=query, headers=dict(headers or {})
        )
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def run(self, text: Any = "hi", **fields: Any) -> Json:
        """A run of the clerk, or of the ``goal`` or ``workflow`` in ``fields``, at its end."""
        if "goal" not in fields and "workflow" not in fields:
            fields = {"agent": "clerk", "input": text, **fields}
        run = await self.client.runs.create(wait_s=30, **fields)
        assert run.status.ended, run
        return run.model_dump(mode="json")

    async def events(self, run_id: str, *types: str) -> list[Json]:
        found = await self.client.runs.stored_events(run_id)
        said = [event.model_dump(mode="json") for event in found]
        return [event for event in said if not types or event["type"] in types]


def answer_ok(instructions: str, items: Sequence[Any]) -> Sequence[Any]:
    return [say("ok")]


@asynccontextmanager
async def home(
    url: str, folder: Path, rule: Rule = answer_ok, agents: str = AGENTS, **knobs: Any
) -> AsyncIterator[Home]:
    """A server over ``url``; its agents' file is written into ``folder``."""
    (folder / "agents.py").write_text(agents)
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]  # an initialiser's option
        **{
            "database_url": url,
            "data_dir": folder / "data",
            "agents": str(folder / "agents.py"),
            "model": "rule",
            "model_retries": 0,
            "shutdown_grace_s": 0.5,
            "access_log": False,
            **knobs,
        },
    )
    model = RuleModel(rule)
    providers = Providers(settings)
    providers.register("rule", model)
    app = create_app(settings, providers=providers)
    async with in_process(app) as transport:
        async with AgentServerClient("http://localhost", transport=transport) as client:
            yield Home(app.state.parts, client, client._http, model)
