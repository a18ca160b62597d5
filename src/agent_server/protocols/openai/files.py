"""``/v1/files``: uploads that messages name by id.

Leans on the store of files and on Starlette's reader of forms. Refuses purposes that nothing here
serves, and to answer a file as anything that a browser would show.
"""

import mimetypes
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Final

from fastapi import Request
from pydantic import Field
from starlette.datastructures import UploadFile as Upload
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from agent_server.api import inputs
from agent_server.api.openapi import Route
from agent_server.domain.base import Frozen, JsonObject, utcnow
from agent_server.domain.errors import BodyTooLarge, MalformedBody, NotFound
from agent_server.domain.files import StoredFile
from agent_server.protocols.openai.bodies import ExpiresAfter, UploadFile
from agent_server.protocols.openai.deps import OpenAIDeps, caller, query
from agent_server.protocols.openai.errors import FILES, refuse, unsupported
from agent_server.protocols.openai.lists import answer, envelope, route
from agent_server.storage.files import PART_BYTES

PURPOSES: Final = ("assistants", "vision", "user_data")
OTHERS: Final = ("batch", "fine-tune", "evals")
PLAIN: Final = "application/octet-stream"
_EXPIRES: Final = {"expires_after[anchor]": "anchor", "expires_after[seconds]": "seconds"}


class FilesQuery(Frozen):
    after: str | None = None
    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: str = Field(default="desc", pattern="^(asc|desc)$")
    purpose: str | None = None


class FileRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._files = deps.files
        self._most = deps.settings.max_file_bytes

    def routes(self) -> Sequence[Route]:
        one, form = FILES + "/{file_id}", "multipart/form-data"
        return (
            route(
                "POST",
                FILES,
                self.create,
                "Upload a file",
                "create_file",
                body=UploadFile,
                media=form,
            ),
            route("GET", FILES, self.list, "List files", "list_files", query=FilesQuery),
            route("GET", one, self.read, "Read what is known of a file", "get_file"),
            route(
                "GET",
                one + "/content",
                self.content,
                "Read a file",
                "get_file_content",
                answer=PLAIN,
            ),
            route("DELETE", one, self.delete, "Delete a file", "delete_file"),
        )

    async def create(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                unknown = set(form) - {"file", "purpose", *_EXPIRES}
                if unknown:
                    raise refuse(min(unknown), f"The form has no field {min(unknown)!r}.")
                file = form.get("file")
                if not isinstance(file, Upload):
                    raise refuse("file", "The form needs a 'file' with a file name.")
                purpose = _purpose(form.get("purpose"))
                after = _expiry({name: form[key] for key, name in _EXPIRES.items() if key in form})
                if (file.size or 0) > self._most:
                    raise BodyTooLarge(
                        f"The file is larger than {self._most:,} bytes.",
                        hint="Send less, or raise AGENT_SERVER_MAX_FILE_BYTES.",
                    )
                made = await self._files.add(
                    caller(request).tenant,
                    (file.filename or "file")[:500],
                    purpose,
                    _media_type(file),
                    _parts(file),
                    utcnow() + timedelta(seconds=after.seconds) if after else None,
                )
        except HTTPException as error:
            raise MalformedBody(f"The form cannot be read: {error.detail}.") from error
        return answer(_object(made))

    async def list(self, request: Request) -> Response:
        wanted = query(request, FilesQuery)
        tenant = caller(request).tenant
        behind = None
        if wanted.after is not None:
            try:
                behind = await self._files.get(tenant, wanted.after)
            except NotFound as error:
                raise refuse("after", f"There is no file {wanted.after[:100]!r}.") from error
        found, more = await self._files.page(
            tenant,
            purpose=wanted.purpose,
            behind=behind,
            newest=wanted.order == "desc",
            limit=wanted.limit,
        )
        return answer(envelope([_object(one) for one in found], more))

    async def read(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        return answer(_object(await self._named(request)))

    async def content(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        found = await self._named(request)
        headers = {
            "content-length": str(found.size),
            "content-disposition": "attachment",
            "content-security-policy": "sandbox",
        }
        parts = self._files.content(caller(request).tenant, found.id)
        return StreamingResponse(parts, headers=headers, media_type=PLAIN)

    async def delete(self, request: Request) -> Response:
        query(request, inputs.NoQuery)
        found = await self._named(request)
        await self._files.delete(caller(request).tenant, found.id)
        return answer({"id": found.id, "object": "file", "deleted": True})

    async def _named(self, request: Request) -> StoredFile:
        file_id = request.path_params["file_id"]
        try:
            return await self._files.get(caller(request).tenant, file_id)
        except NotFound as error:
            raise NotFound(f"File with id {file_id[:100]!r} not found.") from error


def _purpose(given: object) -> str:
    if given in OTHERS:
        raise unsupported("purpose", f"the purpose {given!r}", "Nothing here works on such files.")
    if not isinstance(given, str) or given not in PURPOSES:
        raise refuse("purpose", f"'purpose' must be one of {', '.join(PURPOSES)}.")
    return given


def _expiry(given: dict[str, object]) -> ExpiresAfter | None:
    try:
        return ExpiresAfter.model_validate(given) if given else None
    except ValueError as error:
        raise refuse(
            "expires_after", "'expires_after' needs the anchor 'created_at' and 3600 to 2592000 s."
        ) from error


def _media_type(file: Upload) -> str:
    """What the client says it is; by its name where the client says nothing of use."""
    said = (file.content_type or "").partition(";")[0].strip().lower()
    if said and said != PLAIN:
        return said[:100]
    return mimetypes.guess_type(file.filename or "")[0] or PLAIN


async def _parts(file: Upload) -> AsyncIterator[bytes]:
    while part := await file.read(PART_BYTES):
        yield part


def _object(file: StoredFile) -> JsonObject:
    shown: JsonObject = {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
    if file.expires_at is not None:
        shown["expires_at"] = int(file.expires_at.timestamp())
    return shown
