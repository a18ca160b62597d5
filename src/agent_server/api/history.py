"""The routes of what is done with runs that have been: retry, fork, compare, export.

Leans on ``HistoryPort`` for all that happens. Refuses to know what is shared and why.
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump
from agent_server.api.door import CALL, Call
from agent_server.api.openapi import Route
from agent_server.api.runs import PREFIX, run_target
from agent_server.domain.base import Frozen
from agent_server.domain.history import (
    Comparison,
    ForkedRun,
    ForkRequest,
    Redact,
    RetryRequest,
    RunExport,
)
from agent_server.domain.ids import Tenant
from agent_server.execution.exporting import MaskSecrets, redacted
from agent_server.execution.runs import Idempotency
from agent_server.settings import Settings

MAKING = (400, 404, 408, 409, 413, 415, 422)


class HistoryPort(Protocol):
    """What ``execution.history.History`` does. Unknown ids raise ``NotFound``."""

    async def retry(
        self, tenant: Tenant, run_id: str, asked: RetryRequest, *, principal: str
    ) -> tuple[ForkedRun, bool]: ...

    async def fork(
        self,
        tenant: Tenant,
        run_id: str,
        asked: ForkRequest,
        *,
        principal: str,
        idempotency: Idempotency | None = None,
    ) -> tuple[ForkedRun, bool]: ...

    async def compare(self, tenant: Tenant, run_id: str, other_id: str) -> Comparison: ...

    async def export(self, tenant: Tenant, run_id: str) -> RunExport: ...


class CompareQuery(Frozen):
    with_: str = Field(alias="with", pattern="^run_[0-9a-f]{32}$", description="The other run.")


class ExportQuery(Frozen):
    redact: Redact = Field(
        default="none",
        description="`secrets`: without what looks like a key or a token; `content`: without any "
        "word that was said, which cannot be replayed.",
    )


class HistoryRoutes:
    """The handlers, bound to the part they call."""

    def __init__(self, history: HistoryPort, settings: Settings, mask_secrets: MaskSecrets) -> None:
        self._history = history
        self._max_depth = settings.max_json_depth
        self._mask_secrets = mask_secrets

    def routes(self) -> Sequence[Route]:
        def route(method: str, path: str, handler: Any, **described: Any) -> Route:
            return Route(method, PREFIX + "/{run_id}" + path, handler, tag="runs", **described)

        return (
            route(
                "POST",
                "/retry",
                self.retry,
                summary="Retry a run from where it failed",
                description="Makes a new run that shares what finished. A run is retried once: "
                "asked again, the same new run is answered, with `Idempotency-Replayed`.",
                name="retry_run",
                body=RetryRequest,
                body_optional=True,
                answers={202: ForkedRun},
                errors=MAKING,
            ),
            route(
                "POST",
                "/fork",
                self.fork,
                summary="Fork a run",
                description="Makes a new run that shares what came before `from` and does the "
                "rest anew, perhaps with other input, instructions, model or approach. "
                "`will_repeat` lists the side effects that may happen again.",
                name="fork_run",
                body=ForkRequest,
                body_optional=True,
                answers={202: ForkedRun},
                errors=MAKING,
                idempotent=True,
            ),
            route(
                "GET",
                "/compare",
                self.compare,
                summary="Compare two runs",
                description="Plan, steps, output, cost and time, side by side.",
                name="compare_runs",
                query=CompareQuery,
                answers={200: Comparison},
                errors=(404, 422),
            ),
            route(
                "GET",
                "/export",
                self.export,
                summary="Export a run",
                description="The whole run as one JSON document, to be kept, sent or replayed.",
                name="export_run",
                query=ExportQuery,
                answers={200: RunExport},
                errors=(404, 422),
            ),
        )

    async def retry(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body() or b"{}"
        asked = inputs.parse(raw, RetryRequest, max_depth=self._max_depth)
        call: Call = request.scope[CALL]
        run, replayed = await self._history.retry(
            *run_target(request), asked, principal=call.principal.name
        )
        return _made(run, replayed)

    async def fork(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body() or b"{}"
        asked = inputs.parse(raw, ForkRequest, max_depth=self._max_depth)
        inputs.refuse_nul(asked, raw)
        call: Call = request.scope[CALL]
        target = run_target(request)
        path = f"{PREFIX}/{target.run_id}/fork"
        run, replayed = await self._history.fork(
            *target,
            asked,
            principal=call.principal.name,
            idempotency=inputs.idempotency(request.headers, "POST", path, raw),
        )
        return _made(run, replayed)

    async def compare(self, request: Request) -> Response:
        wanted = inputs.query(request, CompareQuery)
        return Json(dump(await self._history.compare(*run_target(request), wanted.with_)))

    async def export(self, request: Request) -> Response:
        wanted = inputs.query(request, ExportQuery)
        target = run_target(request)
        export = await self._history.export(*target)
        export = redacted(export, wanted.redact, self._mask_secrets)
        body = json.dumps(export.model_dump(mode="json"), separators=(",", ":"))
        name = f'attachment; filename="{target.run_id}.json"'
        return Json(body.encode(), 200, {"Content-Disposition": name})


def _made(run: ForkedRun, replayed: bool) -> Response:
    headers = {"Location": f"{PREFIX}/{run.id}"}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return Json(dump(run), 202, headers)
