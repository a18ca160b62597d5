"""``/v1/models``: agents, stored workflows and goals, as models.

Leans on the catalogue and the library of workflows. Refuses to know the models that agents use.
"""

from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.openapi import Route
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError, NotFound
from agent_server.protocols.openai import names
from agent_server.protocols.openai.deps import OpenAIDeps, caller
from agent_server.protocols.openai.lists import answer, route

PATH = "/v1/models"
MAX_WORKFLOWS = 1_000


class ModelRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps

    def routes(self) -> Sequence[Route]:
        return (
            route(
                "GET", PATH, self.list, "List agents, workflows and goals as models", "list_models"
            ),
            route("GET", PATH + "/{model:path}", self.read, "Read one of them", "get_model"),
        )

    async def list(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        found = ["goal", *(f"agent/{agent.name}" for agent in self._deps.catalog.agents())]
        tenant = caller(request).tenant
        before = None
        while len(found) < MAX_WORKFLOWS:
            rows, before = await self._deps.workflows.list(
                tenant, q=None, limit=inputs.MAX_LIMIT, before=before
            )
            found += [f"workflow/{row.name}" for row in rows]
            if before is None:
                break
        if self._deps.settings.openai_approaches:
            by = [one.name for one in self._deps.catalog.approaches()]
            found += [f"{m}:{a}" for m in found if not m.startswith("workflow/") for a in by]
        if self._deps.embedder is not None:
            found.append(self._deps.embedder.model)
        return answer({"object": "list", "data": [_model(name) for name in found]})

    async def read(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        model = request.path_params["model"]
        if self._deps.embedder is not None and model == self._deps.embedder.model:
            return answer(_model(model))
        target = names.target(model)
        if target.approach is not None:
            known = [one.name for one in self._deps.catalog.approaches()]
            if target.approach not in (*known, "auto"):
                raise _missing(model)
        if target.kind == "agent":
            if all(agent.name != target.name for agent in self._deps.catalog.agents()):
                raise _missing(model)
        elif target.kind == "workflow":
            try:
                await self._deps.workflows.get(caller(request).tenant, target.name)
            except NotFound as error:
                raise _missing(model) from error
        return answer(_model(model))


def _missing(model: str) -> AgentServerError:
    return names.unknown_model(model)


def _model(name: str) -> JsonObject:
    return {"id": name, "object": "model", "created": 0, "owned_by": "agent-server"}
