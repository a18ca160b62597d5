"""Sessions as the API answers them: conversations that several runs share.

Leans on the domain's base. Refuses to know how an item looks inside: it is the SDK's.
"""

from datetime import datetime

from agent_server.domain.base import Frozen, JsonObject


class Session(Frozen):
    """A conversation. Its items are never shortened: what a model sees of them may be."""

    id: str
    item_count: int
    summary: str | None = None
    """What the server wrote of the oldest items, for models that cannot take all of them."""
    summarised_items: int = 0
    """How many of the oldest items that summary covers."""
    metadata: dict[str, str] = {}
    """What a client noted of it, by `/v1/conversations`."""
    created_at: datetime
    updated_at: datetime


class SessionItem(Frozen):
    """One item of a conversation: a message, a tool call, its output, …"""

    position: int
    """From 0; what was erased leaves a gap."""
    run_id: str
    """The run that said it; empty where a client added it."""
    item: JsonObject
    """As the SDK and the Responses API write it."""
    created_at: datetime


class SessionDeleted(Frozen):
    """What went with a session."""

    id: str
    items: int
    memories: int
