"""What the OpenAI doors are composed from, and what each of them does with a call first.

Leans on the ports of ``api``. Refuses to make a part: ``server.py`` does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeVar
from urllib.parse import parse_qsl, urlencode

from fastapi import Request
from pydantic import BaseModel

from agent_server.api import inputs
from agent_server.api.control import ControlPort
from agent_server.api.door import CALL, Call
from agent_server.api.ports import Catalog, RunsPort, WorkflowsPort
from agent_server.api.sse import Streams
from agent_server.auth.principal import Principal
from agent_server.memory.conversations import Conversations
from agent_server.memory.embedders import Embedder
from agent_server.memory.session_store import SessionStore
from agent_server.protocols.openai.errors import unsupported
from agent_server.settings import Settings
from agent_server.storage.files import Files

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class OpenAIDeps:
    settings: Settings
    runs: RunsPort
    control: ControlPort
    catalog: Catalog
    workflows: WorkflowsPort
    sessions: SessionStore
    conversations: Conversations
    files: Files
    embedder: Embedder | None
    streams: Streams


def caller(request: Request) -> Principal:
    call: Call = request.scope[CALL]
    return call.principal


def query(request: Request, model: type[M]) -> M:
    """The query parameters. ``include`` is a list there, and nothing here has more to show than
    it shows: its names are checked. Raises ``InvalidRequest``."""
    pairs = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    check_include([value for name, value in pairs if name in _INCLUDE])
    rest = urlencode([pair for pair in pairs if pair[0] not in _INCLUDE])
    return inputs.query(Request({**request.scope, "query_string": rest.encode()}), model)


def check_include(wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in INCLUDES:
            raise unsupported("include", f"'include' of {name!r}")


async def read(
    request: Request, model: type[M], settings: Settings, *, optional: bool = False
) -> M:
    """The body, held to its form; one that is ``optional`` may be empty. Raises ``MalformedBody``
    and ``InvalidRequest``."""
    raw = await request.body()
    query(request, inputs.NoQuery)
    if optional and not raw:
        raw = b"{}"
    body = inputs.parse(raw, model, max_depth=settings.max_json_depth)
    inputs.refuse_nul(body, raw)
    return body


_INCLUDE: Final = ("include", "include[]")
INCLUDES: Final = frozenset(
    {
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
"""What may be asked for besides: items show all that they have anyway."""
