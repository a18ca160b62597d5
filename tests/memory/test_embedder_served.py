"""The embedder that the settings name, through a served server: what words miss, vectors find."""

from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request

from tests.api.harness import listening

from .kit import home

WHEELS = {"automobile", "car"}


def _vector(text: str) -> list[float]:
    about = {word.strip(".?").lower() for word in text.split()}
    return [1.0, 0.0] if about & WHEELS else [0.0, 1.0]


def _embeddings() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        texts = (await request.json())["input"]
        data = [{"index": i, "embedding": _vector(text)} for i, text in enumerate(texts)]
        return {"data": data}

    return app


async def test_a_memory_is_found_by_the_vector_of_the_embedder_that_is_set(
    url: str, tmp_path: Path
) -> None:
    async with listening(_embeddings()) as port:
        knobs = {"embedder": "openai", "embedder_base_url": f"http://127.0.0.1:{port}/v1"}
        async with home(url, tmp_path, **knobs) as server:
            for content in ("The automobile is red.", "The garden is green."):
                body = {"kind": "knowledge", "content": content}
                answer = await server.http.post("/api/v1/memories", json=body)
                assert answer.status_code == 201, answer.text
            asked = {"query": "car", "limit": 1}
            with anyio.fail_after(20):
                while True:
                    answer = await server.http.post("/api/v1/memories/search", json=asked)
                    assert answer.status_code == 200, answer.text
                    found = answer.json()["data"]
                    if found and found[0]["matched"].get("vector"):
                        break
            assert found[0]["memory"]["content"] == "The automobile is red."
        async with home(url, tmp_path) as server:
            answer = await server.http.post("/api/v1/memories/search", json=asked)
            assert answer.json()["data"] == [], "words alone do not find it"
