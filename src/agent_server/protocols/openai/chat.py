"""``/v1/chat/completions``: a run as a chat completion, whole or in chunks.

Leans on ``responses`` for how a run is asked for and begun, on the narrator for how it is told.
Refuses what a chat completion has no words for.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from fastapi import Request
from starlette.responses import Response

from agent_server.api.ephemeral import EphemeralFollow
from agent_server.api.openapi import Route
from agent_server.api.sse import EventStream, Streams
from agent_server.auth.principal import Principal
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import Conflict, ErrorInfo, Unavailable
from agent_server.domain.runs import RunRequest
from agent_server.execution.events import StoredEvent
from agent_server.protocols.openai import asking, names
from agent_server.protocols.openai.bodies import CreateChat, CreateResponse, ReasoningParam
from agent_server.protocols.openai.deps import OpenAIDeps, caller, read
from agent_server.protocols.openai.errors import (
    RunFailed,
    error_object,
    refuse,
    refuse_unknown,
    unsupported,
)
from agent_server.protocols.openai.items import check_answered
from agent_server.protocols.openai.lists import answer, route
from agent_server.protocols.openai.narrator import Narrator
from agent_server.protocols.openai.script import DONE
from agent_server.protocols.openai.stored import Stored
from agent_server.protocols.openai.tale import in_form, moment

PATH = "/v1/chat/completions"
_REFUSED: Final = (
    "audio", "function_call", "functions", "logit_bias", "moderation", "prediction", "seed", "stop",
    "web_search_options", *asking.CACHING,
)  # fmt: skip
_ROLES: Final = ("user", "system", "developer")
KEYS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(_ROLES, ("role", "content", "name")),
    "assistant": ("role", "content", "name", "refusal", "tool_calls", "annotations", "parsed"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
"""What a message of each role may have. A ``name`` has no effect, nor has what comes back with an
answer of ours: annotations, and what OpenAI's client reads into it (``parsed``)."""


_FUNCTION: Final = ("name", "arguments", "parsed_arguments")


class ChatRoutes:
    """The handler, bound to the parts it calls."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self._runs = deps.runs
        self._stored = Stored(deps)

    def routes(self) -> Sequence[Route]:
        return (
            route(
                "POST",
                PATH,
                self.create,
                "Create a chat completion",
                "create_chat_completion",
                body=CreateChat,
                stream=True,
            ),
        )

    async def create(self, request: Request) -> Response:
        body = await read(request, CreateChat, self._deps.settings)
        principal = caller(request)
        wanted = await self._wanted(body, principal)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        tale = ChatTale(body.model, stream=bool(body.stream), usage=usage, form=in_form(wanted))
        if body.stream:
            self._deps.streams.check_room(principal.name)
            follow = await self._follow(wanted, principal, bool(body.stream))
            return ChatStream(self._deps.streams, principal.name, follow, tale)
        with self._deps.streams.poll():
            if wanted.store:
                async with await self._follow(wanted, principal, bool(body.stream)) as follow:
                    async for batch in follow.batches():
                        for event in batch:
                            tale.feed(event)
            else:
                await self._runs.run_ephemeral(
                    wanted,
                    tenant=principal.tenant,
                    principal=principal.name,
                    on_event=tale.feed,
                    deltas=False,
                )
            return answer(tale.completion())
        raise Unavailable("The server is going down.")

    async def _wanted(self, body: CreateChat, principal: Principal) -> RunRequest:
        _check(body)
        target = names.target(body.model)
        given = await self._stored.read(principal.tenant, chat_items(body.messages), "messages")
        check_answered([], given)
        # Where nothing is said of it nothing is stored, as with OpenAI; what needs a store has it.
        stored = bool(body.store) or (body.store is None and target.kind != "agent")
        as_response = CreateResponse(
            model=body.model,
            temperature=body.temperature,
            top_p=body.top_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            max_output_tokens=body.max_completion_tokens or body.max_tokens,
            parallel_tool_calls=body.parallel_tool_calls,
            stream=body.stream,
            tools=_tools(body.tools),
            tool_choice=_choice(body.tool_choice),
            reasoning=ReasoningParam(effort=body.reasoning_effort),
            text=_text(body),
        )
        before = given[:-1] if target.kind == "goal" else []
        asked = given[-1:] if target.kind == "goal" else given
        if target.kind == "workflow":
            asked = [item for item in given if item.get("role") == "user"][-1:]
        return asking.run_request(
            target,
            asked,
            before,
            asking.options(as_response, self._deps.settings.openai_api),
            store=stored,
            subject=body.safety_identifier or body.user or None,
            metadata=body.metadata,
        )

    async def _follow(self, wanted: RunRequest, principal: Principal, stream: bool) -> Any:
        tenant = principal.tenant
        if not wanted.store:
            return EphemeralFollow(self._runs, wanted, tenant, principal.name)
        _, follow = await self._runs.submit_followed(
            wanted, tenant=tenant, principal=principal.name, deltas=stream
        )
        return follow


def _check(body: CreateChat) -> None:
    asking.refuse_given(body, *_REFUSED)
    if body.n not in (None, 1):
        raise unsupported("n", "'n' other than 1")
    for name in ("logprobs", "top_logprobs"):
        if getattr(body, name):
            raise unsupported(name, f"{name!r}")
    if body.modalities not in (None, ["text"]):
        raise unsupported("modalities", "'modalities' other than text")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation", "obfuscation of deltas")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options", "'stream_options' needs 'stream': true.")
    asking.check_tier(body.service_tier)
    asking.check_metadata(body.metadata)


def chat_items(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """The messages of a chat as items."""
    found: list[JsonObject] = []
    for number, message in enumerate(messages):
        place, role = f"messages[{number}]", message.get("role")
        if not isinstance(role, str) or role not in KEYS:
            raise refuse(f"{place}.role", f"'{place}.role' {role!r} is not supported.")
        refuse_unknown(place, message, *KEYS[role])
        if role == "tool":
            output = message.get("content")
            if isinstance(output, list):
                parts = _listed(message, "content")
                output = "".join(str(part.get("text") or "") for part in parts)
            call = message.get("tool_call_id")
            found.append({"type": "function_call_output", "call_id": call, "output": output})
        elif role == "assistant":
            said = message.get("content") or message.get("refusal")
            if said:
                found.append({"role": "assistant", "content": _parts(said, place)})
            for n, call in enumerate(_listed(message, "tool_calls")):
                function = _inner(call, "function", f"{place}.tool_calls")
                refuse_unknown(f"{place}.tool_calls[{n}]", call, "id", "index", "function")
                refuse_unknown(f"{place}.tool_calls[{n}].function", function, *_FUNCTION)
                found.append(
                    {
                        "type": "function_call",
                        "call_id": call.get("id"),
                        "name": function.get("name"),
                        "arguments": function.get("arguments"),
                    }
                )
        else:
            found.append({"role": role, "content": _parts(message.get("content"), place)})
    return found


def _parts(content: Any, place: str) -> Any:
    if not isinstance(content, list):
        return content
    found = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        where = f"{place}.content[{number}]"
        if kind in ("image_url", "file"):
            refuse_unknown(where, part, kind)
        if kind == "image_url":
            image = _inner(part, "image_url", where)
            refuse_unknown(f"{where}.image_url", image, "url", "detail")
            detail = image.get("detail") or "auto"
            found.append({"type": "input_image", "image_url": image.get("url"), "detail": detail})
        elif kind == "file":
            found.append({"type": "input_file", **_inner(part, "file", where)})
        elif kind in ("text", "refusal"):
            found.append(part)
        else:
            raise unsupported(f"{where}.type", f"content of type {kind!r}")
    return found


def _inner(holder: Any, name: str, place: str) -> JsonObject:
    """The object ``name`` in ``holder``."""
    found = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(found, dict):
        raise refuse(f"{place}.{name}", f"'{place}' needs {name!r}, an object.")
    return found


def _listed(holder: JsonObject, name: str) -> list[JsonObject]:
    """The list of objects ``name`` in ``holder``, which may be left out."""
    found = holder.get(name) or []
    if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise refuse(name, f"{name!r} must be a list of objects.")
    return found


def _tools(given: list[JsonObject] | None) -> list[JsonObject] | None:
    if given is None:
        return None
    return [
        (
            {"type": "function", **_inner(tool, "function", "tools")}
            if tool.get("type") == "function"
            else tool
        )
        for tool in given
    ]


def _choice(given: str | JsonObject | None) -> str | JsonObject | None:
    if not isinstance(given, dict):
        return given
    if given.get("type") == "function":
        return {"type": "function", "name": _inner(given, "function", "tool_choice").get("name")}
    if given.get("type") == "allowed_tools":
        inner = _inner(given, "allowed_tools", "tool_choice")
        return {**inner, "type": "allowed_tools", "tools": _tools(_listed(inner, "tools"))}
    return given


def _text(body: CreateChat) -> Any:
    form = body.response_format
    if form is not None and form.get("type") == "json_schema":
        form = {"type": "json_schema", **_inner(form, "json_schema", "response_format")}
    return {"format": form, "verbosity": body.verbosity}


class ChatTale:
    """See ``narrator.Teller``: one run as a completion, or as chunks. Thoughts are not told."""

    def __init__(self, model: str, *, stream: bool, usage: bool, form: bool) -> None:
        self._model = model
        self._stream = stream
        self._usage = usage
        self._narrator = Narrator(self, live=stream, last_only=form)
        self._head: JsonObject = {}
        self._written: list[bytes] = []
        self._texts: list[str] = []
        self._calls: list[JsonObject] = []
        self._finish = "stop"
        self._failed: ErrorInfo | None = None
        self._delta = self._rest = ""

    def feed(self, event: StoredEvent) -> None:
        if not self._head:
            self._begin(json.loads(event.data))
        elif self._narrator.wants(event.type):
            self._narrator.feed(json.loads(event.data))
            if event.type == "run.waiting" and self._narrator.waiting is not None:
                detail = self._narrator.waiting.get("detail", "")
                raise Conflict(
                    f"The run {self._head['id'][9:]!r} waits: {detail}",
                    hint="It goes on when it is decided: see GET /api/v1/approvals.",
                    headers={"x-should-retry": "false"},
                )

    def take(self) -> list[bytes]:
        written, self._written = self._written, []
        return written

    def _begin(self, created: JsonObject) -> None:
        at: datetime = moment(created["at"])
        self._head = {
            "id": "chatcmpl-" + created["run_id"].removeprefix("run_"),
            "object": "chat.completion.chunk" if self._stream else "chat.completion",
            "created": int(at.timestamp()),
            "model": self._model,
            "service_tier": "default",
        }
        self._chunk({"role": "assistant", "content": "", "refusal": None})
        if self._stream:
            mark = "\x00"
            line = self._line([_choice_of({"content": mark}, None)], None)
            before, after = line.decode().split(json.dumps(mark))
            self._delta, self._rest = before, after

    def open_text(self) -> None:
        return None

    def say(self, text: str) -> None:
        if self._stream:
            self._written.append(f"{self._delta}{json.dumps(text)}{self._rest}".encode())

    def close_text(self, text: str, complete: bool) -> None:
        self._texts.append(text)

    def think(self, text: str) -> None:
        return None

    def call(self, call_id: str, name: str, arguments: str) -> None:
        index = len(self._calls)
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": call_id, "type": "function", "function": function})
        self._chunk({"tool_calls": [{"index": index, **self._calls[-1]}]})

    def end(self, status: str, error: ErrorInfo | None, reason: str | None) -> None:
        if status in ("failed", "cancelled"):
            self._failed = error
            if self._stream and error is not None:
                _, body = error_object(RunFailed(error))
                self._written.append(b"data: " + json.dumps({"error": body}).encode() + b"\n\n")
            return
        if self._calls:
            self._finish = "tool_calls"
        elif status == "incomplete":
            self._finish = "content_filter" if reason == "content_filter" else "length"
        if self._stream:
            self._written.append(self._line([_choice_of({}, self._finish)], None))
            if self._usage:
                self._written.append(self._line([], self._used()))

    def completion(self) -> JsonObject:
        """The whole completion. Raises ``RunFailed``."""
        if self._failed is not None:
            raise RunFailed(self._failed)
        message: JsonObject = {
            "role": "assistant",
            "content": "".join(self._texts) if self._texts else None,
            "refusal": None,
            "annotations": [],
        }
        if self._calls:
            message["tool_calls"] = self._calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish,
        }
        return {**self._head, "choices": [choice], "usage": self._used()}

    def fault(self, message: str) -> bytes:
        _, body = error_object(Unavailable(message))
        return b"data: " + json.dumps({"error": body}).encode() + b"\n\n" + DONE

    def _used(self) -> JsonObject:
        used = self._narrator.tokens
        return {
            "prompt_tokens": used.input,
            "completion_tokens": used.output,
            "total_tokens": used.input + used.output,
            "prompt_tokens_details": {"cached_tokens": used.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": used.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def _chunk(self, delta: JsonObject) -> None:
        if self._stream:
            self._written.append(self._line([_choice_of(delta, None)], None))

    def _line(self, choices: list[JsonObject], usage: JsonObject | None) -> bytes:
        chunk = {**self._head, "choices": choices}
        if self._usage:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _choice_of(delta: JsonObject, finish: str | None) -> JsonObject:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


class ChatStream(EventStream):
    """A chat completion as Server-Sent Events."""

    closing = DONE

    def __init__(self, streams: Streams, key: str, follow: Any, tale: ChatTale) -> None:
        super().__init__(streams, key, follow)
        self._tale = tale

    def frames(self, event: StoredEvent) -> Sequence[bytes]:
        try:
            self._tale.feed(event)
        except Conflict as waiting:
            _, body = error_object(waiting)
            return (b"data: " + json.dumps({"error": body}).encode() + b"\n\n",)
        return self._tale.take()

    def lagged_notice(self) -> bytes:
        return self._tale.fault("The reader was too slow and was cut off.")

    def draining_notice(self) -> bytes:
        return self._tale.fault("The server is going down.")
