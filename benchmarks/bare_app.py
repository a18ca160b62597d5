"""The yardstick: the least that serves the same agents with FastAPI and the SDK's ``Runner``.

Leans on the SDK as its documentation shows it: its own Responses model and client, its streaming,
its SQLite session. Refuses to keep anything else: a run is lost with its process.

``python -m benchmarks.bare_app --port N --sessions PATH``; the provider comes from the
environment, as the SDK reads it.
"""

import argparse
import json
from collections.abc import AsyncIterator

import uvicorn
from agents import Runner, SQLiteSession, set_tracing_disabled
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from benchmarks.served import BY_NAME


class RunBody(BaseModel):
    agent: str
    input: str
    session_id: str | None = None


def build(sessions: str) -> FastAPI:
    app = FastAPI()
    set_tracing_disabled(True)

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/run")
    async def run(body: RunBody) -> dict[str, object]:
        session = SQLiteSession(body.session_id, sessions) if body.session_id else None
        try:
            result = await Runner.run(BY_NAME[body.agent], body.input, session=session)
        finally:
            if session is not None:
                session.close()
        return {"status": "succeeded", "output": result.final_output}

    @app.post("/stream")
    async def stream(body: RunBody) -> StreamingResponse:
        return StreamingResponse(events(body), media_type="text/event-stream")

    return app


async def events(body: RunBody) -> AsyncIterator[str]:
    """The run's text as it comes, then its output."""
    result = Runner.run_streamed(BY_NAME[body.agent], body.input)
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            data = json.dumps({"type": "message.delta", "text": event.data.delta})
            yield f"event: message.delta\ndata: {data}\n\n"
    data = json.dumps({"type": "run.succeeded", "output": result.final_output})
    yield f"event: run.succeeded\ndata: {data}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sessions", required=True)
    options = parser.parse_args()
    uvicorn.run(
        build(options.sessions),
        port=options.port,
        log_level="warning",
        access_log=False,
        backlog=2048,
    )


if __name__ == "__main__":
    main()
