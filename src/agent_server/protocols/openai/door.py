"""All of OpenAI's routes together, with the manners of their door.

Leans on the rooms beside it. Refuses to make the parts they call.
"""

from collections.abc import Mapping

from agent_server.api.app import Socket
from agent_server.api.openapi import Route
from agent_server.protocols.openai.chat import ChatRoutes
from agent_server.protocols.openai.conversations import ConversationRoutes
from agent_server.protocols.openai.deps import OpenAIDeps
from agent_server.protocols.openai.embeddings import EmbeddingRoutes
from agent_server.protocols.openai.errors import OpenAIManners
from agent_server.protocols.openai.files import FileRoutes
from agent_server.protocols.openai.models import ModelRoutes
from agent_server.protocols.openai.responses import PATH as RESPONSES
from agent_server.protocols.openai.responses import ResponseRoutes
from agent_server.protocols.openai.socket import ResponseSocket


class OpenAIDoor:
    """What ``server.py`` mounts."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self.manners = OpenAIManners(deps.settings.max_file_bytes)

    def sockets(self) -> Mapping[str, Socket]:
        return {RESPONSES: ResponseSocket(self._deps).serve}

    def routes(self) -> list[Route]:
        rooms = (
            ModelRoutes,
            ResponseRoutes,
            ConversationRoutes,
            FileRoutes,
            EmbeddingRoutes,
            ChatRoutes,
        )
        return [route for room in rooms for route in room(self._deps).routes()]
