"""The document: every route is described, with what it reads, answers and refuses."""

import json
from typing import Any

import pytest
from fastapi.routing import APIRoute

from agent_server.domain.runs import RunRequest
from tests.api.harness import Server, settings

METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return Server(settings()).app.openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def test_every_route_is_in_the_document(document: dict[str, Any]) -> None:
    routes = [r for r in Server(settings()).app.routes if isinstance(r, APIRoute)]
    assert {(r.path, m.lower()) for r in routes for m in r.methods} == {
        (path, method) for path, method, _ in operations(document)
    }


def test_every_route_says_what_it_does_and_how_it_fails(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        assert operation["summary"]
        assert operation["tags"]
        refused = {s: r for s, r in operation["responses"].items() if s >= "400"}
        assert "500" in refused
        if path not in ("/livez", "/readyz"):
            assert {"401", "403"} <= set(refused)
        for answer in refused.values():
            (content,) = answer["content"].items()
            reference = {"$ref": "#/components/schemas/Problem"}
            assert content == ("application/problem+json", {"schema": reference})
        named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert named == {part.strip("{}") for part in path.split("/") if part.startswith("{")}
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                target: Any = document
                for part in value["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(document)


def test_the_body_of_a_run_is_described_with_examples_that_fit(document: dict[str, Any]) -> None:
    body = document["paths"]["/api/v1/runs"]["post"]["requestBody"]
    content = body["content"]["application/json"]
    assert body["required"]
    assert content["schema"] == {"$ref": "#/components/schemas/RunRequest"}
    assert document["components"]["schemas"]["RunRequest"]["additionalProperties"] is False
    for example in content["examples"].values():
        RunRequest.model_validate(example["value"])


def test_event_streams_are_described(document: dict[str, Any]) -> None:
    for path, method in (("/api/v1/runs/{run_id}/events", "get"), ("/api/v1/runs", "post")):
        answer = document["paths"][path][method]["responses"]["200"]
        stream = answer["content"]["text/event-stream"]
        assert "Last-Event-ID" in stream["schema"]["description"]
        assert stream["example"].startswith("id: 1\nevent: run.created\n")


def test_query_parameters_carry_their_limits(document: dict[str, Any]) -> None:
    listed = document["paths"]["/api/v1/runs"]["get"]["parameters"]
    limit = next(p for p in listed if p["name"] == "limit")
    assert (limit["schema"]["maximum"], limit["schema"]["default"]) == (200, 50)
    status = next(p for p in listed if p["name"] == "status")
    assert "budget_exceeded" in status["schema"]["enum"]


async def test_the_document_is_served(document: dict[str, Any]) -> None:
    answer = await Server(settings()).call("GET", "/openapi.json")
    assert answer.status == 200
    assert json.loads(answer.body) == document
    assert document["openapi"].startswith("3.1")
