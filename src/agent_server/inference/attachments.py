"""Files that a conversation names by id, put in their place just before a model is asked; and links
that its provider would follow, looked at first.

Leans on whoever keeps files, through one function. Refuses to let their bytes into the ledger: what
is recorded of a call, and what its digest is made of, names the file.
"""

import base64
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from agent_server.domain.addresses import link_fault
from agent_server.domain.errors import InvalidRequest, NotFound
from agent_server.domain.files import StoredFile
from agent_server.domain.ids import Tenant
from agent_server.inference.models import ModelRequest

_KINDS: Final = ("input_image", "input_file")
_LINKS: Final = ("image_url", "file_url")


Fetch = Callable[[Tenant, str], Awaitable[tuple[StoredFile, bytes]]]
"""The file of that id, whole. Raises ``NotFound``."""


async def attach(request: ModelRequest, tenant: Tenant, fetch: Fetch | None) -> ModelRequest:
    """``request`` with the files it names by id. Raises ``InvalidRequest`` for one that is gone."""
    items = request.input
    if fetch is None or isinstance(items, str) or not any(map(_names_file, items)):
        return request
    filled: list[Any] = [await _filled(item, tenant, fetch) for item in items]
    return replace(request, input=filled)


def check_links(items: Any) -> None:
    """Raise ``InvalidRequest`` for an image or a file in ``items`` by a link into a network that is
    not public: the model's provider would fetch it from where it stands, which may be beside us."""
    for item in items if isinstance(items, list) else ():
        for part in _parts(item):
            for name in _LINKS if isinstance(part, dict) else ():
                link = part.get(name)
                link = link.get("url") if isinstance(link, dict) else link
                fault = link_fault(link) if isinstance(link, str) else None
                if fault is not None:
                    raise InvalidRequest(
                        f"The conversation links to {str(link)[:100]!r}, which no model is asked to fetch: "
                        f"{fault}.",
                        hint="Send the content itself, as a data: address or an uploaded file. "
                        "AGENT_SERVER_HTTP_ALLOW_PRIVATE=true allows links to private addresses.",
                    )


def _parts(item: Any) -> Sequence[Any]:
    found = (item.get("content") or item.get("output")) if isinstance(item, dict) else None
    return found if isinstance(found, list) else ()


def _is_named(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _KINDS and bool(part.get("file_id"))


def _names_file(item: Any) -> bool:
    return any(map(_is_named, _parts(item)))


async def _filled(item: Any, tenant: Tenant, fetch: Fetch) -> Any:
    if not _names_file(item):
        return item
    place = "content" if item.get("content") else "output"
    parts = [await _fill(part, tenant, fetch) if _is_named(part) else part for part in item[place]]
    return {**item, place: parts}


async def _fill(part: dict[str, Any], tenant: Tenant, fetch: Fetch) -> dict[str, Any]:
    rest = {name: value for name, value in part.items() if name != "file_id"}
    try:
        file, data = await fetch(tenant, part["file_id"])
    except NotFound as error:
        raise InvalidRequest(
            f"The conversation names the file {part['file_id']!r}, which is not there any more.",
            hint="Upload it again and name it anew, in a conversation without that message.",
        ) from error
    url = f"data:{file.media_type};base64,{base64.b64encode(data).decode()}"
    if part["type"] == "input_image":
        return {"detail": "auto", **rest, "image_url": url}
    return {"filename": file.filename, **rest, "file_data": url}
