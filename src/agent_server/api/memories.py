"""The routes of memories: write, list, read, edit, delete, search, and erase a person.

Leans on ``MemoryDoor`` for all that happens. Refuses to show less than an agent would see: what a
search answers here is what ``recall`` gives to an agent.
"""

import re
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from fastapi import Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from agent_server.api import inputs
from agent_server.api.answers import Json, dump, dump_page
from agent_server.api.door import CALL, Call
from agent_server.api.openapi import Route
from agent_server.domain.base import Frozen
from agent_server.domain.errors import Conflict, InvalidRequest, NotFound, PreconditionFailed
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import (
    Memory,
    MemoryChange,
    MemoryFilter,
    MemoryKind,
    MemoryQuery,
    MemorySource,
    MemoryStats,
)
from agent_server.domain.memory_api import (
    ErasureReceipt,
    MemoriesWritten,
    MemoryBatch,
    MemoryDeleted,
    MemoryInput,
    MemoryList,
    MemoryUses,
    MemoryWrite,
    SearchAnswer,
)
from agent_server.execution.runs import Idempotency
from agent_server.memory.ports import Memories, Written
from agent_server.settings import Settings

PREFIX = "/api/v1/memories"


class Writer(Protocol):
    """Where memories are written, with the store for everything else."""

    store: Memories

    async def write(
        self,
        tenant: Tenant,
        inputs: Sequence[MemoryInput],
        *,
        source: MemorySource,
        idempotency: Idempotency | None = None,
    ) -> Written: ...


class Eraser(Protocol):
    async def erase(self, tenant: Tenant, subject: str) -> ErasureReceipt: ...


class MemoriesQuery(inputs.ListQuery):
    kind: MemoryKind | None = Field(default=None, description="Only of this kind.")
    namespace: str | None = Field(default=None, max_length=200, description="Only in this one.")
    key: str | None = Field(default=None, max_length=500, description="Only under this key.")
    session_id: str | None = Field(default=None, max_length=200, description="Only of this one.")
    subject: str | None = Field(default=None, max_length=200, description="Only about this person.")
    q: str | None = Field(
        default=None,
        max_length=1_000,
        description="Only those in which every word occurs; of a long document, in one of its pieces.",
    )
    part_of: str | None = Field(
        default=None, max_length=100, description="The pieces of this document."
    )
    run_id: str | None = Field(default=None, max_length=100, description="Written by this run.")
    replaced: bool = Field(
        default=False, description="Also versions that an edit or a newer memory replaced."
    )


class ExportQuery(Frozen):
    kind: MemoryKind | None = Field(default=None, description="Only of this kind.")
    namespace: str | None = Field(default=None, max_length=200, description="Only in this one.")
    session_id: str | None = Field(default=None, max_length=200, description="Only of this one.")
    subject: str | None = Field(default=None, max_length=200, description="Only about this person.")


class MemoryRoutes:
    """The handlers, bound to the desk of memories."""

    def __init__(self, desk: Writer, erasure: Eraser, settings: Settings) -> None:
        self._desk = desk
        self._store = desk.store
        self._erasure = erasure
        self._depth = settings.max_json_depth

    def routes(self) -> Sequence[Route]:
        one = PREFIX + "/{memory_id}"

        def route(method: str, path: str, handler: object, **more: object) -> Route:
            return Route(method, path, handler, tag="memories", **more)  # type: ignore[arg-type]  # as typed there

        writes = (400, 408, 409, 413, 415, 422)
        if_match = {"If-Match": "The `ETag` that was read: 412 if it is not the newest any more."}
        return (
            route(
                "POST",
                PREFIX,
                self.write,
                summary="Write memories",
                description='One memory, or `{"memories": […]}` of up to 1,000, all or none: then the '
                "answer has all of them as `data`, and in `new` how many were not there already. Of "
                "a document that is long, the whole and its pieces are kept.",
                name="create_memories",
                body=MemoryInput,
                answers={201: Memory},
                errors=writes,
                idempotent=True,
            ),
            route(
                "POST",
                PREFIX + "/search",
                self.search,
                summary="Search memories",
                description="What an agent would be given, with why: the part that text, vector "
                "and the rest have in each score.",
                name="search_memories",
                body=MemoryQuery,
                answers={200: SearchAnswer},
                errors=(*writes, 503),
            ),
            route(
                "GET",
                PREFIX,
                self.list,
                summary="List memories",
                description="Newest first. Pieces of documents only with `part_of`, in their order.",
                name="list_memories",
                query=MemoriesQuery,
                answers={200: MemoryList},
                errors=(422,),
            ),
            route(
                "GET",
                PREFIX + "/stats",
                self.stats,
                summary="Count memories",
                name="get_memory_stats",
                answers={200: MemoryStats},
                errors=(422,),
            ),
            route(
                "GET",
                PREFIX + "/export",
                self.export,
                summary="Export memories",
                description="One JSON object a line, oldest first; pieces of documents are left "
                "out, since an import cuts the whole again.",
                name="export_memories",
                query=ExportQuery,
                answers={200: "application/x-ndjson"},
                errors=(422,),
            ),
            route(
                "GET",
                one,
                self.read,
                summary="Read a memory",
                name="get_memory",
                answers={200: Memory},
                errors=(404, 422),
            ),
            route(
                "GET",
                one + "/history",
                self.history,
                summary="Read a memory's versions",
                description="Oldest first.",
                name="get_memory_history",
                answers={200: MemoryList},
                errors=(404, 422),
            ),
            route(
                "GET",
                one + "/uses",
                self.uses,
                summary="Which runs recalled a memory",
                description="Newest first, at most 100.",
                name="get_memory_uses",
                answers={200: MemoryUses},
                errors=(404, 422),
            ),
            route(
                "PATCH",
                one,
                self.edit,
                summary="Edit a memory",
                description="Makes a new version; the old one stays in the history.",
                name="edit_memory",
                body=MemoryChange,
                answers={200: Memory},
                errors=(*writes, 404, 412),
                headers=if_match,
            ),
            route(
                "DELETE",
                one,
                self.delete,
                summary="Delete a memory",
                description="With every version, piece and vector of it.",
                name="delete_memory",
                answers={200: MemoryDeleted},
                errors=(404, 412, 422),
                headers=if_match,
            ),
            route(
                "DELETE",
                "/api/v1/subjects/{subject:path}",
                self.erase,
                summary="Erase a person",
                description="Memories about them, runs about them with their sessions, and runs "
                "that wrote or recalled such a memory, in every table and index. Cannot be undone.",
                name="erase_subject",
                answers={200: ErasureReceipt},
                errors=(422,),
            ),
        )

    async def write(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        shape = inputs.parse(raw, MemoryWrite, max_depth=self._depth)
        many = shape.memories is not None
        if many:
            drafts = inputs.parse(raw, MemoryBatch, max_depth=self._depth).memories
        else:
            drafts = (inputs.parse(raw, MemoryInput, max_depth=self._depth),)
        call: Call = request.scope[CALL]
        done = await self._desk.write(
            call.principal.tenant,
            drafts,
            source=MemorySource(principal=call.principal.name),
            idempotency=inputs.idempotency(request.headers, "POST", PREFIX, raw),
        )
        written = done.memories
        headers = {"Idempotency-Replayed": "true"} if done.replayed else {}
        if many:
            return Json(dump(MemoriesWritten(data=tuple(written), new=done.new)), 201, headers)
        if not written:
            raise NotFound(
                "The memory that this Idempotency-Key wrote was deleted since.",
                hint="Use a new key to write it again.",
            )
        (memory,) = written
        return Json(
            dump(memory), 201, headers | {"Location": f"{PREFIX}/{memory.id}", **_tag(memory)}
        )

    async def search(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        asked = inputs.parse(await request.body(), MemoryQuery, max_depth=self._depth)
        found = await self._store.search(_tenant(request), asked)
        return Json(dump(SearchAnswer(data=tuple(found))))

    async def list(self, request: Request) -> Response:
        wanted = inputs.query(request, MemoriesQuery)
        filter = MemoryFilter(**wanted.model_dump(exclude={"limit", "cursor"}))
        page = await self._store.page(
            _tenant(request), filter, limit=wanted.limit, cursor=wanted.cursor
        )
        return Json(dump_page(map(dump, page.data), page.next_cursor))

    async def export(self, request: Request) -> Response:
        wanted = inputs.query(request, ExportQuery)
        found = self._store.export(_tenant(request), MemoryFilter(**wanted.model_dump()))

        async def lines() -> AsyncIterator[bytes]:
            async for memory in found:
                if memory.part_of is None:
                    yield dump(memory) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def stats(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(await self._store.stats(_tenant(request))))

    async def read(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        memory = await self._store.get(*_target(request))
        return Json(dump(memory), headers=_tag(memory))

    async def history(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(MemoryList(data=tuple(await self._store.history(*_target(request))))))

    async def uses(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(MemoryUses(data=tuple(await self._store.used_by(*_target(request))))))

    async def edit(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        change = inputs.parse(await request.body(), MemoryChange, max_depth=self._depth)
        call: Call = request.scope[CALL]
        held = await self._store.get(*_target(request))
        if "content" in change.model_fields_set and (held.part_of or not held.searchable):
            raise Conflict(
                f"{held.id} is {'a piece of ' if held.part_of else ''}a document that was cut into "
                "pieces, which an edit of its content would leave behind.",
                hint="Write the document again under its key; the old one is superseded.",
            )
        memory = await self._store.edit(
            *_target(request),
            change,
            source=MemorySource(principal=call.principal.name),
            expected_version=await self._expected(request),
        )
        return Json(dump(memory), headers=_tag(memory))

    async def delete(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        tenant, memory_id = _target(request)
        await self._store.get(tenant, memory_id)
        await self._store.delete(
            tenant, [memory_id], expected_version=await self._expected(request)
        )
        return Json(dump(MemoryDeleted(id=memory_id)))

    async def erase(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        subject = request.path_params["subject"]
        if not subject or len(subject) > 200 or "\0" in subject:
            raise InvalidRequest("A subject has 1 to 200 characters, none of them NUL.")
        return Json(dump(await self._erasure.erase(_tenant(request), subject)))

    async def _expected(self, request: Request) -> int | None:
        """The version that ``If-Match`` asks for; None where any will do. Raises
        ``PreconditionFailed`` for a tag that no version has."""
        given = request.headers.get("if-match")
        if given is None or given.strip() == "*":
            return None
        versions = [int(found) for found in _ETAG.findall(given)]
        if not versions:
            raise PreconditionFailed(
                f"If-Match {given[:60]!r} is no version of this memory.",
                hint="Send the ETag of GET, with its quotes.",
            )
        if len(versions) == 1:
            return versions[0]
        held = (await self._store.get(*_target(request))).version
        return held if held in versions else versions[0]


_ETAG = re.compile(r'"([0-9]{1,9})"')


def _tag(memory: Memory) -> dict[str, str]:
    return {"ETag": f'"{memory.version}"'}


def _tenant(request: Request) -> Tenant:
    call: Call = request.scope[CALL]
    return call.principal.tenant


def _target(request: Request) -> tuple[Tenant, str]:
    return _tenant(request), request.path_params["memory_id"]
