"""What the OpenAI doors are composed from, and what each of them does with a call first.

Leans on the ports of ``api``. Refuses to make a part: ``server.py`` does.
"""

from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from agent_server.api import inputs
from agent_server.api.door import CALL, Call
from agent_server.api.ports import Catalog, RunsPort, WorkflowsPort
from agent_server.api.sse import Streams
from agent_server.auth.principal import Principal
from agent_server.memory.session_store import SessionStore
from agent_server.settings import Settings

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class OpenAIDeps:
    settings: Settings
    runs: RunsPort
    catalog: Catalog
    workflows: WorkflowsPort
    sessions: SessionStore
    streams: Streams


def caller(request: Request) -> Principal:
    call: Call = request.scope[CALL]
    return call.principal


async def read(request: Request, model: type[M], settings: Settings) -> M:
    """The body, held to its form. Raises ``MalformedBody`` and ``InvalidRequest``."""
    raw = await request.body()
    inputs.query(request, inputs.NoQuery)
    body = inputs.parse(raw, model, max_depth=settings.max_json_depth)
    inputs.refuse_nul(body, raw)
    return body
