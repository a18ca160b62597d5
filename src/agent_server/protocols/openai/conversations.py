"""``/v1/conversations``: sessions as a client keeps them, with their items.

Leans on the store of sessions, which runs append to. Refuses to know how a run uses them.
"""

from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.openapi import Route
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import NotFound
from agent_server.domain.ids import Tenant, new_id
from agent_server.domain.sessions import Session
from agent_server.protocols.openai import asking, names
from agent_server.protocols.openai.bodies import (
    AddItems,
    CreateConversation,
    UpdateConversation,
)
from agent_server.protocols.openai.deps import OpenAIDeps, caller, query, read
from agent_server.protocols.openai.errors import refuse
from agent_server.protocols.openai.lists import ItemsQuery, answer, envelope, route
from agent_server.protocols.openai.stored import Stored, shown

PATH = "/v1/conversations"
MAX_ITEMS = 20


class ConversationRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self._kept = deps.conversations
        self._stored = Stored(deps)

    def routes(self) -> Sequence[Route]:
        one, items = PATH + "/{conversation_id}", PATH + "/{conversation_id}/items"
        item, make = items + "/{item_id}", CreateConversation
        return (
            route(
                "POST", PATH, self.create, "Make a conversation", "create_conversation", body=make
            ),
            route("GET", one, self.read, "Read a conversation", "get_conversation"),
            route(
                "POST", one, self.update, "Label it", "label_conversation", body=UpdateConversation
            ),
            route("DELETE", one, self.delete, "Delete it", "delete_conversation"),
            route("POST", items, self.add, "Add items to it", "add_items", body=AddItems),
            route("GET", items, self.items, "List its items", "list_items", query=ItemsQuery),
            route("GET", item, self.item, "Read an item", "get_item"),
            route("DELETE", item, self.cut, "Delete an item", "delete_item"),
        )

    async def create(self, request: Request) -> Response:
        body = await read(request, CreateConversation, self._deps.settings, optional=True)
        tenant = caller(request).tenant
        asking.check_metadata(body.metadata)
        items = await self._items(request, body.items or [])
        made = await self._kept.create(tenant, new_id("conv"), body.metadata or {}, items)
        return answer(_conversation(made))

    async def read(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        tenant, identity = await self._named(request)
        return answer(_conversation(await self._deps.sessions.get(tenant, identity)))

    async def update(self, request: Request) -> Response:
        body = await read(request, UpdateConversation, self._deps.settings)
        tenant, identity = await self._named(request)
        asking.check_metadata(body.metadata)
        return answer(_conversation(await self._kept.label(tenant, identity, body.metadata or {})))

    async def delete(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        tenant, identity = await self._named(request)
        await self._deps.sessions.delete(tenant, identity)
        return answer({"id": identity, "object": "conversation.deleted", "deleted": True})

    async def add(self, request: Request) -> Response:
        body = await read(request, AddItems, self._deps.settings)
        tenant, identity = await self._named(request)
        items = await self._items(request, body.items)
        added = await self._kept.add(tenant, identity, items)
        return answer(envelope([shown(identity, item) for item in added], False))

    async def items(self, request: Request) -> Response:
        wanted = query(request, ItemsQuery)
        tenant, identity = await self._named(request)
        behind = None
        if wanted.after is not None:
            place = names.conversation_of_item(wanted.after)
            if place is None or place[0] != identity:
                raise refuse("after", f"There is no item {wanted.after[:100]!r} in this list.")
            behind = place[1]
        newest = wanted.order == "desc"
        found, more = await self._kept.page(
            tenant, identity, behind=behind, newest=newest, limit=wanted.limit
        )
        return answer(envelope([shown(identity, item) for item in found], more))

    async def item(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        tenant, identity, item, _ = await self._at(request)
        return answer(await self._stored.item(tenant, item))

    async def cut(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        tenant, identity, item, position = await self._at(request)
        await self._stored.item(tenant, item)
        return answer(_conversation(await self._kept.cut(tenant, identity, position)))

    async def _items(self, request: Request, given: Sequence[JsonObject]) -> list[JsonObject]:
        if len(given) > MAX_ITEMS:
            raise refuse("items", f"At most {MAX_ITEMS} items at once; these are {len(given)}.")
        return await self._stored.read(caller(request).tenant, given, "items")

    async def _named(self, request: Request) -> tuple[Tenant, str]:
        tenant = caller(request).tenant
        found = await self._stored.conversation(tenant, request.path_params["conversation_id"])
        assert found is not None
        return tenant, found

    async def _at(self, request: Request) -> tuple[Tenant, str, str, int]:
        tenant, identity = await self._named(request)
        item: str = request.path_params["item_id"]
        place = names.conversation_of_item(item)
        if place is None or place[0] != identity:
            raise NotFound(f"Item with id {item[:100]!r} not found in conversation {identity!r}.")
        return tenant, identity, item, place[1]


def _conversation(session: Session) -> JsonObject:
    return {
        "id": session.id,
        "object": "conversation",
        "created_at": int(session.created_at.timestamp()),
        "metadata": session.metadata,
    }
