"""Idempotency keys: a request that is sent again gets the answer it got, and happens once.

Leans on the store. The key is taken in the transaction that does what was asked, so that both
happen or neither. Refuses to know what that is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel
from sqlalchemy import Connection

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import AgentServerError, IdempotencyInFlight, IdempotencyMismatch
from agent_server.domain.ids import Tenant
from agent_server.execution import store
from agent_server.storage.database import Database

M = TypeVar("M", bound=BaseModel)


class Idempotency(NamedTuple):
    """A caller's key and the hash of what it sent with it."""

    key: str
    fingerprint: str


class Keyed:
    """A call with a key, if it has one; ``replayed`` once it was answered with what is stored."""

    def __init__(self, idempotency: Idempotency | None) -> None:
        self.idempotency = idempotency
        self.replayed = False


class KeyTaken(Exception):
    """Another request with the same key committed first."""


async def stored_answer(
    database: Database, tenant: Tenant, idempotency: Idempotency
) -> JsonObject | None:
    """What an equal request was answered. Raises ``IdempotencyMismatch`` for one that was not."""
    row = await database.read(lambda c: store.stored_key(c, tenant, idempotency.key))
    if row is None:
        return None
    if row.fingerprint != idempotency.fingerprint:
        raise IdempotencyMismatch(
            f"The Idempotency-Key {idempotency.key!r} was used with another body.",
            hint="Use a new key for a new request; send the same body to repeat one.",
        )
    return dict(row.response)


def keep_answer(
    connection: Connection,
    tenant: Tenant,
    idempotency: Idempotency | None,
    run_id: str,
    answer: JsonObject,
) -> None:
    """Store the answer under the caller's key, where it gave one. Raises ``KeyTaken``."""
    if idempotency is None:
        return
    values: dict[str, Any] = {
        "tenant": tenant,
        "key": idempotency.key,
        "fingerprint": idempotency.fingerprint,
        "run_id": run_id,
        "response": answer,
        "created_at": utcnow(),
    }
    if not store.take_key(connection, values):
        raise KeyTaken


def in_flight(idempotency: Idempotency) -> IdempotencyInFlight:
    """The answer to a request whose equal has neither ended nor failed."""
    return IdempotencyInFlight(
        f"Another request with the Idempotency-Key {idempotency.key!r} is under way.",
        hint="Send it again in a moment.",
    )


async def answered(
    database: Database,
    tenant: Tenant,
    keyed: Keyed | None,
    kind: type[M],
    run_of: Callable[[M], str],
    act: Callable[[Connection], M],
) -> M:
    """``act``'s answer, in a transaction; of equal requests with one key the first acts.

    Raises what ``act`` does, ``IdempotencyMismatch`` and ``IdempotencyInFlight``.
    """
    idempotency = keyed.idempotency if keyed is not None else None
    if keyed is None or idempotency is None:
        return await database.write(act)

    def transaction(connection: Connection) -> M:
        answer = act(connection)
        shown = answer.model_dump(mode="json")
        keep_answer(connection, tenant, idempotency, run_of(answer), shown)
        return answer

    known = await stored_answer(database, tenant, idempotency)
    if known is None:
        try:
            return await database.write(transaction)
        except (KeyTaken, AgentServerError) as error:
            # An equal request may just have done it, so that it cannot be done again.
            known = await stored_answer(database, tenant, idempotency)
            if known is None and isinstance(error, KeyTaken):
                raise in_flight(idempotency) from None
            if known is None:
                raise
    keyed.replayed = True
    return kind.model_validate(known)
