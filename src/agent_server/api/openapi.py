"""Routes with their description, and the OpenAPI document made of them.

Leans on FastAPI for routing and for the document's frame. Handlers take the bare request and
answer bytes, because that is what a call costs least; so what they read and answer is said here,
once, and refused or written there. Refuses to know what a route does.
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from agent_server.api.inputs import NoQuery
from agent_server.api.problems import MEDIA_TYPE, Problem
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import RunError, error_codes

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
NOTHING = ""
"""The media type of an answer without a body."""
REF = "#/components/schemas/{model}"

STREAM_EXAMPLE = (
    "id: 1\nevent: run.created\n"
    'data: {"seq":1,"v":1,"type":"run.created","kind":"goal","name":"…"}\n\n'
    'event: message.delta\ndata: {"type":"message.delta","step":"1/model/1","text":"Hel"}\n\n'
)
STREAM_TEXT = (
    "Server-Sent Events: `event` is the event's type, `data` its JSON, `id` its sequence number "
    "in the run. `message.delta` is transient and has no `id`. A comment keeps a quiet stream "
    "open. `stream.lagged` tells a reader that was too slow, `server.draining` that the server "
    "goes down: resume in both cases with `Last-Event-ID`."
)
DESCRIPTION = (
    "Durable runs of agents: give a goal, an agent's input or a workflow, and follow it as "
    "events. Every error is `application/problem+json` (RFC 9457)."
)
TAGS = [
    {"name": "runs", "description": "Goals, agents and workflows, carried out durably."},
    {"name": "workflows", "description": "Graphs that are kept, in versions that never change."},
    {"name": "catalogue", "description": "What this server can do: agents, tools, models."},
    {"name": "sessions", "description": "Conversations that runs share, word for word."},
    {"name": "memories", "description": "What is known: written, found, edited, forgotten."},
    {"name": "operations", "description": "Probes, metrics and the documentation."},
]


class DirectRoute(APIRoute):
    """A route whose handler is called as it is: no dependencies are looked for."""

    def get_route_handler(self) -> Handler:
        return self.endpoint


class FixedPaths(BaseRoute):
    """Every route whose path has no parameter, found at once instead of by trying them all."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, APIRoute) and "{" not in route.path
            for method in route.methods or ()
        }

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        route = self._routes.get((scope.get("method", ""), scope["path"]))
        return (Match.NONE, {}) if route is None else route.matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await scope["route"].handle(scope, receive, send)


@dataclass(frozen=True)
class Route:
    """A path, its handler, and all that callers may know of it."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    name: str
    description: str = ""
    query: type[BaseModel] = NoQuery
    body: type[BaseModel] | None = None
    body_optional: bool = False
    body_media: str = "application/json"
    answers: Mapping[int, type[BaseModel] | str] = field(default_factory=dict)
    """Per status the model of a JSON answer, or the media type of another one."""
    stream: bool = False
    errors: tuple[int, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = False
    open: bool = False
    yaml: bool = False
    """The body may be YAML as well."""
    etag: bool = False
    """Answers carry ``ETag``."""

    def parameters(self) -> list[JsonObject]:
        found: list[JsonObject] = [
            {
                "name": part.strip("{}").partition(":")[0],
                "in": "path",
                "required": True,
                "schema": {"type": "string"},
            }
            for part in self.path.split("/")
            if part.startswith("{")
        ]
        schema = self.query.model_json_schema()
        definitions = schema.get("$defs", {})
        for name, described in schema.get("properties", {}).items():
            described = dict(described)
            described.pop("title", None)
            reference = described.pop("$ref", None)
            if reference is None and "anyOf" in described:
                options = [o for o in described.pop("anyOf") if o.get("type") != "null"]
                described.pop("default", None)
                described |= options[0]
                reference = described.pop("$ref", None)
            if reference is not None:
                described = definitions[reference.rpartition("/")[2]] | described
            text = described.pop("description", "")
            found.append({"name": name, "in": "query", "description": text, "schema": described})
        named = dict(self.headers)
        if self.idempotent:
            named["Idempotency-Key"] = (
                "Makes the call safe to repeat: the same key and body give the same answer."
            )
        found += [
            {"name": n, "in": "header", "description": text, "schema": {"type": "string"}}
            for n, text in named.items()
        ]
        return found

    def responses(self) -> dict[int | str, dict[str, Any]]:
        found: dict[int | str, dict[str, Any]] = {}
        for status, answer in self.answers.items():
            content: JsonObject
            if answer == NOTHING:
                content = {}
            elif isinstance(answer, str):
                content = {answer: {"schema": {"type": "string"}}}
            else:
                content = {"application/json": {"schema": _reference(answer)}}
            if self.stream and status == 200:
                content["text/event-stream"] = {
                    "schema": {"type": "string", "description": STREAM_TEXT},
                    "example": STREAM_EXAMPLE,
                }
            found[status] = {"description": MEANINGS[status], "content": content}
            named = {"Location": "What was made."} if status in (201, 202) else {}
            if self.etag:
                named["ETag"] = "Send it back as `If-Match` with a change."
            if named:
                found[status]["headers"] = {
                    name: {"description": text, "schema": {"type": "string"}}
                    for name, text in named.items()
                }
        always = () if self.open else (401, 403)
        for status in sorted({*self.errors, *always, 500}):
            found[status] = {
                "description": MEANINGS[status],
                "content": {MEDIA_TYPE: {"schema": _reference(Problem)}},
            }
        return found

    def extra(self) -> JsonObject:
        extra: JsonObject = {"parameters": self.parameters()}
        if self.body is not None:
            example = EXAMPLES.get(self.body.__name__)
            content: JsonObject = {"schema": _reference(self.body)}
            if example:
                content["examples"] = example
            extra["requestBody"] = {
                "required": not self.body_optional,
                "content": {self.body_media: content}
                | ({"application/yaml": {"schema": content["schema"]}} if self.yaml else {}),
            }
        if self.open:
            extra["security"] = []
        return extra


def _meanings() -> dict[int, str]:
    found = {
        200: "The answer.",
        201: "Made.",
        202: "Accepted; it goes on in the background.",
        204: "Done; there is nothing to say.",
        303: "Elsewhere.",
        304: "It is what `If-None-Match` names.",
    }
    for error in error_codes().values():
        if not issubclass(error, RunError):
            found.setdefault(error.status, error.title + ".")
    return found | {422: "The request does not fit.", 500: "The server met an unexpected error."}


MEANINGS = _meanings()

EXAMPLES: dict[str, JsonObject] = {
    "RunRequest": {
        "goal": {
            "summary": "A goal: the planner makes the plan",
            "value": {"goal": "Compare three ways to store chat history and recommend one"},
        },
        "agent": {
            "summary": "One agent",
            "value": {"agent": "assistant", "input": "What is 12 * 12?", "stream": True},
        },
        "workflow": {
            "summary": "A workflow inline",
            "value": {
                "workflow": {
                    "name": "one-step",
                    "nodes": [{"id": "a", "type": "set", "variables": {"x": 1}}],
                },
                "variables": {},
            },
        },
    },
}


def _reference(model: type[BaseModel]) -> JsonObject:
    return {"$ref": REF.format(model=model.__name__)}


class _Whole(PathConvertor):
    """What stands for ``:path``: also a name with a line break, or who has it could not be erased."""

    regex = "(?s:.*)"


register_url_convertor("path", _Whole())


def mount(app: FastAPI, routes: list[Route]) -> None:
    """Add ``routes`` to ``app``, and the document that describes them as ``app.openapi``."""
    for route in routes:
        app.router.add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            summary=route.summary,
            description=route.description or None,
            operation_id=route.name,
            name=route.name,
            tags=[route.tag],
            responses=route.responses(),
            status_code=next(iter(route.answers), 200),
            response_model=None,
            response_class=Response,
            openapi_extra=route.extra(),
            route_class_override=DirectRoute,
        )
    app.router.routes.insert(0, FixedPaths(app.router.routes))
    models: set[type[BaseModel]] = {Problem}
    for route in routes:
        models.update(a for a in route.answers.values() if not isinstance(a, str))
        if route.body is not None:
            models.add(route.body)
    inputs = {route.body for route in routes}

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=DESCRIPTION,
                routes=app.routes,
                tags=TAGS,
            )
            _, schemas = models_json_schema(
                [
                    (model, "validation" if model in inputs else "serialization")
                    for model in sorted(models, key=lambda m: m.__name__)
                ],
                ref_template=REF,
            )
            components = made.setdefault("components", {})
            components["schemas"] = schemas["$defs"]
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            made["security"] = [{"bearer": []}, {"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to replace it
