"""``/v1/responses``: a run as a response, answered, streamed, in the background, continued.

Leans on the runs' port, on ``asking`` for what is asked and on ``tale`` for how it is told.
Refuses to know how a run is carried out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json
from agent_server.api.ephemeral import EphemeralFollow
from agent_server.api.openapi import Route
from agent_server.auth.principal import Principal
from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.errors import NotFound, RunEnded, Unavailable
from agent_server.domain.ids import RunId
from agent_server.domain.options import RunOptions
from agent_server.domain.runs import Run, RunRequest, RunStatus
from agent_server.execution.events import StoredEvent
from agent_server.execution.runs import Idempotency
from agent_server.protocols.openai import asking, names
from agent_server.protocols.openai.bodies import CompactBody, CreateResponse
from agent_server.protocols.openai.deps import OpenAIDeps, caller, read
from agent_server.protocols.openai.errors import RunFailed, refuse
from agent_server.protocols.openai.items import check_answered, input_items, pack, read_input
from agent_server.protocols.openai.tale import Tale, TaleStream, echo_of, in_form, told

PATH = "/v1/responses"
PAGE = 500
COMPACT = (
    "Summarise the conversation so far, so that it can go on without its beginning: who wants "
    "what, facts and numbers exactly, what was decided, what is open, what tools found out. "
    "Answer with the summary alone."
)


class ResponseQuery(Frozen):
    include: str | None = None
    include_obfuscation: bool | None = None
    starting_after: int | None = Field(default=None, ge=0)
    stream: bool = False


class ItemsQuery(Frozen):
    after: str | None = None
    include: str | None = None
    limit: int = Field(default=20, ge=1, le=100)
    order: str = Field(default="desc", pattern="^(asc|desc)$")


@dataclass(frozen=True)
class Asked:
    """A request, read: the run that answers it."""

    body: CreateResponse
    request: RunRequest

    @property
    def tale(self) -> Tale:
        stream = bool(self.body.stream)
        form = in_form(self.request)
        return Tale(echo_of(self.request), events=stream, live=stream, last_only=form)


class ResponseRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self._runs = deps.runs

    def routes(self) -> Sequence[Route]:
        one = PATH + "/{response_id}"
        return (
            _route("POST", PATH, self.create, "Create a response", "create_response", True),
            _route("POST", PATH + "/compact", self.compact, "Compact a history", "compact"),
            _route("GET", one, self.read, "Read or follow a response", "get_response", True),
            _route("DELETE", one, self.delete, "Delete a response", "delete_response"),
            _route("POST", one + "/cancel", self.cancel, "Cancel a response", "cancel_response"),
            _route("GET", one + "/input_items", self.items, "List its input", "list_input_items"),
        )

    async def create(self, request: Request) -> Response:
        raw = await request.body()
        body = await read(request, CreateResponse, self._deps.settings)
        principal = caller(request)
        key = inputs.idempotency(request.headers, "POST", PATH, raw)
        if key is not None and body.store is False:
            raise refuse("store", "An Idempotency-Key needs a response that is stored.")
        if body.stream:
            self._deps.streams.check_room()
        asked = await self.asked(body, principal)
        if body.stream:
            return TaleStream(
                self._deps.streams, await self.follow(asked, principal, key), asked.tale
            )
        return Json(dumped(await self.answer(asked, principal, key)))

    async def asked(self, body: CreateResponse, principal: Principal) -> Asked:
        """``body`` as a run, every name in it looked up. Raises what it refuses."""
        asking.check(body)
        target = names.target(body.model)
        tenant = principal.tenant

        async def lookup(item: str) -> JsonObject:
            return await self._item(principal, item)

        given = await read_input(body.input, lookup)
        before, conversation, previous = [], conversation_id(body.conversation), None
        if body.previous_response_id is not None:
            previous = await self._previous(principal, body.previous_response_id)
            before = await self._runs.conversation(tenant, previous)
        elif conversation is not None:
            await self._deps.sessions.get(tenant, conversation)
            before = await self._deps.sessions.of(tenant).items(conversation)
        if not given:
            raise refuse("input", "'input' is missing: a text, or a list of items.")
        check_answered(before, given)
        stored = body.store is not False
        if conversation is not None and not stored:
            raise refuse("store", "A conversation keeps what is said: leave out 'store'.")
        options = asking.options(
            body,
            previous=previous if target.kind == "agent" else None,
            pieces=stored and bool(body.stream or body.background),
        )
        options = options.model_copy(update={"echo": asking.echo(body, conversation)})
        return Asked(
            body,
            asking.run_request(
                target,
                given,
                before,
                options,
                store=stored,
                session_id=conversation,
                max_tool_calls=body.max_tool_calls,
                subject=body.safety_identifier or body.user,
                metadata=body.metadata,
            ),
        )

    async def follow(self, asked: Asked, principal: Principal, key: Idempotency | None) -> Any:
        """The events of the run, which begins: now if it is stored, else when it is entered."""
        tenant = principal.tenant
        if not asked.request.store:
            return EphemeralFollow(self._runs, asked.request, tenant, principal.name)
        run, _ = await self._runs.submit(
            asked.request, tenant=tenant, principal=principal.name, idempotency=key
        )
        return self._runs.follow(tenant, RunId(run.id), 0)

    async def answer(
        self, asked: Asked, principal: Principal, key: Idempotency | None
    ) -> JsonObject:
        """The whole response; one in the background as it begins."""
        tenant, request = principal.tenant, asked.request
        tale = asked.tale
        if not request.store:
            with self._deps.streams.poll():
                await self._runs.run_ephemeral(
                    request,
                    tenant=tenant,
                    principal=principal.name,
                    on_event=tale.feed,
                    deltas=False,
                )
                return tale.response()
            raise Unavailable("The server is going down.")
        run, _ = await self._runs.submit(
            request, tenant=tenant, principal=principal.name, idempotency=key
        )
        if asked.body.background:
            return await self.told(principal, RunId(run.id))
        with self._deps.streams.poll():
            async with self._runs.follow(tenant, RunId(run.id), 0) as follow:
                async for batch in follow.batches():
                    for event in batch:
                        tale.feed(event)
                    narrator = tale.narrator
                    if narrator is not None and narrator.waiting is not None:
                        break
                else:
                    if not follow.lagged:
                        return tale.response()
        return await self.told(principal, RunId(run.id))

    async def told(self, principal: Principal, run_id: RunId) -> JsonObject:
        """The stored response as it stands. Raises ``NotFound``."""
        run, request = await self._stored(principal, run_id)
        return told(run, request, await self._events(principal, run_id))

    async def _stored(self, principal: Principal, run_id: RunId) -> tuple[Run, RunRequest]:
        try:
            run, request = await self._runs.submitted(principal.tenant, run_id)
        except NotFound as error:
            raise names.no_response(names.response_id(run_id)) from error
        if not echo_of(request):
            raise names.no_response(names.response_id(run_id))
        return run, request

    async def _events(self, principal: Principal, run_id: RunId) -> list[StoredEvent]:
        found: list[StoredEvent] = []
        while True:
            after = found[-1].seq if found else 0
            page = await self._runs.events(principal.tenant, run_id, after or 0, PAGE)
            found += page
            if len(page) < PAGE:
                return found

    async def _previous(self, principal: Principal, response: str) -> RunId:
        run_id = names.run_of(response)
        run, request = await self._stored(principal, run_id)
        if not run.status.ended:
            raise refuse("previous_response_id", f"The response {response!r} has not ended.")
        if request.session_id is not None:
            raise refuse(
                "previous_response_id",
                f"The response {response!r} belongs to a conversation.",
                f"Give 'conversation': {request.session_id!r} instead.",
            )
        return run_id

    async def _item(self, principal: Principal, identity: str) -> JsonObject:
        run_id = names.run_of_item(identity)
        if run_id is not None:
            run, request = await self._stored(principal, run_id)
            output = told(run, request, await self._events(principal, run_id))["output"]
            for item in (*output, *input_items(run_id, request.input)):
                if item["id"] == identity:
                    return dict(item)
        raise NotFound(f"Item with id {identity[:100]!r} not found.")

    async def read(self, request: Request) -> Response:
        wanted = inputs.query(request, ResponseQuery)
        run_id = names.run_of(request.path_params["response_id"])
        principal = caller(request)
        if not wanted.stream:
            if wanted.starting_after is not None:
                raise refuse("starting_after", "'starting_after' needs 'stream=true'.")
            return Json(dumped(await self.told(principal, run_id)))
        _, asked = await self._stored(principal, run_id)
        after = -1 if wanted.starting_after is None else wanted.starting_after
        tale = Tale(echo_of(asked), events=True, live=False, last_only=False, after=after)
        follow = self._runs.follow(principal.tenant, run_id, 0)
        return TaleStream(self._deps.streams, follow, tale)

    async def delete(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        response = request.path_params["response_id"]
        run_id = names.run_of(response)
        principal = caller(request)
        await self._stored(principal, run_id)
        await self._runs.delete(principal.tenant, run_id)
        return Json(dumped({"id": response, "object": "response", "deleted": True}))

    async def cancel(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        run_id = names.run_of(request.path_params["response_id"])
        principal = caller(request)
        run, _ = await self._stored(principal, run_id)
        if run.status is not RunStatus.CANCELLED:
            try:
                await self._runs.cancel(principal.tenant, run_id, "cancelled by the client")
            except RunEnded as error:
                raise refuse(None, f"Cannot cancel a response that has ended: {run.id}.") from error
        return Json(dumped(await self.told(principal, run_id)))

    async def items(self, request: Request) -> Response:
        wanted = inputs.query(request, ItemsQuery)
        run_id = names.run_of(request.path_params["response_id"])
        _, asked = await self._stored(caller(request), run_id)
        found = input_items(run_id, asked.input if asked.agent else asked.goal or asked.variables)
        return Json(dumped(page(found, wanted.limit, wanted.order, wanted.after)))

    async def compact(self, request: Request) -> Response:
        """A summary by the agent's own model stands for the history from then on."""
        body = await read(request, CompactBody, self._deps.settings)
        principal = caller(request)
        asking.check_tier(body.service_tier)
        target = names.target(body.model)
        if target.kind != "agent":
            raise refuse("model", "Only an agent's model can compact a history.")

        async def lookup(item: str) -> JsonObject:
            return await self._item(principal, item)

        given = await read_input(body.input, lookup)
        if body.previous_response_id is not None:
            previous = await self._previous(principal, body.previous_response_id)
            given = [*await self._runs.conversation(principal.tenant, previous), *given]
        if not given:
            raise refuse("input", "There is nothing to compact.")
        told_to = f"{COMPACT}\n\n{body.instructions}" if body.instructions else COMPACT
        options = RunOptions(instructions=told_to, alone=True, echo={"model": body.model})
        wish = {"role": "user", "content": "Summarise our conversation now."}
        wanted = RunRequest(agent=target.name, input=[*given, wish], store=False, options=options)
        tale = Tale(options.echo, events=False, live=False, last_only=True)
        run = await self._runs.run_ephemeral(
            wanted,
            tenant=principal.tenant,
            principal=principal.name,
            on_event=tale.feed,
            deltas=False,
        )
        if run.error is not None:
            raise RunFailed(run.error)
        said = [item for item in input_items(run.id, given) if item.get("role") == "user"]
        item = {
            "id": names.item_id("cmp", run.id, 0),
            "type": "compaction",
            "encrypted_content": pack(str(run.output)),
        }
        return Json(
            dumped(
                {
                    "id": names.response_id(run.id),
                    "object": "response.compaction",
                    "created_at": int(run.created_at.timestamp()),
                    "output": [*said, item],
                    "usage": tale.response()["usage"],
                }
            )
        )


def conversation_id(given: str | JsonObject | None) -> str | None:
    if given is None:
        return None
    identity = given if isinstance(given, str) else given.get("id")
    if not isinstance(identity, str) or not names.is_conversation(identity):
        raise NotFound(f"Conversation with id {str(identity)[:100]!r} not found.")
    return identity


def page(items: list[JsonObject], limit: int, order: str, after: str | None) -> JsonObject:
    """A part of a list, in OpenAI's form."""
    ordered = items if order == "asc" else items[::-1]
    start = 0
    if after is not None:
        start = next((n + 1 for n, item in enumerate(ordered) if item["id"] == after), -1)
        if start < 0:
            raise refuse("after", f"There is no item {after[:100]!r} in this list.")
    found = ordered[start : start + limit]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else "",
        "last_id": found[-1]["id"] if found else "",
        "has_more": start + limit < len(ordered),
    }


def dumped(value: JsonObject) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _route(
    method: str, path: str, handler: Any, summary: str, name: str, stream: bool = False
) -> Route:
    return Route(
        method,
        path,
        handler,
        summary=summary,
        tag="openai",
        name="openai_" + name,
        description="As OpenAI's API has it; see docs/openai.md.",
        query=ResponseQuery if path.endswith("}") and method == "GET" else inputs.NoQuery,
        body=CreateResponse if path == PATH else None,
        answers={200: "application/json"},
        stream=stream,
        errors=(400, 404, 409, 413, 415, 429),
    )
