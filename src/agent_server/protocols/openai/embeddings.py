"""``/v1/embeddings``: the embedder of the memory, for everybody.

Leans on the embedder that is configured. Refuses to stand one in for another.
"""

import base64
from array import array
from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from agent_server.api.openapi import Route
from agent_server.domain.errors import UnknownAgent
from agent_server.inference.estimate import tokens_of
from agent_server.memory.embedders import Embedder
from agent_server.protocols.openai.bodies import CreateEmbedding
from agent_server.protocols.openai.deps import OpenAIDeps, read
from agent_server.protocols.openai.errors import refuse, unsupported
from agent_server.protocols.openai.lists import answer, route

PATH = "/v1/embeddings"
MAX_INPUTS = 2_048


class EmbeddingRoutes:
    """The handler, bound to the parts it calls."""

    def __init__(self, deps: OpenAIDeps) -> None:
        self._deps = deps

    def routes(self) -> Sequence[Route]:
        return (
            route(
                "POST",
                PATH,
                self.create,
                "Turn texts into vectors",
                "create_embedding",
                body=CreateEmbedding,
                errors=(503,),
            ),
        )

    async def create(self, request: Request) -> Response:
        body = await read(request, CreateEmbedding, self._deps.settings)
        embedder = self._named(body.model)
        texts = _texts(body.input)
        vectors: list[bytes] = []
        for start in range(0, len(texts), embedder.batch):
            vectors += await embedder.embed(texts[start : start + embedder.batch])
        length = len(vectors[0]) // 4
        if body.dimensions is not None and body.dimensions != length:
            raise unsupported(
                "dimensions",
                f"{body.dimensions} dimensions",
                f"The vectors of {embedder.model!r} have {length}.",
            )
        # Nobody else counts them: an embedder tells no usage.
        tokens = sum(map(tokens_of, texts))
        plain = body.encoding_format == "base64"
        return answer(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": n, "embedding": _shown(vector, plain)}
                    for n, vector in enumerate(vectors)
                ],
                "model": body.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    def _named(self, model: str) -> Embedder:
        embedder = self._deps.embedder
        if embedder is None:
            raise UnknownAgent(
                f"The model {model[:200]!r} does not exist: no embedder is configured.",
                hint="Set AGENT_SERVER_EMBEDDER to minilm or openai.",
            )
        if model != embedder.model:
            raise UnknownAgent(
                f"The model {model[:200]!r} does not exist.",
                hint=f"The embedder here is {embedder.model!r}.",
            )
        return embedder


def _texts(given: str | Sequence[object]) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not 0 < len(texts) <= MAX_INPUTS:
        raise refuse("input", f"'input' takes 1 to {MAX_INPUTS} texts; these are {len(texts)}.")
    found: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise unsupported("input", "'input' as tokens", "Send texts.")
        if not text:
            raise refuse("input", "'input' holds an empty text.")
        found.append(text)
    return found


def _shown(vector: bytes, plain: bool) -> str | list[float]:
    """Little-endian float32, in base64 or as numbers."""
    return base64.b64encode(vector).decode() if plain else array("f", vector).tolist()
