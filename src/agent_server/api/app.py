"""The HTTP application: the door, the routes, the document.

Leans on FastAPI and on the parts it is given. Refuses to make a part, to start one or to know
how runs work: ``server.py`` composes, this puts doors on.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.websockets import WebSocket

from agent_server.api import problems
from agent_server.api.catalogue import CatalogueRoutes
from agent_server.api.deps import ApiDeps
from agent_server.api.door import Door, Manners
from agent_server.api.openapi import Route, mount
from agent_server.api.operations import OperationRoutes
from agent_server.api.runs import RunRoutes
from agent_server.api.workflows import WorkflowRoutes
from agent_server.domain.errors import FieldError, InvalidRequest

Socket = Callable[[WebSocket], Awaitable[None]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(
    deps: ApiDeps,
    lifespan: Lifespan | None = None,
    routes: Sequence[Route] = (),
    manners: Mapping[str, Manners] | None = None,
    sockets: Mapping[str, Socket] | None = None,
) -> FastAPI:
    """The application over ``deps``. ``routes`` are those of other doors;
    ``manners`` is how they render errors, by the first part of a path; ``sockets`` are their
    WebSockets by path.
    """
    app = FastAPI(
        title="Agent Server",
        version=deps.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(
        Door,
        gate=deps.gate,
        settings=deps.settings,
        observe=deps.observe,
        manners=manners or {},
    )
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_validation)
    mount(
        app,
        [
            *RunRoutes(deps).routes(),
            *routes,  # Routes are tried one after another: what is asked most comes first.
            *WorkflowRoutes(deps).routes(),
            *CatalogueRoutes(deps).routes(),
            *OperationRoutes(deps, app).routes(),
        ],
    )
    for path, socket in (sockets or {}).items():
        app.router.add_websocket_route(path, socket)
    return app


async def _refuse_http(request: Request, error: Exception) -> Response:
    """The framework's refusals, on their way to the door that renders them."""
    assert isinstance(error, HTTPException)
    raise problems.from_http(
        error.status_code,
        method=request.method,
        path=request.url.path,
        headers=dict(error.headers or {}),
    ) from error


async def _refuse_validation(request: Request, error: Exception) -> Response:
    """For routes of other doors that let FastAPI read their parameters."""
    assert isinstance(error, RequestValidationError)
    found = [
        FieldError(path=".".join(str(part) for part in entry["loc"]), message=entry["msg"])
        for entry in error.errors()
    ]
    raise InvalidRequest("The request does not fit.", errors=found) from error
