"""The client, against a real ASGI application that speaks the contract."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from agent_server.client import AgentServerClient, in_process
from agent_server.domain.errors import (
    ConfigurationError,
    InvalidRequest,
    NotFound,
    Unavailable,
    UnknownAgent,
)
from agent_server.domain.events import EventBase, MessageDelta, RunCreated, RunStarted, RunSucceeded
from agent_server.domain.runs import RunStatus

RUN = {
    "id": "run_1",
    "kind": "agent",
    "status": "running",
    "agent": "clerk",
    "created_at": "2026-01-01T00:00:00Z",
}
STORED: list[EventBase] = [
    RunCreated(run_id="run_1", seq=1, kind="agent", name="clerk"),
    RunStarted(run_id="run_1", seq=2),
    RunSucceeded(run_id="run_1", seq=3, output="done"),
]


def frame(event: EventBase) -> str:
    number = f"id: {event.seq}\n" if event.seq is not None else ""
    return f"{number}event: {event.type}\ndata: {event.model_dump_json()}\n\n"  # type: ignore[attr-defined]


class Server:
    """A small server whose stream breaks off after ``cut`` stored events, each time."""

    def __init__(self, cut: int = 99, last_words: str = "") -> None:
        self.cut, self.last_words = cut, last_words
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []
        self.stopped = False
        self.app = Starlette(
            routes=[
                Route("/api/v1/runs", self.create, methods=["POST"]),
                Route("/api/v1/runs/{id}", self.get),
                Route("/api/v1/runs/{id}/events", self.events),
                Route("/api/v1/agents", self.agents),
                Route("/api/v1/tools", lambda _: PlainTextResponse("<html>", 502)),
            ],
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[dict[str, Any]]:
        yield {"greeting": "hello"}
        self.stopped = True

    async def create(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("idempotency-key"))
        if body.get("agent") != "clerk":
            problem = {
                "status": 422,
                "code": "unknown_agent",
                "detail": f"No agent is named {body.get('agent')!r}.",
                "hint": "Served are: 'clerk'.",
                "errors": [{"path": "/agent", "message": "unknown"}],
            }
            return JSONResponse(problem, 422, media_type="application/problem+json")
        return JSONResponse(RUN, 202)

    async def get(self, request: Request) -> Response:
        if request.path_params["id"] != "run_1":
            problem = {"status": 404, "code": "not_found", "detail": "No such run."}
            return JSONResponse(problem, 404)
        ended = bool(request.query_params.get("wait"))
        return JSONResponse({**RUN, "status": "succeeded" if ended else "running"})

    async def agents(self, request: Request) -> Response:
        return JSONResponse({"data": [{"name": "clerk", "title": request.state.greeting}]})

    async def events(self, request: Request) -> Response:
        after = int(request.headers["last-event-id"])
        self.asked.append(str(after))

        async def body() -> AsyncIterator[str]:
            yield ": ping\n\n"
            yield frame(MessageDelta(run_id="run_1", step="model/1", text="hel"))
            for event in [e for e in STORED if (e.seq or 0) > after][: self.cut]:
                yield frame(event)
            yield self.last_words

        return StreamingResponse(body(), media_type="text/event-stream")


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[AgentServerClient]:
    async with in_process(server.app) as transport:
        async with AgentServerClient("http://localhost", transport=transport) as client:
            yield client


async def test_a_run_is_created_with_only_the_fields_given_and_a_key_of_its_own() -> None:
    server = Server()
    async with connected(server) as client:
        run = await client.runs.create(agent="clerk", input="hi")
    assert run.id == "run_1" and run.status is RunStatus.RUNNING
    assert server.bodies == [{"agent": "clerk", "input": "hi"}]
    assert server.keys[0]


async def test_a_problem_document_comes_back_as_the_error_it_was_made_from() -> None:
    async with connected(Server()) as client:
        with pytest.raises(UnknownAgent) as caught:
            await client.runs.create(agent="nobody", input="hi")
        assert caught.value.hint == "Served are: 'clerk'."
        assert caught.value.errors[0].path == "/agent"
        with pytest.raises(NotFound, match="No such run"):
            await client.runs.get("run_2")


async def test_fields_that_make_no_run_are_refused_before_they_are_sent() -> None:
    server = Server()
    async with connected(server) as client:
        with pytest.raises(InvalidRequest, match="exactly one of"):
            await client.runs.create(goal="g", agent="clerk", input="hi")
    assert server.bodies == []


async def test_an_answer_that_is_not_json_names_who_gave_it() -> None:
    async with connected(Server()) as client:
        with pytest.raises(Exception, match="answered 502 with something that is not JSON"):
            await client.tools()


async def test_a_stream_that_breaks_goes_on_where_it_broke_without_a_gap_or_a_repeat() -> None:
    server = Server(cut=1)
    async with connected(server) as client:
        seen = [event async for event in client.runs.events("run_1")]
    assert [e.seq for e in seen if e.seq is not None] == [1, 2, 3]
    assert server.asked == ["0", "1", "2"]
    assert isinstance(seen[-1], RunSucceeded)


async def test_events_of_a_newer_server_are_passed_over() -> None:
    server = Server(cut=2, last_words='event: run.painted\ndata: {"type": "run.painted"}\n\n')
    async with connected(server) as client:
        seen = [event async for event in client.runs.events("run_1")]
    assert [e.seq for e in seen if e.seq is not None] == [1, 2, 3]


async def test_waiting_ends_with_the_run() -> None:
    async with connected(Server()) as client:
        run = await client.runs.wait("run_1", timeout_s=10)
    assert run.status is RunStatus.SUCCEEDED


async def test_no_server_is_said_with_its_address_and_what_to_do() -> None:
    async with AgentServerClient("http://127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match="127.0.0.1:1") as caught:
            await client.server()
    assert "agent-server serve" in (caught.value.hint or "")


async def test_an_application_in_process_is_started_given_its_state_and_stopped() -> None:
    server = Server()
    async with connected(server) as client:
        assert (await client.agents())[0].title == "hello"
        assert not server.stopped
    assert server.stopped


async def test_an_application_that_cannot_start_raises_its_own_error() -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        raise ConfigurationError("The database is on holiday.")
        yield

    with pytest.raises(ConfigurationError, match="on holiday"):
        async with in_process(Starlette(lifespan=lifespan)):
            pass


async def test_an_error_inside_the_block_comes_out_unwrapped() -> None:
    with pytest.raises(KeyError):
        async with in_process(Server().app):
            raise KeyError("mine")


async def test_a_reader_that_leaves_is_a_disconnect_to_the_application() -> None:
    left = anyio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    async with in_process(endless) as transport:
        async with httpx2.AsyncClient(base_url="http://localhost", transport=transport) as http:
            async with http.stream("GET", "/") as response:
                assert await anext(response.aiter_bytes()) == b"x"
            with anyio.fail_after(5):
                await left.wait()


def test_every_event_type_can_be_read() -> None:
    from agent_server.client.runs import EVENT_TYPES

    assert {"run.created", "message.delta", "run.budget_exceeded"} <= EVENT_TYPES
    assert json.dumps(sorted(EVENT_TYPES))
