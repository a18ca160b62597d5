"""``/v1/embeddings``: the memory's embedder, for any client."""

import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request

from tests.api.harness import listening
from tests.memory.kit import Home, home
from tests.openai_api.schemas import check

PATH = "/v1/embeddings"
MODEL = "text-embedding-3-small"


def _provider() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        texts = (await request.json())["input"]
        data = [{"index": n, "embedding": [3.0, 4.0, float(len(t))]} for n, t in enumerate(texts)]
        return {"data": data[::-1]}

    return app


@asynccontextmanager
async def embedding(tmp_path: Path) -> AsyncIterator[Home]:
    """A server whose embedder makes vectors of three numbers."""
    async with listening(_provider()) as port:
        knobs = {"embedder": "openai", "embedder_base_url": f"http://127.0.0.1:{port}/v1"}
        async with home(f"sqlite:///{tmp_path}/data/server.db", tmp_path, **knobs) as server:
            yield server


async def test_texts_become_vectors_as_numbers_and_in_base64(tmp_path: Path) -> None:
    async with embedding(tmp_path) as server:
        texts = [f"text number {n}" for n in range(70)]
        body = {"model": MODEL, "input": texts, "dimensions": 3}
        numbers = (await server.http.post(PATH, json=body)).json()
        check("CreateEmbeddingResponse", numbers)
        assert [one["index"] for one in numbers["data"]] == list(range(70))
        vector = numbers["data"][10]["embedding"]
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-6)
        assert vector[2] / vector[0] == pytest.approx(len(texts[10]) / 3, abs=1e-5)
        packed = (await server.http.post(PATH, json={**body, "encoding_format": "base64"})).json()
        found = struct.unpack("<3f", base64.b64decode(packed["data"][10]["embedding"]))
        assert list(found) == vector
        assert numbers["usage"]["prompt_tokens"] > 70
        models = (await server.http.get("/v1/models")).json()
        assert MODEL in {model["id"] for model in models["data"]}
        assert (await server.http.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"dimensions": 2}, 400, "dimensions"),
    ({"input": [1, 2, 3]}, 400, "input"),
    ({"input": [[1], [2]]}, 400, "input"),
    ({"input": []}, 400, "input"),
    ({"input": ["x", ""]}, 400, "input"),
    ({"input": ["x"] * 2_049}, 400, "input"),
    ({"model": "text-embedding-ada-002"}, 404, "model"),
    ({"encoding_format": "int8"}, 400, "encoding_format"),
    ({"wibble": 1}, 400, "wibble"),
]


async def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    async with embedding(tmp_path) as server:
        for change, status, param in REFUSED:
            answer = await server.http.post(PATH, json={"model": MODEL, "input": "x", **change})
            assert answer.status_code == status, answer.text
            check("ErrorResponse", answer.json())
            assert answer.json()["error"]["param"] == param


async def test_without_an_embedder_it_says_what_to_set(tmp_path: Path) -> None:
    async with home(f"sqlite:///{tmp_path}/data/server.db", tmp_path) as server:
        answer = await server.http.post(PATH, json={"model": MODEL, "input": "x"})
    assert answer.status_code == 404
    check("ErrorResponse", answer.json())
    assert "AGENT_SERVER_EMBEDDER" in answer.json()["error"]["message"]
