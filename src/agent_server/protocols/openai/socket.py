"""WebSocket on ``/v1/responses``: one connection, a response for each ``response.create``.

Leans on the responses' own room for all that a response is. Refuses to keep what a connection
remembers, the conversations of its unstored responses, any longer than the connection.
"""

import json
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import anyio
import structlog
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.websockets import WebSocket, WebSocketDisconnect

from agent_server.api import inputs, problems
from agent_server.api.door import CALL, Call
from agent_server.api.sse import ENDING, Streams
from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    AgentServerError,
    BodyTooLarge,
    NotFound,
    RunEnded,
    Unavailable,
)
from agent_server.domain.ids import RunId, new_id, new_run_id
from agent_server.execution.ports import STEER, SignalReceived
from agent_server.protocols.openai import asking, names
from agent_server.protocols.openai.bodies import CreateResponse
from agent_server.protocols.openai.consents import answers
from agent_server.protocols.openai.deps import OpenAIDeps
from agent_server.protocols.openai.errors import error_object, refuse, unsupported
from agent_server.protocols.openai.items import read_input
from agent_server.protocols.openai.responses import Asked, ResponseRoutes
from agent_server.protocols.openai.script import Script
from agent_server.protocols.openai.steering import (
    Live,
    Steer,
    SteerRefused,
    check_form,
    failed,
    joined,
    message_of,
    required,
)
from agent_server.protocols.openai.stored import Stored

MAX_LANES: Final = 16
MAX_WAITING: Final = 16
"""Requests that wait in one lane."""
MAX_REMEMBERED: Final = 32
MAX_ENDED: Final = 256
"""Responses of which a connection knows that they have ended."""
LOST: Final = "previous_response_not_found"

log = structlog.get_logger("agent_server.http")


class ResponseSocket:
    """The connections of a server."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self._responses = ResponseRoutes(deps)
        self._open: Counter[str] = Counter()
        """By the principal's name."""

    async def serve(self, socket: WebSocket) -> None:
        """One connection, until its client goes or the server does."""
        call: Call = socket.scope[CALL]
        key, settings = call.principal.name, self._deps.settings
        if (
            self._open[key] >= settings.streams_per_key
            or self._open.total() >= settings.max_streams
        ):
            await socket.close(1013)
            return
        self._open[key] += 1
        try:
            await socket.accept()
            async with anyio.create_task_group() as tasks:
                connection = Connection(socket, self._deps, self._responses, tasks)
                tasks.start_soon(connection.end_with, self._deps.streams)
                await connection.read()
                tasks.cancel_scope.cancel()
        except WebSocketDisconnect:
            return
        finally:
            self._open[key] -= 1


class Connection:
    """What one client does on its connection. Requests of one lane (``stream_id``, or none) come
    one after another, lanes side by side."""

    def __init__(
        self, socket: WebSocket, deps: OpenAIDeps, responses: ResponseRoutes, tasks: TaskGroup
    ) -> None:
        call: Call = socket.scope[CALL]
        self._principal = call.principal
        self._request_id = call.request_id
        self._socket = socket
        self._settings = deps.settings
        self._responses = responses
        self._control = deps.control
        self._stored = Stored(deps)
        self._tasks = tasks
        self._live: list[Live] = []
        self._ended: deque[str] = deque(maxlen=MAX_ENDED)
        self._queued: dict[str, Live] = {}
        """Of each response that wants something of the client first, what was said meanwhile."""
        self._lanes: dict[str | None, MemoryObjectSendStream[JsonObject]] = {}
        self._remembered: OrderedDict[str, list[JsonObject]] = OrderedDict()
        self._origins: dict[str, RunId | None] = {}
        """What is stored of those behind a response that is remembered."""
        self._writing = anyio.Lock()

    async def read(self) -> None:
        """Take what the client sends until it goes."""
        while True:
            message = await self._socket.receive()
            if message["type"] != "websocket.receive":
                return
            raw = message.get("bytes") or (message.get("text") or "").encode()
            lane = None
            try:
                event = self._event(raw)
                if event["type"] == "response.steer":
                    await self._steer(event)
                    continue
                lane = event.get("stream_id")
                self._lane(lane).send_nowait(event)
            except anyio.WouldBlock:
                refusal = refuse("stream_id", f"{MAX_WAITING} requests wait in this lane already.")
                await self._refuse(refusal, lane)
            except AgentServerError as error:
                await self._refuse(error, lane)
            except WebSocketDisconnect:
                raise
            except Exception:
                await self._unexpected(lane)

    async def _unexpected(self, lane: str | None) -> None:
        log.exception("unexpected error", request_id=self._request_id)
        await self._refuse(problems.unexpected(self._request_id), lane)

    async def end_with(self, streams: Streams) -> None:
        """End when the server drains, with word of it, before anything is stopped."""
        with streams.poll():
            await anyio.sleep_forever()
        await self._refuse(Unavailable("The server is going down.", hint="Connect anew."), None)
        await self._socket.close(1012)
        self._tasks.cancel_scope.cancel()

    def _event(self, raw: bytes) -> JsonObject:
        most = self._settings.max_body_bytes
        if len(raw) > most:
            raise BodyTooLarge(
                f"The message is larger than {most:,} bytes.",
                hint="Send less, or raise AGENT_SERVER_MAX_BODY_BYTES.",
            )
        if inputs.nested_deeper(raw, self._settings.max_json_depth):
            raise refuse(None, "The message is nested too deep.")
        try:
            event = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise refuse(None, "The message is not JSON.") from error
        if not isinstance(event, dict) or event.get("type") not in _TYPES:
            raise refuse("type", f"A message is an object of type {' or '.join(_TYPES)}.")
        lane = event.get("stream_id")
        if lane is not None and not (isinstance(lane, str) and 0 < len(lane) <= 200):
            raise refuse("stream_id", "'stream_id' is a text of 1 to 200 characters.")
        return event

    def _lane(self, name: str | None) -> MemoryObjectSendStream[JsonObject]:
        if name not in self._lanes:
            if len(self._lanes) >= MAX_LANES:
                raise refuse("stream_id", f"A connection has at most {MAX_LANES} lanes.")
            self._lanes[name], waiting = anyio.create_memory_object_stream[JsonObject](MAX_WAITING)
            self._tasks.start_soon(self._work, name, waiting)
        return self._lanes[name]

    async def _work(self, lane: str | None, waiting: MemoryObjectReceiveStream[JsonObject]) -> None:
        with self._lanes[lane], waiting:
            async for event in waiting:
                try:
                    await self._respond(event, lane)
                except AgentServerError as error:
                    await self._refuse(error, lane)
                except WebSocketDisconnect:
                    return
                except Exception:
                    await self._unexpected(lane)

    async def _respond(self, event: JsonObject, lane: str | None) -> None:
        body, generate = self._body(event)
        local = self._remembered.get(body.previous_response_id or "")
        if not generate:
            await self._prepare(body, local, lane)
            return
        continued = body.previous_response_id or ""
        waits = self._queued.get(continued)
        queued: Sequence[Steer] = ()
        if waits is not None and waits.lane == lane:
            queued = waits.left()
            if not answers(body.input):  # A run that a person consents to has what was said.
                body = body.model_copy(update={"input": joined(queued, body.input)})
                queued = ()
        try:
            live = await self._begun(body, lane, local, queued)
        except NotFound as error:
            if continued and continued in error.detail:
                raise _Lost(error.detail, hint="Send the whole history without it.") from error
            raise
        if waits is not None and waits.lane == lane:
            del self._queued[continued]
        following: Live | None = live
        while following is not None:
            following = await self._after(following)

    async def _begun(
        self,
        body: CreateResponse,
        lane: str | None,
        local: Sequence[JsonObject] | None,
        queued: Sequence[Steer] = (),
    ) -> Live:
        """The response to ``body``, told to its end or as far as it can be."""
        asked = await self._responses.asked(body, self._principal, local, steerable=True)
        if local is not None:
            asked = replace(asked, continues=self._origins.get(body.previous_response_id or ""))
        live = Live(asked, lane, list(queued))
        tale = live.tale
        self._live.append(live)
        try:
            begun = self._responses.follow(asked, self._principal, None, live.inbox)
            async with await begun as follow:
                async for batch in follow.batches():
                    for one in batch:
                        tale.feed(one)
                        await self._send(tale.take(), live)
                    if tale.ended or batch[-1].type in ENDING:
                        break
                if follow.lagged and tale.script is not None:
                    await self._send([tale.script.fault("The reader was too slow.")], live)
        finally:
            self._live.remove(live)
        return live

    async def _after(self, live: Live) -> Live | None:
        """What follows a response by itself: one that answers what was said into it too late for
        it to hear. None where nothing does."""
        tale = live.tale
        if not tale.ended:
            return None
        response = tale.response()
        parts = [*tale.earlier, (tale.decided, response)]
        self._ended.extend(told["id"] for _, told in parts)
        if not live.asked.request.store:
            items = _items(live.asked)
            for said, told in parts:
                items += [*await self._read(said), *await self._read(told["output"])]
                self._keep(told["id"], list(items))
                self._origins[told["id"]] = live.asked.continues
        left = live.left()
        if not left:
            return None
        wanted = required(response)
        why = f"The response is {response['status']}: nothing follows it."
        if wanted and len(self._queued) >= MAX_REMEMBERED:
            why = f"{MAX_REMEMBERED} responses wait for what they want of you already."
        elif response["status"] == "completed" and wanted:
            self._queued[response["id"]] = live
            for steer in left:
                reference = {"id": steer.id, "previous_response_id": response["id"]}
                pending = {"reason": "waiting_for_required_input", "required_input": wanted}
                await self._say(live, "response.steer.pending", steer=reference, **pending)
            return None
        elif response["status"] == "completed":
            following = {"previous_response_id": response["id"], "input": joined(left, None)}
            body = live.asked.body.model_copy(update=following)
            local = self._remembered.get(response["id"])
            try:
                return await self._begun(body, live.lane, local)
            except AgentServerError as error:
                why = error.detail
        for steer in left:
            back = {"id": steer.id, "previous_response_id": response["id"], "input": steer.given}
            what = failed(back, "successor_creation_failed", why)
            await self._say(live, "response.steer.failed", **what)
        return None

    async def _steer(self, event: JsonObject) -> None:
        """Say something into a response that is under way here; each is answered, in order."""
        target = str(event.get("previous_response_id"))
        live = next((one for one in self._live if target in one.ids), None)
        try:
            if live is None and target in self._ended:
                raise SteerRefused("response_already_completed", "The response has ended.")
            if live is None:
                message = f"No response {target[:100]!r} is under way on this connection."
                raise SteerRefused("response_not_found", message)
            check_form(event)
            tenant = self._principal.tenant
            items = await self._stored.read(tenant, event["input"])
            live.check(target)
        except (SteerRefused, AgentServerError) as error:
            code = error.code if isinstance(error, SteerRefused) else "invalid_input"
            given = event.get("input")
            back = {"previous_response_id": target, "input": given if given is not None else ""}
            what = failed(back, code, str(error))
            await self._say(live, "response.steer.failed", **what)
            return
        steer = Steer(new_id("steer"), event["input"], items)
        live.steers.append(steer)
        reference = {"id": steer.id, "previous_response_id": target}
        await self._say(live, "response.steer.accepted", steer=reference)
        if not live.asked.request.store:
            by, at = self._principal.name, utcnow()
            live.inbox.append(SignalReceived(items, by, at, steer.id))
            return
        said = {"request": {"input": items}, "steer_id": steer.id}
        run_id = names.ref_of(target).run_id
        try:
            await self._control.signal(tenant, run_id, STEER, said, by=self._principal.name)
        except (RunEnded, NotFound):
            log.debug("steer.late", run_id=run_id)  # It is left over, see ``_after``.

    async def _say(self, live: Live | None, kind: str, **values: Any) -> None:
        if live is None:
            await self._write(json.dumps({"type": kind, **values, "sequence_number": 0}))
        else:
            await self._write(_in_lane(json.dumps(live.event(kind, **values)), live.lane))

    async def _read(self, items: Sequence[JsonObject]) -> list[JsonObject]:
        return await read_input(items, _no_reference)

    def _body(self, event: JsonObject) -> tuple[CreateResponse, bool]:
        """What is asked for, and whether it is to be answered."""
        rest = {name: value for name, value in event.items() if name not in _OF_THE_SOCKET}
        for name, wanted in (("stream", True), ("background", False)):
            if rest.pop(name, None) not in (None, wanted):
                raise unsupported(name, f"{name!r} on a WebSocket", "Responses are streams here.")
        generate = event.get("generate")
        if generate not in (None, True, False):
            raise refuse("generate", "'generate' is true or false.")
        raw = json.dumps(rest).encode()
        body = inputs.parse(raw, CreateResponse, max_depth=self._settings.max_json_depth)
        inputs.refuse_nul(body, raw)
        return body.model_copy(update={"stream": True}), generate is not False

    async def _prepare(
        self, body: CreateResponse, local: Sequence[JsonObject] | None, lane: str | None
    ) -> None:
        """Remember an input that is not to be answered yet, as a response without output."""
        if body.previous_response_id is not None and local is None:
            raise unsupported("generate", "'generate': false behind a stored response")
        if body.conversation is not None:
            raise unsupported("generate", "'generate': false in a conversation")
        given: list[JsonObject] = []
        if body.input:
            unstored = body.model_copy(update={"store": False})
            given = _items(await self._responses.asked(unstored, self._principal, local))
        else:
            asking.check(body)
            given = list(local or ())
        run_id = new_run_id()
        echo = {**asking.echo(body, None), "store": False}
        script = Script(run_id, utcnow(), echo, events=True)
        script.begin()
        script.end("completed", None, None)
        self._keep(script.response["id"], given)
        for frame in script.take():
            await self._write(_in_lane(message_of(frame), lane))

    def _keep(self, response_id: str, items: list[JsonObject]) -> None:
        self._remembered[response_id] = items
        if len(self._remembered) > MAX_REMEMBERED:
            oldest, _ = self._remembered.popitem(last=False)
            self._origins.pop(oldest, None)

    async def _send(self, frames: Sequence[bytes], live: Live) -> None:
        for frame in frames:
            await self._write(_in_lane(live.told(frame), live.lane))

    async def _refuse(self, error: AgentServerError, lane: str | None) -> None:
        await self._write(_error(error, lane))

    async def _write(self, text: str) -> None:
        async with self._writing:
            await self._socket.send_text(text)


_TYPES: Final = ("response.create", "response.steer")
_OF_THE_SOCKET: Final = ("type", "stream_id", "generate")


class _Lost(NotFound):
    """The response that is to be continued is neither stored nor of this connection."""


def _items(asked: Asked) -> list[JsonObject]:
    given: Any = asked.request.input
    return list(given or ())


async def _no_reference(identity: str) -> JsonObject:
    raise NotFound(f"Item with id {identity!r} not found.")


def _in_lane(event: str, lane: str | None) -> str:
    return event if lane is None else f'{{"stream_id": {json.dumps(lane)}, {event[1:]}'


def _error(error: AgentServerError, lane: str | None) -> str:
    status, body = error_object(error)
    if isinstance(error, _Lost):
        status, body = 400, {**body, "code": LOST, "param": "previous_response_id"}
    return _in_lane(json.dumps({"type": "error", "status": status, "error": body}), lane)
