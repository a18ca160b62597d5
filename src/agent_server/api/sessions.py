"""The routes of sessions: list, read, look inside, delete.

Leans on ``SessionsPort``. Refuses to show a part of a conversation as if it were the whole.
"""

from collections.abc import Sequence
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump, dump_page
from agent_server.api.door import CALL, Call
from agent_server.api.openapi import Route
from agent_server.domain.base import Frozen
from agent_server.domain.ids import Tenant
from agent_server.domain.sessions import Session, SessionDeleted, SessionItem
from agent_server.execution.paging import Page

PREFIX = "/api/v1/sessions"


class SessionsPort(Protocol):
    """Sessions, as the door sees them. Unknown ids raise ``NotFound``."""

    async def list(self, tenant: Tenant, *, limit: int, cursor: str | None) -> Page[Session]: ...

    async def get(self, tenant: Tenant, session_id: str) -> Session: ...

    async def page(
        self, tenant: Tenant, session_id: str, *, after: int, limit: int
    ) -> Page[SessionItem]: ...

    async def delete(self, tenant: Tenant, session_id: str) -> SessionDeleted: ...


class SessionPage(Frozen):
    data: tuple[Session, ...]
    next_cursor: str | None = None


class SessionItemPage(Frozen):
    data: tuple[SessionItem, ...]
    next_cursor: str | None = None


class SessionRoutes:
    """The handlers, bound to the store of sessions."""

    def __init__(self, sessions: SessionsPort) -> None:
        self._sessions = sessions

    def routes(self) -> Sequence[Route]:
        one = PREFIX + "/{session_id:path}"
        return (
            Route(
                "GET",
                PREFIX,
                self.list,
                summary="List sessions",
                description="Newest first.",
                tag="sessions",
                name="list_sessions",
                query=inputs.ListQuery,
                answers={200: SessionPage},
                errors=(422,),
            ),
            Route(
                "GET",
                one + "/items",
                self.items,
                summary="Read a session's items",
                description="Messages, tool calls and their outputs, word for word, oldest first.",
                tag="sessions",
                name="list_session_items",
                query=inputs.ListQuery,
                answers={200: SessionItemPage},
                errors=(404, 422),
            ),
            Route(
                "GET",
                one,
                self.read,
                summary="Read a session",
                tag="sessions",
                name="get_session",
                answers={200: Session},
                errors=(404, 422),
            ),
            Route(
                "DELETE",
                one,
                self.delete,
                summary="Delete a session",
                description="With its items and the memories of what was said in it. 409 while a "
                "run works on it. The runs stay: `DELETE /api/v1/subjects/{subject}` erases those.",
                tag="sessions",
                name="delete_session",
                answers={200: SessionDeleted},
                errors=(404, 409, 422),
            ),
        )

    async def list(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.ListQuery)
        page = await self._sessions.list(_tenant(request), limit=wanted.limit, cursor=wanted.cursor)
        return Json(dump_page(map(dump, page.data), page.next_cursor))

    async def read(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(await self._sessions.get(*_target(request))))

    async def items(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.ListQuery)
        after = 0 if wanted.cursor is None else inputs.decode_cursor(wanted.cursor)
        page = await self._sessions.page(*_target(request), after=after, limit=wanted.limit)
        cursor = inputs.encode_cursor(int(page.next_cursor)) if page.next_cursor else None
        return Json(dump_page(map(dump, page.data), cursor))

    async def delete(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(await self._sessions.delete(*_target(request))))


def _tenant(request: Request) -> Tenant:
    call: Call = request.scope[CALL]
    return call.principal.tenant


def _target(request: Request) -> tuple[Tenant, str]:
    return _tenant(request), request.path_params["session_id"]
