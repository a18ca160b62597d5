"""``/v1/responses``: a run as a response, answered, streamed, in the background, continued.

Leans on the runs' port, on ``asking`` for what is asked and on ``tale`` for how it is told.
Refuses to know how a run is carried out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.ephemeral import EphemeralFollow
from agent_server.api.openapi import Route
from agent_server.auth.principal import Principal
from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.errors import RunEnded, Unavailable
from agent_server.domain.ids import RunId
from agent_server.domain.options import RunOptions
from agent_server.domain.runs import RunRequest, RunStatus
from agent_server.execution.ports import Fence, SignalReceived
from agent_server.execution.runs import Idempotency
from agent_server.inference.counting import InputCounted
from agent_server.protocols.openai import asking, names
from agent_server.protocols.openai.bodies import CompactBody, CountInput, CreateResponse
from agent_server.protocols.openai.consents import Consents, answers
from agent_server.protocols.openai.deps import OpenAIDeps, caller, query, read
from agent_server.protocols.openai.errors import RunFailed, refuse
from agent_server.protocols.openai.items import check_answered, input_items, pack
from agent_server.protocols.openai.lists import ItemsQuery, answer, page, route
from agent_server.protocols.openai.names import Ref
from agent_server.protocols.openai.stored import Stored
from agent_server.protocols.openai.tale import Tale, TaleStream, echo_of, in_form

PATH = "/v1/responses"
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


@dataclass(frozen=True)
class Asked:
    """A request, read: the run that answers it. ``going`` is one that is there already, and goes
    on with what people decided."""

    body: CreateResponse
    request: RunRequest
    going: Ref | None = None
    continues: RunId | None = None
    """The run whose words it is given."""
    given: Fence | None = None
    """Raises where other words that it is given were erased."""

    @property
    def tale(self) -> Tale:
        return self.told()

    def told(self, *, onward: bool = False) -> Tale:
        stream = bool(self.body.stream)
        return Tale(
            echo_of(self.request),
            events=stream,
            live=stream,
            last_only=in_form(self.request),
            part=self.going.part if self.going else 0,
            onward=onward,
        )


class ResponseRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self._runs = deps.runs
        self._stored = Stored(deps)
        self._consents = Consents(deps, self._stored)

    def routes(self) -> Sequence[Route]:
        one = PATH + "/{response_id}"
        return (
            route(
                "POST",
                PATH,
                self.create,
                "Create a response",
                "create_response",
                body=CreateResponse,
                stream=True,
            ),
            route(
                "POST",
                PATH + "/compact",
                self.compact,
                "Compact a history",
                "compact",
                body=CompactBody,
            ),
            route(
                "POST",
                PATH + "/input_tokens",
                self.count,
                "Count the tokens of an input",
                "count_input",
                body=CountInput,
            ),
            route(
                "GET",
                one,
                self.read,
                "Read or follow a response",
                "get_response",
                query=ResponseQuery,
                stream=True,
            ),
            route("DELETE", one, self.delete, "Delete a response", "delete_response"),
            route("POST", one + "/cancel", self.cancel, "Cancel a response", "cancel_response"),
            route(
                "GET",
                one + "/input_items",
                self.items,
                "List its input",
                "list_input_items",
                query=ItemsQuery,
            ),
        )

    async def create(self, request: Request) -> Response:
        raw = await request.body()
        body = await read(request, CreateResponse, self._deps.settings)
        principal = caller(request)
        key = inputs.idempotency(request.headers, "POST", PATH, raw)
        if key is not None and body.store is False:
            raise refuse("store", "An Idempotency-Key needs a response that is stored.")
        if body.stream:
            self._deps.streams.check_room(principal.name)
        asked = await self.asked(body, principal)
        if key is not None and asked.going is not None:
            raise refuse("input", "A consent counts once: leave out the Idempotency-Key.")
        if body.stream:
            follow = await self.follow(asked, principal, key)
            return TaleStream(self._deps.streams, principal.name, follow, asked.tale)
        return answer(await self.answer(asked, principal, key))

    async def asked(
        self,
        body: CreateResponse,
        principal: Principal,
        local: Sequence[JsonObject] | None = None,
        *,
        steerable: bool = False,
    ) -> Asked:
        """``body`` as a run, every name in it looked up. Raises what it refuses. ``local`` is the
        conversation that it continues where nothing stored is. With ``steerable``, an agent hears
        what is said into it meanwhile; in a conversation nothing may be.
        """
        asking.check(body)
        target = names.target(body.model)
        tenant = principal.tenant
        if answers(body.input):
            going, request = await self._consents.check(body, principal)
            return Asked(body, request, going)
        given = await self._stored.read(tenant, body.input)
        before, previous, upheld = [], None, None
        conversation = await self._stored.conversation(tenant, body.conversation)
        if local is not None:
            given = [*local, *given]
        elif body.previous_response_id is not None:
            previous = await self._stored.previous(tenant, body.previous_response_id)
            before = await self._runs.conversation(tenant, previous)
        elif conversation is not None:
            before = await self._deps.sessions.of(tenant).items(conversation)
            if target.kind != "agent":  # Others are given it at once.
                upheld = self._deps.sessions.of(tenant).upheld(conversation, before)
        if not given:
            raise refuse("input", "'input' is missing: a text, or a list of items.")
        check_answered(before, given)
        stored = body.store is not False
        if conversation is not None and not stored:
            raise refuse("store", "A conversation keeps what is said: leave out 'store'.")
        options = asking.options(
            body,
            self._deps.settings.openai_api,
            previous=previous if target.kind == "agent" else None,
            pieces=stored and bool(body.stream or body.background),
            steerable=steerable and target.kind == "agent" and conversation is None,
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
                subject=body.safety_identifier or body.user or None,
                metadata=body.metadata,
            ),
            continues=previous,
            given=upheld,
        )

    async def follow(
        self,
        asked: Asked,
        principal: Principal,
        key: Idempotency | None,
        steers: list[SignalReceived] | None = None,
    ) -> Any:
        """The events of the run, which begins: now if it is stored, else when it is entered.
        ``steers`` is where others put what they say into one that is not stored."""
        tenant = principal.tenant
        if not asked.request.store:
            return EphemeralFollow(self._runs, asked.request, tenant, principal.name, steers)
        return (await self._begin(asked, principal, key))[1]

    async def _begin(
        self, asked: Asked, principal: Principal, key: Idempotency | None, deltas: bool = True
    ) -> tuple[Ref, Any]:
        """Submit the run, or let the one that stands still go on; with its events."""
        tenant = principal.tenant
        if asked.going is not None:
            follow = self._runs.follow(tenant, asked.going.run_id, 0, deltas=deltas)
            await self._consents.settle(asked.body, asked.going, principal)
            return asked.going, follow
        made, begun = await self._runs.submit_followed(
            asked.request,
            tenant=tenant,
            principal=principal.name,
            idempotency=key,
            deltas=deltas,
            continues=asked.continues,
            given=asked.given,
        )
        return Ref(RunId(made.run.id)), begun

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
        ref, begun = await self._begin(asked, principal, key, deltas=False)
        if asked.body.background:
            return await self._stored.response(tenant, ref)
        with self._deps.streams.poll():
            async with begun as follow:
                async for batch in follow.batches():
                    for event in batch:
                        tale.feed(event)
                    narrator = tale.narrator
                    if tale.ended or (narrator is not None and narrator.waiting is not None):
                        break
                if tale.ended:
                    return tale.response()
        return await self._stored.response(tenant, ref)

    async def read(self, request: Request) -> Response:
        wanted = query(request, ResponseQuery)
        ref = names.ref_of(request.path_params["response_id"])
        run_id, part = ref
        tenant = caller(request).tenant
        if not wanted.stream:
            if wanted.starting_after is not None:
                raise refuse("starting_after", "'starting_after' needs 'stream=true'.")
            return answer(await self._stored.response(tenant, ref))
        _, asked = await self._stored.run(tenant, run_id)
        after = -1 if wanted.starting_after is None else wanted.starting_after
        if part and part >= await self._stored.parts(tenant, run_id):
            raise names.no_response(names.response_id(run_id, part))
        tale = Tale(echo_of(asked), events=True, live=False, after=after, part=part)
        follow = self._runs.follow(tenant, run_id, 0)
        return TaleStream(self._deps.streams, caller(request).name, follow, tale)

    async def delete(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        response = request.path_params["response_id"]
        run_id = names.ref_of(response).run_id
        tenant = caller(request).tenant
        await self._stored.run(tenant, run_id)
        await self._runs.delete(tenant, run_id)
        return answer({"id": response, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        ref = names.ref_of(request.path_params["response_id"])
        run_id, tenant = ref.run_id, caller(request).tenant
        run, _ = await self._stored.run(tenant, run_id)
        if run.status is not RunStatus.CANCELLED:
            try:
                await self._runs.cancel(tenant, run_id, "cancelled by the client")
            except RunEnded as error:
                raise refuse(None, f"Cannot cancel a response that has ended: {run.id}.") from error
        return answer(await self._stored.response(tenant, ref))

    async def items(self, request: Request) -> Response:
        wanted = query(request, ItemsQuery)
        ref = names.ref_of(request.path_params["response_id"])
        return answer(page(await self._stored.given(caller(request).tenant, ref), wanted))

    async def count(self, request: Request) -> Response:
        """The tokens of all that the agent's model would be asked first, of its own and of ours."""
        body = await read(request, CountInput, self._deps.settings)
        asking.refuse_given(body, "personality")
        if names.target(body.model).kind != "agent":
            raise refuse("model", "Only an agent's input can be counted: others ask several.")
        if answers(body.input):
            raise refuse("input", "A consent is no input of a model.")
        principal = caller(request)
        tenant = principal.tenant
        asking.check(CreateResponse(**body.model_dump(exclude={"personality"})))
        conversation = await self._stored.conversation(tenant, body.conversation)
        before = await self._deps.sessions.of(tenant).items(conversation) if conversation else None
        alone = body.model_dump(exclude={"personality", "conversation"})
        asked = await self.asked(CreateResponse(**alone, store=False), principal, before)
        options = asked.request.options
        assert options is not None
        run = await self._runs.run_ephemeral(
            asked.request.model_copy(
                update={"options": options.model_copy(update={"count": True})}
            ),
            tenant=tenant,
            principal=principal.name,
            deltas=False,
        )
        if run.error is not None and run.error.code != InputCounted.code:
            raise RunFailed(run.error)
        counted = {"object": "response.input_tokens", "input_tokens": run.usage.input_tokens}
        return answer(counted)

    async def compact(self, request: Request) -> Response:
        """A summary by the agent's own model stands for the history from then on."""
        body = await read(request, CompactBody, self._deps.settings)
        principal = caller(request)
        tenant = principal.tenant
        asking.check_tier(body.service_tier)
        asking.refuse_given(body, "image", *asking.CACHING)
        target = names.target(body.model)
        if target.kind != "agent":
            raise refuse("model", "Only an agent's model can compact a history.")

        given = await self._stored.read(tenant, body.input)
        if body.previous_response_id is not None:
            previous = await self._stored.previous(tenant, body.previous_response_id)
            given = [*await self._runs.conversation(tenant, previous), *given]
        if not given:
            raise refuse("input", "There is nothing to compact.")
        told_to = f"{COMPACT}\n\n{body.instructions}" if body.instructions else COMPACT
        options = RunOptions(instructions=told_to, alone=True, echo={"model": body.model})
        wish = {"role": "user", "content": "Summarise our conversation now."}
        wanted = RunRequest(agent=target.name, input=[*given, wish], store=False, options=options)
        tale = Tale(options.echo, events=False, live=False, last_only=True)
        run = await self._runs.run_ephemeral(
            wanted,
            tenant=tenant,
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
        return answer(
            {
                "id": names.response_id(run.id),
                "object": "response.compaction",
                "created_at": int(run.created_at.timestamp()),
                "output": [*said, item],
                "usage": tale.response()["usage"],
            }
        )
