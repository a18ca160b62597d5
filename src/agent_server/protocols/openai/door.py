"""All of OpenAI's routes together, with the manners of their door.

Leans on the rooms beside it. Refuses to make the parts they call.
"""

from agent_server.api.openapi import Route
from agent_server.protocols.openai.chat import ChatRoutes
from agent_server.protocols.openai.conversations import ConversationRoutes
from agent_server.protocols.openai.deps import OpenAIDeps
from agent_server.protocols.openai.embeddings import EmbeddingRoutes
from agent_server.protocols.openai.errors import OpenAIManners
from agent_server.protocols.openai.files import FileRoutes
from agent_server.protocols.openai.models import ModelRoutes
from agent_server.protocols.openai.responses import ResponseRoutes


class OpenAIDoor:
    """What ``server.py`` mounts."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps
        self.manners = OpenAIManners(deps.settings.max_file_bytes)

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
