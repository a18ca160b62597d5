"""The routes for whoever runs the server: probes, metrics, documentation, the front page.

Leans on the checks it is given. Refuses to tell a stranger more than up or down: what failed is
in the log.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

import anyio
import structlog
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump
from agent_server.api.deps import ApiDeps
from agent_server.api.door import CALL, Call
from agent_server.api.openapi import Route
from agent_server.api.ports import Check
from agent_server.api.problems import errors_page
from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.errors import FieldError, Forbidden, Unavailable

INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)

log = structlog.get_logger("agent_server.http")


class Probe(Frozen):
    status: str = "ok"


class FrontPage(Frozen):
    name: str = "agent-server"
    version: str
    api: str = "/api/v1"
    docs: str = "/docs"
    openapi: str = "/openapi.json"


class OpenApiDocument(Frozen):
    """An OpenAPI 3.1 document."""

    model_config = {"extra": "allow"}


class OperationRoutes:
    """The handlers, bound to the checks, the metrics and the document."""

    def __init__(self, deps: ApiDeps, app: FastAPI) -> None:
        self._deps = deps
        self._app = app
        self._docs = _page(files("agent_server.api").joinpath("docs.html").read_text("utf-8"))
        self._errors = _page(errors_page())
        self._document = b""

    def routes(self) -> Sequence[Route]:
        return (
            Route(
                "GET",
                "/livez",
                self.livez,
                summary="Is the process up?",
                description="Asks nothing, not even the database.",
                tag="operations",
                name="livez",
                answers={200: Probe},
                errors=(422,),
                open=True,
            ),
            Route(
                "GET",
                "/readyz",
                self.readyz,
                summary="Can it take work?",
                description="503 while the database does not answer, the schema is not the one "
                "this version needs, or the server drains.",
                tag="operations",
                name="readyz",
                answers={200: Probe},
                errors=(422, 503),
                open=True,
            ),
            Route(
                "GET",
                "/metrics",
                self.metrics,
                summary="Metrics for Prometheus",
                description="Of all tenants together: not for their keys.",
                tag="operations",
                name="metrics",
                answers={200: "text/plain"},
                errors=(422,),
            ),
            Route(
                "GET",
                "/openapi.json",
                self.openapi,
                summary="This document",
                tag="operations",
                name="openapi",
                answers={200: OpenApiDocument},
                errors=(422,),
            ),
            Route(
                "GET",
                "/docs",
                self.docs,
                summary="This document, for people",
                tag="operations",
                name="docs",
                answers={200: "text/html"},
                errors=(422,),
            ),
            Route(
                "GET",
                "/docs/errors",
                self.errors,
                summary="Every error code",
                tag="operations",
                name="errors",
                answers={200: "text/html"},
                errors=(422,),
            ),
            Route(
                "GET",
                "/",
                self.front,
                summary="Where things are",
                description="Sends a browser on to the documentation.",
                tag="operations",
                name="front",
                answers={200: FrontPage},
                errors=(422,),
            ),
        )

    async def livez(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(b'{"status":"ok"}')

    async def readyz(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        if self._deps.streams.draining:
            raise Unavailable("The server is going down.", headers={"Retry-After": "5"})
        failed = [
            FieldError(path=name, message="The check failed.")
            for name, check in self._deps.checks.items()
            if not await self._passes(name, check)
        ]
        if failed:
            raise Unavailable(
                f"The server is not ready: {', '.join(f.path for f in failed)}.",
                hint="The server's log says why.",
                errors=failed,
                headers={"Retry-After": "1"},
            )
        return Json(b'{"status":"ok"}')

    async def _passes(self, name: str, check: Check) -> bool:
        try:
            with anyio.fail_after(self._deps.settings.probe_timeout_s):
                await check()
        except Exception as error:  # whatever the reason, the answer is: not ready
            log.warning("readiness check failed", check=name, error=str(error) or repr(error))
            return False
        return True

    async def metrics(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        call: Call = request.scope[CALL]
        if not call.principal.operates:
            raise Forbidden(
                "The metrics count the work of all tenants together.",
                hint="Read them with AGENT_SERVER_API_KEY.",
            )
        body, media_type = self._deps.metrics()
        return Response(body, headers={"Content-Type": media_type})

    async def openapi(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        if not self._document:
            self._document = json.dumps(self._app.openapi(), separators=(",", ":")).encode()
        return Json(self._document)

    async def docs(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return self._docs

    async def errors(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return self._errors

    async def front(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/docs", status_code=303)
        return Json(dump(FrontPage(version=self._deps.version)))


def _page(html: str) -> HTMLResponse:
    """A page that may run and load nothing but what stands in it and this server's own answers."""
    sources: JsonObject = {"script": [], "style": []}
    for kind, text in INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        sources[kind].append(f"'sha256-{digest}'")
    policy = (
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; "
        f"script-src {' '.join(sources['script']) or repr('none')}; "
        f"style-src {' '.join(sources['style']) or repr('none')}"
    )
    return HTMLResponse(
        html,
        headers={
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )
