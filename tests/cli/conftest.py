"""A small server that speaks the contract, on a real port, for the commands to talk to."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from agent_server.domain import events as e
from agent_server.domain.errors import ErrorInfo

KEY = "test-key-1234"


class Answers:
    """What the server says: set ``events`` and ``run`` before the command is started."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.open_ended = False
        self.succeed("It is done.")

    def succeed(self, output: Any) -> None:
        self.run = {"status": "succeeded", "output": output}
        self.end: e.EventBase = e.RunSucceeded(seq=3, output=output)

    def fail(self, message: str, hint: str) -> None:
        error = ErrorInfo(code="model_unauthorized", message=message, hint=hint)
        self.run = {"status": "failed", "error": error.model_dump()}
        self.end = e.RunFailed(seq=3, error=error)

    def run_json(self) -> dict[str, Any]:
        kind = {"id": "run_1", "kind": "goal", "goal": "Do it"}
        return {**kind, "created_at": "2026-01-01T00:00:00Z", **self.run}

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/api/v1/runs", self.create, methods=["POST"]),
                Route("/api/v1/runs", self.list),
                Route("/api/v1/runs/run_1", self.get),
                Route("/api/v1/runs/run_1/cancel", self.cancel, methods=["POST"]),
                Route("/api/v1/runs/run_1/events", self.events),
                Route("/api/v1/agents", self.agents),
            ],
            exception_handlers={404: self.missing},
        )

    async def create(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            problem = {"code": "unauthorized", "detail": "The key does not fit.", "hint": "Set it."}
            return JSONResponse(problem, 401)
        body = await request.json()
        self.bodies.append(body)
        if body.get("agent") == "nobody":
            problem = {"code": "unknown_agent", "detail": "There is no agent 'nobody'."}
            return JSONResponse(problem, 422)
        return JSONResponse({**self.run_json(), "status": "queued", "output": None}, 202)

    async def get(self, request: Request) -> Response:
        return JSONResponse(self.run_json())

    async def cancel(self, request: Request) -> Response:
        return JSONResponse({**self.run_json(), "status": "cancelled"})

    async def list(self, request: Request) -> Response:
        return JSONResponse({"data": [self.run_json()], "next_cursor": None})

    async def agents(self, request: Request) -> Response:
        clerk = {"name": "clerk", "title": "Clerk", "tools": ["add"], "source": "agents.py"}
        broken = {"source": "other.py", "line": 3, "message": "invalid syntax"}
        return JSONResponse({"data": [clerk], "load_errors": [broken]})

    async def events(self, request: Request) -> Response:
        told: list[Any] = [
            e.RunCreated(run_id="run_1", seq=1, kind="goal", name="Do it"),
            e.RunStarted(run_id="run_1", seq=2),
        ]
        if not self.open_ended:
            told.append(self.end)
        if request.headers["accept"] == "application/json":
            after = int(request.query_params["after"])
            rows = [json.loads(t.model_dump_json()) for t in told if t.seq > after]
            return JSONResponse({"data": rows, "next_cursor": None})

        async def body() -> AsyncIterator[str]:
            for event in told:
                yield f"id: {event.seq}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
            while self.open_ended:
                await asyncio.sleep(0.05)  # between two pings, as a server has them
                yield ": ping\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    async def missing(self, request: Request, error: Exception) -> Response:
        problem = {"code": "not_found", "detail": f"There is nothing at {request.url.path!r}."}
        return JSONResponse(problem, 404)


class Running:
    """The server's address, and what it answers."""

    def __init__(self, url: str, answers: Answers) -> None:
        self.url, self.answers = url, answers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Running]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENT_SERVER_URL", raising=False)
    monkeypatch.setenv("AGENT_SERVER_API_KEY", KEY)
    answers = Answers()
    config = uvicorn.Config(answers.app(), port=0, log_config=None, timeout_graceful_shutdown=1)
    listener = config.bind_socket()
    listener.listen()  # so that a caller who is quicker than the thread waits
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", answers)
    finally:
        running.should_exit = True
        thread.join(10)
        listener.close()
