"""The routes that say what this server can do.

Leans on the ``Catalog`` port. Refuses to know where agents and tools come from.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump
from agent_server.api.deps import ApiDeps
from agent_server.api.openapi import Route
from agent_server.api.ports import ApproachInfo, ModelInfo
from agent_server.domain.agents import AgentInfo, LoadError, ToolInfo
from agent_server.domain.base import Frozen
from agent_server.domain.errors import NotFound


class AgentPage(Frozen):
    data: tuple[AgentInfo, ...]
    next_cursor: str | None = None
    load_errors: tuple[LoadError, ...] = ()
    """Files whose agents are not served, or not in their newest version."""


class ToolPage(Frozen):
    data: tuple[ToolInfo, ...]
    next_cursor: str | None = None


class ApproachPage(Frozen):
    data: tuple[ApproachInfo, ...]
    next_cursor: str | None = None


class ModelPage(Frozen):
    data: tuple[ModelInfo, ...]
    next_cursor: str | None = None


class ServerInfo(Frozen):
    """What answers here."""

    name: str = "agent-server"
    version: str
    env: str
    role: str
    model: str
    """The model of every agent that names none."""
    demo: bool
    """True when that is the built-in demo model, which is no language model."""
    features: tuple[str, ...]
    draining: bool
    load_errors: tuple[LoadError, ...] = ()


class CatalogueRoutes:
    """The handlers, bound to the catalogue."""

    def __init__(self, deps: ApiDeps) -> None:
        self._deps = deps
        self._catalog = deps.catalog

    def routes(self) -> Sequence[Route]:
        def listing(path: str, handler: object, what: str, page: type[BaseModel]) -> Route:
            return Route(
                "GET",
                f"/api/v1/{path}",
                handler,  # type: ignore[arg-type]  # every handler here has this shape
                summary=f"List {what}",
                tag="catalogue",
                name=f"list_{path}",
                answers={200: page},
                errors=(422,),
            )

        return (
            listing("agents", self.agents, "agents", AgentPage),
            Route(
                "GET",
                "/api/v1/agents/{name}",
                self.agent,
                summary="Read an agent",
                tag="catalogue",
                name="get_agent",
                answers={200: AgentInfo},
                errors=(404, 422),
            ),
            listing("tools", self.tools, "tools", ToolPage),
            listing("approaches", self.approaches, "reasoning approaches", ApproachPage),
            listing("models", self.models, "models", ModelPage),
            Route(
                "GET",
                "/api/v1/server",
                self.server,
                summary="Read what answers here",
                tag="catalogue",
                name="get_server",
                answers={200: ServerInfo},
                errors=(422,),
            ),
        )

    async def agents(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        errors = tuple(self._catalog.load_errors())
        return Json(dump(AgentPage(data=tuple(self._catalog.agents()), load_errors=errors)))

    async def agent(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        name = request.path_params["name"]
        agents = self._catalog.agents()
        for agent in agents:
            if agent.name == name:
                return Json(dump(agent))
        _unknown_agent(name, (agent.name for agent in agents))

    async def tools(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(ToolPage(data=tuple(await self._catalog.tools()))))

    async def approaches(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(ApproachPage(data=tuple(self._catalog.approaches()))))

    async def models(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(ModelPage(data=tuple(self._catalog.models()))))

    async def server(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        settings = self._deps.settings
        info = ServerInfo(
            version=self._deps.version,
            env=settings.env,
            role=settings.role,
            model=settings.effective_model,
            demo=settings.effective_model == "demo",
            features=self._deps.features,
            draining=self._deps.streams.draining,
            load_errors=tuple(self._catalog.load_errors()),
        )
        return Json(dump(info))


def _unknown_agent(name: str, names: Iterable[str]) -> NoReturn:
    near = next(iter(difflib.get_close_matches(name, list(names), n=1)), None)
    hint = f"Did you mean {near!r}?" if near else "GET /api/v1/agents lists them."
    raise NotFound(f"There is no agent {name[:100]!r}.", hint=hint)
