"""What turns text into vectors: any OpenAI-compatible ``/v1/embeddings``, or MiniLM in the process.

Leans on httpx2 and, for MiniLM, on ``memory.minilm``. Refuses to know what is embedded or where a
vector is kept. The default is no embedder at all: memories are then found by their text.
"""

import importlib
import math
from array import array
from collections.abc import Sequence
from typing import Protocol

import httpx2

from agent_server.domain.errors import ConfigurationError, Unavailable
from agent_server.domain.secrets import masked
from agent_server.settings import Settings

MINILM_MODEL = "all-MiniLM-L6-v2"
OPENAI_MODEL = "text-embedding-3-small"


class Embedder(Protocol):
    """Two implementations: ``OpenAIEmbedder`` and ``memory.minilm.MiniLM``."""

    provider: str
    model: str
    version: str
    """Changes when the same text gives another vector."""
    batch: int
    """So many texts are embedded in one call."""

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        """A vector for each: little-endian float32 of length 1.

        Raises ``Unavailable`` when it does not answer, and ``ConfigurationError`` when asking
        again cannot help.
        """

    async def close(self) -> None:
        """Let go of what it holds."""


def embedder_for(settings: Settings, provider: str, model: str | None) -> Embedder | None:
    """The embedder of ``provider`` (``none``, ``openai``, ``minilm``).

    Raises ``ConfigurationError`` when it cannot work here, and says what to install or set.
    """
    if provider == "none":
        return None
    if provider == "minilm":
        minilm = importlib.import_module("agent_server.memory.minilm")
        found: Embedder = minilm.MiniLM()
        return found
    key = settings.embedder_api_key or settings.openai_api_key
    return OpenAIEmbedder(
        base_url=settings.embedder_base_url or settings.openai_base_url or DEFAULT_BASE_URL,
        api_key=key.get_secret_value() if key is not None else None,
        model=model or OPENAI_MODEL,
        dimension=settings.embedder_dimension,
        timeout_s=settings.embedder_timeout_s,
    )


DEFAULT_BASE_URL = "https://api.openai.com/v1"
_REFUSED = frozenset({400, 401, 403, 404, 422})


class OpenAIEmbedder:
    """``POST {base_url}/embeddings``."""

    provider = "openai"
    version = "1"
    batch = 64

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str | None,
        model: str,
        dimension: int | None = None,
        timeout_s: float = 30.0,
        client: httpx2.AsyncClient | None = None,
    ) -> None:
        self.model = model
        self._dimension = dimension
        self._secrets = [api_key] if api_key else []
        self._url = base_url.rstrip("/") + "/embeddings"
        self._client = client or httpx2.AsyncClient(
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        body: dict[str, object] = {"model": self.model, "input": list(texts)}
        body["encoding_format"] = "float"
        if self._dimension is not None:
            body["dimensions"] = self._dimension
        try:
            answer = await self._client.post(self._url, json=body)
        except (httpx2.HTTPError, UnicodeError) as error:
            raise Unavailable(
                f"The embedder at {self._url} does not answer ({type(error).__name__}).",
                hint="Memories are kept, and get their vectors when it does.",
            ) from error
        if answer.status_code in _REFUSED:
            raise ConfigurationError(
                f"The embedder at {self._url} refused model {self.model!r} with "
                f"{answer.status_code}: {masked(answer.text, self._secrets)[:200]}",
                hint="Check AGENT_SERVER_EMBEDDER_MODEL, _EMBEDDER_BASE_URL and _EMBEDDER_API_KEY.",
            )
        try:
            answer.raise_for_status()
            data = sorted(answer.json()["data"], key=lambda one: one["index"])
            vectors = [unit(one["embedding"]) for one in data]
            if len(vectors) != len(texts):
                raise ValueError(f"{len(vectors)} vectors for {len(texts)} texts")
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(
                f"The embedder at {self._url} gave no vectors: {error}.",
                hint="Memories are kept, and get their vectors when it does.",
            ) from error
        return vectors

    async def close(self) -> None:
        await self._client.aclose()


def unit(values: Sequence[float]) -> bytes:
    """``values`` at length 1, as bytes. Raises ``ValueError`` for what is no direction."""
    length = math.hypot(*values)
    if not values or not math.isfinite(length) or length == 0:
        raise ValueError("a vector without a direction")
    return array("f", [value / length for value in values]).tobytes()
