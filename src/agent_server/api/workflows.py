"""The routes of stored workflows: create, list, read, new version, validate, delete.

Leans on ``WorkflowsPort`` for all that happens. Refuses to know what a definition means: it hands
on its text, YAML or JSON, so that errors can name the line.
"""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from pydantic import Field, RootModel
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump, dump_page
from agent_server.api.deps import ApiDeps
from agent_server.api.door import CALL, YAML, Call
from agent_server.api.openapi import NOTHING, Route
from agent_server.api.runs import run_target
from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.errors import MalformedBody, NotFound
from agent_server.domain.runs import RunStatus
from agent_server.domain.stored_workflows import (
    DryRun,
    DryRunRequest,
    Saved,
    SaveMode,
    StoredWorkflow,
    WorkflowGraph,
    WorkflowReport,
    WorkflowVersion,
)
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.execution.paging import decode_cursor, encode_cursor

PREFIX = "/api/v1/workflows"
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
IF_MATCH = {"If-Match": "Only when the newest version has this `ETag`; else 412."}
CHANGING = (400, 408, 409, 412, 413, 415, 422)


class WorkflowPage(Frozen):
    data: tuple[WorkflowVersion, ...]
    next_cursor: str | None = None


class WorkflowsQuery(inputs.ListQuery):
    q: str | None = Field(default=None, max_length=100, description="Only names with this text.")


class VersionQuery(Frozen):
    version: str | None = Field(
        default=None, max_length=64, description="This version instead of the newest."
    )


class _Anything(RootModel[JsonObject]):
    """Any JSON object."""


class WorkflowRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: ApiDeps) -> None:
        self._workflows = deps.workflows
        self._runs = deps.runs
        self._max_depth = deps.settings.max_json_depth

    def routes(self) -> Sequence[Route]:
        def route(method: str, path: str, handler: Any, **described: Any) -> Route:
            return Route(method, PREFIX + path, handler, tag="workflows", **described)

        definition: JsonObject = {"body": WorkflowDefinition, "yaml": True}
        return (
            route(
                "POST",
                "",
                self.create,
                summary="Store a workflow",
                description="Under the name that the definition has. 409 when there is one of "
                "that name.",
                name="create_workflow",
                answers={201: StoredWorkflow},
                errors=CHANGING,
                idempotent=True,
                etag=True,
                **definition,
            ),
            route(
                "GET",
                "",
                self.list,
                summary="List workflows",
                description="The newest version of each, the youngest workflow first.",
                name="list_workflows",
                query=WorkflowsQuery,
                answers={200: WorkflowPage},
                errors=(422,),
            ),
            route(
                "POST",
                "/validate",
                self.validate,
                summary="Say what is wrong with a definition",
                description="Every error at once, with its place, its line and a suggestion. "
                "Nothing is stored.",
                name="validate_workflow",
                answers={200: WorkflowReport},
                errors=(400, 408, 413, 415, 422),
                **definition,
            ),
            route(
                "POST",
                "/dry-run",
                self.dry_run,
                summary="Which way would a workflow go?",
                description="For the given inputs, with outputs that are given or made up. "
                "Nothing is called and nothing is stored.",
                name="dry_run_workflow",
                body=DryRunRequest,
                answers={200: DryRun},
                errors=(400, 408, 413, 415, 422),
            ),
            route(
                "GET",
                "/{name}",
                self.read,
                summary="Read a workflow",
                name="get_workflow",
                query=VersionQuery,
                answers={200: StoredWorkflow, 304: NOTHING},
                errors=(404, 422),
                headers={"If-None-Match": "Answers 304 when this is the `ETag`."},
                etag=True,
            ),
            route(
                "PUT",
                "/{name}",
                self.put,
                summary="Store a workflow or a new version of it",
                description="201 when a version was made; 200 when the newest one is the same.",
                name="put_workflow",
                answers={200: StoredWorkflow, 201: StoredWorkflow},
                errors=CHANGING,
                headers=IF_MATCH | {"If-None-Match": "`*`: only when there is none of the name."},
                etag=True,
                **definition,
            ),
            route(
                "DELETE",
                "/{name}",
                self.delete,
                summary="Delete a workflow",
                description="With all its versions. Runs under way go on. A workflow that is "
                "stored under the same name later goes on counting its versions.",
                name="delete_workflow",
                answers={204: NOTHING},
                errors=(404, 412, 422),
                headers=IF_MATCH,
            ),
            route(
                "GET",
                "/{name}/versions",
                self.versions,
                summary="List a workflow's versions",
                description="The newest first.",
                name="list_workflow_versions",
                query=inputs.ListQuery,
                answers={200: WorkflowPage},
                errors=(404, 422),
            ),
            route(
                "GET",
                "/{name}/graph",
                self.graph,
                summary="See a workflow as a graph",
                description="Nodes, edges, and the same as Mermaid text.",
                name="get_workflow_graph",
                query=VersionQuery,
                answers={200: WorkflowGraph},
                errors=(404, 422),
            ),
            Route(
                "GET",
                "/api/v1/runs/{run_id}/graph",
                self.graph_of_run,
                summary="See a run as a graph",
                description="The workflow or the plan of a run, with how far each node is.",
                tag="runs",
                name="get_run_graph",
                answers={200: WorkflowGraph},
                errors=(404, 422),
            ),
            route(
                "POST",
                "/{name}/versions",
                self.add,
                summary="Store a new version",
                description="404 when there is no workflow of that name. 200 when the newest "
                "version is the same.",
                name="add_workflow_version",
                answers={200: StoredWorkflow, 201: StoredWorkflow},
                errors=(404, *CHANGING),
                headers=IF_MATCH,
                idempotent=True,
                etag=True,
                **definition,
            ),
        )

    async def create(self, request: Request) -> Response:
        return await self._save(request, "create")

    async def put(self, request: Request) -> Response:
        return await self._save(request, "put", _name(request))

    async def add(self, request: Request) -> Response:
        return await self._save(request, "add", _name(request))

    async def _save(self, request: Request, mode: SaveMode, name: str | None = None) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        text = self._text(request, raw)
        call: Call = request.scope[CALL]
        idempotency = (
            None
            if mode == "put"
            else inputs.idempotency_of_text(request.headers, "POST", request.url.path, text)
        )
        saved: Saved = await self._workflows.save(
            call.principal.tenant,
            call.principal.name,
            text,
            mode,
            name=name,
            if_match=inputs.entity_tags(request, "if-match"),
            if_none_match=inputs.entity_tags(request, "if-none-match"),
            idempotency=idempotency,
        )
        workflow = saved.workflow
        headers = {"ETag": workflow.etag, "Location": f"{PREFIX}/{workflow.name}"}
        if saved.replayed:
            headers["Idempotency-Replayed"] = "true"
        return Json(dump(workflow), 201 if saved.made else 200, headers)

    async def list(self, request: Request) -> Response:
        wanted = inputs.query(request, WorkflowsQuery)
        before = None if wanted.cursor is None else decode_cursor(wanted.cursor)
        found, more = await self._workflows.list(
            _tenant(request), q=wanted.q, limit=wanted.limit, before=before
        )
        return Json(dump_page(map(dump, found), None if more is None else encode_cursor(*more)))

    async def read(self, request: Request) -> Response:
        wanted = inputs.query(request, VersionQuery)
        workflow = await self._workflows.get(_tenant(request), _name(request), wanted.version)
        etag = workflow.etag
        known = inputs.entity_tags(request, "if-none-match") or ()
        if etag in known or "*" in known:
            return Response(status_code=304, headers={"ETag": etag})
        return Json(dump(workflow), 200, {"ETag": etag})

    async def versions(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.ListQuery)
        below = None if wanted.cursor is None else inputs.decode_cursor(wanted.cursor)
        found, more = await self._workflows.versions(
            _tenant(request), _name(request), limit=wanted.limit, below=below
        )
        cursor = None if more is None else inputs.encode_cursor(more)
        return Json(dump_page(map(dump, found), cursor))

    async def delete(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        await self._workflows.delete(
            _tenant(request), _name(request), if_match=inputs.entity_tags(request, "if-match")
        )
        return Response(status_code=204)

    async def validate(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        text = self._text(request, await request.body())
        return Json(dump(await self._workflows.validate(_tenant(request), text)))

    async def dry_run(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        asked = inputs.parse(raw, DryRunRequest, max_depth=self._max_depth)
        return Json(dump(await self._workflows.dry_run(_tenant(request), asked)))

    async def graph(self, request: Request) -> Response:
        wanted = inputs.query(request, VersionQuery)
        name = _name(request)
        return Json(dump(await self._workflows.graph(_tenant(request), name, wanted.version)))

    async def graph_of_run(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        target = run_target(request)
        run = await self._runs.get(*target)
        if run.kind == "goal":
            return Json(dump(self._workflows.graph_of_plan(await self._runs.plan(*target))))
        asked = await self._runs.request(*target)
        if not isinstance(asked.workflow, dict):
            raise NotFound(
                f"The run {run.id!r} has no graph.",
                hint="Only a run of a goal or a workflow has one.",
            )
        tasks = await self._runs.tasks(*target)
        succeeded = run.status is RunStatus.SUCCEEDED
        graph = self._workflows.graph_of_run(asked.workflow, tasks, succeeded=succeeded)
        return Json(dump(graph))

    def _text(self, request: Request, raw: bytes) -> str:
        """The definition's text. Raises ``MalformedBody`` for JSON that is none."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media.encode("latin-1") not in YAML:
            inputs.parse(raw, _Anything, max_depth=self._max_depth)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MalformedBody("The body is not UTF-8.", hint="Send UTF-8.") from error


def _tenant(request: Request) -> Any:
    call: Call = request.scope[CALL]
    return call.principal.tenant


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    if not NAME.fullmatch(name):
        raise NotFound(
            f"There is no stored workflow {name[:100]!r}.",
            hint="A name is made of letters, digits, '.', '_' and '-'.",
        )
    return name
