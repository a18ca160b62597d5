"""The embedder that the settings name, through a served server: what words miss, vectors find."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from agent_server.memory import vector_index
from agent_server.storage import sqlite_driver
from tests.api.harness import listening

from .kit import Home, home

WHEELS = {"automobile", "car"}


def _vector(text: str) -> list[float]:
    about = {word.strip(".?").lower() for word in text.split()}
    return [1.0, 0.0] if about & WHEELS else [0.0, 1.0]


@dataclass
class Provider:
    """Of embeddings, as it is at the moment."""

    down: bool = False
    longer: int = 0
    """So many numbers more than before in each vector."""


def _embeddings(provider: Provider) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Any:
        if provider.down:
            return JSONResponse({"error": {"message": "later"}}, 503)
        texts = (await request.json())["input"]
        more = [0.0] * provider.longer
        return {"data": [{"index": i, "embedding": _vector(t) + more} for i, t in enumerate(texts)]}

    return app


@asynccontextmanager
async def embedded(url: str, folder: Path, provider: Provider) -> AsyncIterator[Home]:
    """A server whose embedder is ``provider``."""
    async with listening(_embeddings(provider)) as port:
        knobs = {"embedder": "openai", "embedder_base_url": f"http://127.0.0.1:{port}/v1"}
        async with home(url, folder, **knobs) as server:
            yield server


async def add(server: Home, content: str) -> None:
    await server.call("POST", "/memories", {"kind": "knowledge", "content": content}, status=201)


async def found(server: Home, query: str, **more: Any) -> list[str]:
    answer = await server.call("POST", "/memories/search", {"query": query, **more})
    return [one["memory"]["content"] for one in answer["data"]]


async def settled(server: Home) -> None:
    """Return when each memory has its vector."""
    with anyio.fail_after(20):
        while (await server.call("GET", "/memories/stats"))["waiting"]:
            pass


async def test_a_memory_is_found_by_the_vector_of_the_embedder_that_is_set(
    url: str, tmp_path: Path
) -> None:
    async with embedded(url, tmp_path, Provider()) as server:
        await add(server, "The automobile is red.")
        await add(server, "The garden is green.")
        await settled(server)
        assert await found(server, "car", limit=1) == ["The automobile is red."]
    async with home(url, tmp_path) as server:
        assert await found(server, "car") == [], "words alone do not find it"


async def test_while_the_embedder_is_down_writes_are_kept_and_found_by_words_and_vectors_follow(
    url: str, tmp_path: Path
) -> None:
    provider = Provider()
    async with embedded(url, tmp_path, provider) as server:
        await settled(server)
        provider.down = True
        await add(server, "The automobile is red.")
        assert (await server.call("GET", "/memories/stats"))["waiting"] == 1
        assert await found(server, "red automobile") == ["The automobile is red."]
        asked = {"query": "car", "mode": "vector"}
        refused = await server.call("POST", "/memories/search", asked, status=503)
        assert refused["code"] == "unavailable" and "`text` or `hybrid`" in refused["hint"]
        provider.down = False
        await settled(server)
        assert await found(server, "car", mode="vector") == ["The automobile is red."]


async def test_an_embedder_whose_vectors_change_their_length_is_said_and_words_still_answer(
    url: str, tmp_path: Path
) -> None:
    provider = Provider()
    async with embedded(url, tmp_path, provider) as server:
        await add(server, "The automobile is red.")
        await settled(server)
        provider.longer = 1
        await add(server, "The garden is green.")
        assert await found(server, "garden") == ["The garden is green."]
        asked = {"query": "lawn", "mode": "vector"}
        refused = await server.call("POST", "/memories/search", asked, status=503)
        assert "numbers, and memories have" in refused["detail"]
        assert (await server.call("GET", "/memories/stats"))["waiting"] == 1
    async with embedded(url, tmp_path, provider) as server:  # all are embedded anew
        await settled(server)
        assert await found(server, "lawn", mode="vector", limit=1) == ["The garden is green."]


async def test_a_python_that_cannot_search_vectors_says_why_and_goes_on_by_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an SQLite that loads extensions nor numpy."""

    def without(connection: Any) -> str:
        return "this Python's sqlite3 (3.x) cannot load extensions"

    for module in (sqlite_driver, vector_index):
        monkeypatch.setattr(module, "load_vector_functions", without)
    monkeypatch.setitem(sys.modules, "numpy", None)
    async with embedded(f"sqlite:///{tmp_path}/data/s.db", tmp_path, Provider()) as server:
        await add(server, "The automobile is red.")
        assert await found(server, "automobile") == ["The automobile is red."]
        asked = {"query": "car", "mode": "vector"}
        refused = await server.call("POST", "/memories/search", asked, status=503)
        for words in ("cannot load extensions", "numpy is not installed", "Install numpy"):
            assert words in refused["detail"]
        assert not refused["detail"].endswith("..")
