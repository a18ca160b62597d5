"""The client itself: one HTTP connection pool and the parts of the API on it.

Leans on the other modules of this folder. Refuses to read settings: its caller says where the
server is and with which key.
"""

from types import TracebackType
from typing import Any

import httpx2
from typing_extensions import Self

from agent_server.client.approvals import ApprovalsClient
from agent_server.client.http import exchange
from agent_server.client.memories import MemoriesClient, SessionsClient
from agent_server.client.runs import RunsClient
from agent_server.client.workflows import WorkflowsClient
from agent_server.domain.agents import AgentInfo, LoadError, ToolInfo
from agent_server.domain.base import JsonObject


class AgentServerClient:
    """An asynchronous client of one server.

        async with AgentServerClient("http://127.0.0.1:8000", api_key="…") as client:
            run = await client.runs.create(goal="Compare three ways to store chat history")
            async for event in client.runs.events(run.id):
                print(event.type)

    Every call raises the error of ``agent_server.domain.errors`` that the server answered, and
    ``Unavailable`` when none did. ``timeout_s`` bounds each request but the waiting ones.
    ``transport`` replaces the network, for a server inside this process.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx2.AsyncClient(
            base_url=base_url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=timeout_s,
            transport=transport,
        )
        self.runs = RunsClient(self._http)
        self.memories = MemoriesClient(self._http)
        self.sessions = SessionsClient(self._http)
        self.workflows = WorkflowsClient(self._http)
        self.approvals = ApprovalsClient(self._http)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def agents(self) -> list[AgentInfo]:
        """The agents that the server serves."""
        return (await self.agents_and_errors())[0]

    async def agents_and_errors(self) -> tuple[list[AgentInfo], list[LoadError]]:
        """The agents that the server serves, and what of the agents files it could not load."""
        answer = await exchange(self._http, "GET", "/api/v1/agents")
        errors = [LoadError.model_validate(e) for e in answer.get("load_errors") or []]
        return [AgentInfo.model_validate(a) for a in answer["data"]], errors

    async def agent(self, name: str) -> AgentInfo:
        """One agent by its slug. Raises ``NotFound``."""
        return AgentInfo.model_validate(await exchange(self._http, "GET", f"/api/v1/agents/{name}"))

    async def tools(self) -> list[ToolInfo]:
        """The tools that plans and workflows may use."""
        answer = await exchange(self._http, "GET", "/api/v1/tools")
        return [ToolInfo.model_validate(t) for t in answer["data"]]

    async def models(self) -> list[JsonObject]:
        """The models that the server knows of, as it lists them."""
        answer: Any = await exchange(self._http, "GET", "/api/v1/models")
        return list(answer["data"])

    async def server(self) -> JsonObject:
        """Name, version, model in use and features of the server."""
        answer: JsonObject = await exchange(self._http, "GET", "/api/v1/server")
        return answer
