"""An ASGI application inside this process, called as if it were across the network.

Leans on anyio and on httpx2's transport interface; where httpx2's own ASGI transport waits for
the whole answer, this one streams it, ends the request when the reader leaves, and holds a
reader's arrears to a few chunks. Refuses to know which application it calls.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

CHUNKS_AHEAD = 64
"""Pieces of an answer that may wait for the reader before the application is held up."""


@asynccontextmanager
async def in_process(app: AsgiApp) -> AsyncIterator["AppTransport"]:
    """Start ``app`` by its lifespan, give a transport that calls it, and stop it at the end.

    What its start raises is raised here. Requests still open when the block is left are cut,
    before the application is told to stop.
    """
    lifespan = _Lifespan(app)
    failure: Exception | None = None
    async with anyio.create_task_group() as outer:
        await outer.start(lifespan.run)
        if lifespan.error is None:
            try:
                async with anyio.create_task_group() as requests:
                    # Kept and raised below: a task group would wrap it in an exception group.
                    try:
                        yield AppTransport(app, requests, lifespan.state)
                    except Exception as error:
                        failure = error
                    requests.cancel_scope.cancel()
            finally:
                lifespan.stop.set()
                with anyio.CancelScope(shield=True):
                    await lifespan.stopped.wait()
    failure = failure or lifespan.error
    if failure is not None:
        raise failure


class _Lifespan:
    """The start and the end of an application, by the ASGI lifespan protocol."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self.stop = anyio.Event()
        self.stopped = anyio.Event()
        self.error: Exception | None = None
        self.state: dict[str, Any] = {}
        """What the application's lifespan leaves for its requests."""

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        started = complete = False

        async def receive() -> Message:
            nonlocal started
            if not started:
                started = True
                return {"type": "lifespan.startup"}
            await self.stop.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "lifespan.startup.complete":
                complete = True
                task_status.started()
            elif message["type"].endswith(".failed"):
                self.error = RuntimeError(message.get("message") or "The application failed.")

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self.state}
        try:
            # Shielded: the application must be allowed to stop in order, which `stop` asks for.
            with anyio.CancelScope(shield=True):
                await self._app(scope, receive, send)
        except Exception as error:
            self.error = error
        finally:
            self.stopped.set()
            if not complete:
                task_status.started()


class AppTransport(httpx2.AsyncBaseTransport):
    """Calls ``app`` in tasks of ``tasks``. Made by ``in_process``."""

    def __init__(self, app: AsgiApp, tasks: TaskGroup, state: dict[str, Any]) -> None:
        self._app = app
        self._tasks = tasks
        self._state = state

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        call = _Call(self._app, request, self._state)
        self._tasks.start_soon(call.run)
        try:
            await call.answered.wait()
        except BaseException:
            call.scope.cancel()
            raise
        if call.error is not None:
            raise call.error
        return httpx2.Response(
            call.status, headers=call.headers, stream=_Body(call), request=request
        )


class _Call:
    """One request to the application, running in a task of its own."""

    def __init__(self, app: AsgiApp, request: httpx2.Request, state: dict[str, Any]) -> None:
        self._app = app
        self._request = request
        self._state = state
        self.scope = anyio.CancelScope()
        self.gone = anyio.Event()
        self.answered = anyio.Event()
        self.error: Exception | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        streams = anyio.create_memory_object_stream[bytes](CHUNKS_AHEAD)
        self._send: MemoryObjectSendStream[bytes] = streams[0]
        self.chunks: MemoryObjectReceiveStream[bytes] = streams[1]

    async def run(self) -> None:
        url = self._request.url
        scope = {
            "type": "http",
            # Below 2.4 an application listens for the disconnect instead of finding it on sending.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self._request.method,
            "headers": [(name.lower(), value) for name, value in self._request.headers.raw],
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.split(b"?")[0],
            "query_string": url.query,
            "server": (url.host, url.port),
            "client": ("127.0.0.1", 0),
            "root_path": "",
            "state": self._state.copy(),
        }
        with self.scope:
            try:
                body = await self._request.aread()
                unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

                async def receive() -> Message:
                    if unread:
                        return unread.pop()
                    await self.gone.wait()
                    return {"type": "http.disconnect"}

                await self._app(scope, receive, self._take)
            except Exception as error:
                # After the answer began, the application's own log is the place that has it.
                self.error = error
            finally:
                self._send.close()
                self.gone.set()
                if not self.answered.is_set():
                    self.error = self.error or httpx2.RemoteProtocolError(
                        "The application ended the request without an answer."
                    )
                    self.answered.set()

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = list(message.get("headers", []))
            self.answered.set()
        elif message["type"] == "http.response.body":
            if message.get("body"):
                try:
                    await self._send.send(bytes(message["body"]))
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    self.gone.set()
            if not message.get("more_body", False):
                self._send.close()


class _Body(httpx2.AsyncByteStream):
    """The answer's body, piece by piece; closing it hangs up on the application."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._call.chunks:
            yield chunk

    async def aclose(self) -> None:
        self._call.chunks.close()
        self._call.gone.set()
