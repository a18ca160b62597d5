"""What is stored, as OpenAI's API names it: responses, items, conversations, files by their ids.

Leans on the runs' port and on the stores. Refuses to know requests: each question names its tenant.
"""

from collections.abc import Sequence

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import NotFound
from agent_server.domain.ids import RunId, Tenant
from agent_server.domain.runs import Run, RunRequest
from agent_server.domain.sessions import SessionItem
from agent_server.execution.events import StoredEvent
from agent_server.protocols.openai import names
from agent_server.protocols.openai.deps import OpenAIDeps
from agent_server.protocols.openai.errors import refuse
from agent_server.protocols.openai.items import input_items, listed, media, prefix_of, read_input
from agent_server.protocols.openai.names import Ref
from agent_server.protocols.openai.tale import Tale, echo_of, told

PAGE = 500
LAST = 0xFFFF
"""A part that no run reaches."""


class Stored:
    """Each raises ``NotFound`` for what is not there, or is another tenant's."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self._runs = deps.runs

    async def run(self, tenant: Tenant, run_id: RunId) -> tuple[Run, RunRequest]:
        """The run of a response, and what was asked for."""
        try:
            run, request = await self._runs.submitted(tenant, run_id)
        except NotFound as error:
            raise names.no_response(names.response_id(run_id)) from error
        if not echo_of(request):
            raise names.no_response(names.response_id(run_id))
        return run, request

    async def response(self, tenant: Tenant, ref: Ref) -> JsonObject:
        """The response as it stands."""
        run, request = await self.run(tenant, ref.run_id)
        return told(run, request, await self._events(tenant, ref.run_id), ref.part)

    async def given(self, tenant: Tenant, ref: Ref) -> list[JsonObject]:
        """The input of a response, as a list of items: what was asked, or decided, or said into the
        run."""
        _, request = await self.run(tenant, ref.run_id)
        if not ref.part:
            asked = request.input if request.agent else request.goal or request.variables
            return input_items(ref.run_id, asked)
        tale = Tale({}, events=False, live=False, part=ref.part)
        for event in await self._events(tenant, ref.run_id):
            tale.feed(event)
        tale.response()
        return tale.decided

    async def parts(self, tenant: Tenant, run_id: RunId) -> int:
        """How many responses the run has become."""
        return (await self._read(tenant, run_id)).parts

    async def next_part(self, tenant: Tenant, run_id: RunId) -> int:
        """The response that a further consent belongs to: a new one, but for one that stands still
        because others were decided alone, in the inbox."""
        tale = await self._read(tenant, run_id)
        return tale.parts if tale.narrator is None else tale.parts - 1

    async def _read(self, tenant: Tenant, run_id: RunId) -> Tale:
        tale = Tale({}, events=False, live=False, part=LAST)
        for event in await self._events(tenant, run_id):
            tale.feed(event)
        return tale

    async def _events(self, tenant: Tenant, run_id: RunId) -> list[StoredEvent]:
        found: list[StoredEvent] = []
        while True:
            after = found[-1].seq if found else 0
            page = await self._runs.events(tenant, run_id, after or 0, PAGE)
            found += page
            if len(page) < PAGE:
                return found

    async def previous(self, tenant: Tenant, response: str) -> RunId:
        """The run that a response continues. Raises ``InvalidRequest`` for one that cannot be."""
        run_id, part = names.ref_of(response)
        run, request = await self.run(tenant, run_id)
        if not run.status.ended:
            hint = None
            if run.waiting_for is not None and run.waiting_for.kind == "approval":
                hint = "Answer what it asks with an 'mcp_approval_response'."
            raise refuse("previous_response_id", f"The response {response!r} has not ended.", hint)
        options = request.options
        if (
            part
            or (options is not None and options.steerable)
            or (await self._deps.control.approvals(tenant, run_id=run_id, limit=1)).data
        ):
            last = names.response_id(run_id, await self.parts(tenant, run_id) - 1)
            if last != response:
                raise refuse(
                    "previous_response_id",
                    f"The response {response!r} went on as another.",
                    f"Give {last!r}, where it ended.",
                )
        if request.session_id is not None:
            raise refuse(
                "previous_response_id",
                f"The response {response!r} belongs to a conversation.",
                f"Give 'conversation': {request.session_id!r} instead.",
            )
        return run_id

    async def read(
        self, tenant: Tenant, given: str | Sequence[JsonObject] | None, place: str = "input"
    ) -> list[JsonObject]:
        """Items that a client sent, for an agent, with what they refer to."""
        items = await read_input(given, lambda item: self.item(tenant, item), place)
        for where, part in media(items, place):
            if not part.get("file_id"):
                continue
            try:
                found = await self._deps.files.get(tenant, part["file_id"])
            except NotFound as error:
                raise refuse(where, f"File with id {part['file_id'][:100]!r} not found.") from error
            if part["type"] == "input_image" and not found.media_type.startswith("image/"):
                raise refuse(where, f"The file {found.id!r} is no image: {found.media_type}.")
        return items

    async def item(self, tenant: Tenant, identity: str) -> JsonObject:
        """The item of a response or a conversation."""
        run_id = names.run_of_item(identity)
        if run_id is not None:
            run, request = await self.run(tenant, run_id)
            events = await self._events(tenant, run_id)
            found = input_items(run_id, request.input)
            for part in range(await self.parts(tenant, run_id)):
                found += told(run, request, events, part)["output"]
                found += await self.given(tenant, Ref(run_id, part)) if part else []
            for item in found:
                if item["id"] == identity:
                    return item
        kept = names.conversation_of_item(identity)
        if kept is not None:
            try:
                item = shown(kept[0], await self._deps.conversations.item(tenant, *kept))
            except NotFound:
                item = {}
            if item.get("id") == identity:
                return item
        raise NotFound(f"Item with id {identity[:100]!r} not found.")

    async def conversation(self, tenant: Tenant, given: str | JsonObject | None) -> str | None:
        """The session that is meant by ``conversation`` in a body."""
        if given is None:
            return None
        identity = str(given if isinstance(given, str) else given.get("id"))
        try:
            if names.is_conversation(identity):
                return (await self._deps.sessions.get(tenant, identity)).id
        except NotFound:
            pass
        raise no_conversation(identity)


def shown(conversation: str, kept: SessionItem) -> JsonObject:
    """An item of a conversation, as its list has it."""
    identity = names.conversation_item_id(prefix_of(kept.item), conversation, kept.position)
    return listed(kept.item, identity)


def no_conversation(identity: str) -> NotFound:
    return NotFound(f"Conversation with id {identity[:100]!r} not found.")
