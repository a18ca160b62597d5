"""Stored workflows, seen from a client: keep, read, check and delete definitions.

Leans on the domain and on one exchange at a time. Refuses to look into a definition: the server
says what is wrong with one, with the line where it is a text.
"""

from typing import Any
from uuid import uuid4

import httpx2

from agent_server.client.http import exchange
from agent_server.client.runs import Page
from agent_server.domain.base import JsonObject
from agent_server.domain.stored_workflows import (
    DryRun,
    DryRunRequest,
    StoredWorkflow,
    WorkflowGraph,
    WorkflowReport,
    WorkflowVersion,
)

PATH = "/api/v1/workflows"
Definition = str | JsonObject
"""A definition: an object, or its text in YAML or JSON."""


class WorkflowsClient:
    """``/api/v1/workflows``. Got as ``AgentServerClient.workflows``."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def create(
        self, definition: Definition, *, idempotency_key: str | None = None
    ) -> StoredWorkflow:
        """Store a workflow under the name it has. Raises ``Conflict`` when there is one."""
        answer = await self._send(
            "POST", PATH, definition, {"Idempotency-Key": idempotency_key or uuid4().hex}
        )
        return StoredWorkflow.model_validate(answer)

    async def put(
        self, name: str, definition: Definition, *, if_match: str | None = None
    ) -> StoredWorkflow:
        """Store a workflow, or a new version of it; what equals the newest version is that one.
        Raises ``PreconditionFailed`` when the newest version's ``etag`` is not ``if_match``."""
        answer = await self._send("PUT", f"{PATH}/{name}", definition, _match(if_match))
        return StoredWorkflow.model_validate(answer)

    async def get(self, name: str, version: str | None = None) -> StoredWorkflow:
        """A version; None is the newest. Raises ``NotFound``."""
        answer = await exchange(self._http, "GET", f"{PATH}/{name}", params={"version": version})
        return StoredWorkflow.model_validate(answer)

    async def list(
        self, *, limit: int | None = None, cursor: str | None = None, q: str | None = None
    ) -> Page[WorkflowVersion]:
        """The newest version of each workflow, the youngest workflow first."""
        return await self._page(PATH, limit=limit, cursor=cursor, q=q)

    async def versions(
        self, name: str, *, limit: int | None = None, cursor: str | None = None
    ) -> Page[WorkflowVersion]:
        """The versions of one workflow, newest first."""
        return await self._page(f"{PATH}/{name}/versions", limit=limit, cursor=cursor)

    async def delete(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a workflow with all its versions; runs under way go on."""
        await exchange(self._http, "DELETE", f"{PATH}/{name}", headers=_match(if_match))

    async def validate(self, definition: Definition) -> WorkflowReport:
        """Everything that is wrong with a definition."""
        return WorkflowReport.model_validate(
            await self._send("POST", f"{PATH}/validate", definition)
        )

    async def dry_run(
        self,
        workflow: str | JsonObject,
        variables: JsonObject | None = None,
        *,
        outputs: JsonObject | None = None,
        errors: dict[str, str] | None = None,
    ) -> DryRun:
        """The way that a workflow (a stored name, or a definition) would go. ``outputs`` says what
        nodes give, ``errors`` with which code nodes fail; see ``DryRunRequest``."""
        asked = DryRunRequest(
            workflow=workflow, variables=variables, outputs=outputs or {}, errors=errors or {}
        )
        body = asked.model_dump(mode="json", exclude_unset=True)
        return DryRun.model_validate(
            await exchange(self._http, "POST", f"{PATH}/dry-run", json=body)
        )

    async def graph(self, name: str, version: str | None = None) -> WorkflowGraph:
        """A stored workflow as nodes, edges and Mermaid text."""
        params = {"version": version}
        answer = await exchange(self._http, "GET", f"{PATH}/{name}/graph", params=params)
        return WorkflowGraph.model_validate(answer)

    async def _send(
        self, method: str, path: str, definition: Definition, headers: dict[str, str] | None = None
    ) -> Any:
        if isinstance(definition, str):
            named = {"Content-Type": "application/yaml", **(headers or {})}
            return await exchange(self._http, method, path, content=definition, headers=named)
        return await exchange(self._http, method, path, json=definition, headers=headers)

    async def _page(self, path: str, **params: Any) -> Page[WorkflowVersion]:
        answer = await exchange(self._http, "GET", path, params=params)
        found = [WorkflowVersion.model_validate(row) for row in answer["data"]]
        return Page(found, answer.get("next_cursor"))


def _match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}
