"""One client that uses a server as its callers do, and asks for the same of every way to serve.

Leans on the address alone. Refuses to know what stands behind it: one process, several, a proxy.
"""

import asyncio
import json
import re
import uuid
from typing import Any

import httpx2

AGENTS = """
import asyncio

from agents import Agent, function_tool


@function_tool
async def slow(word: str) -> str:
    \"\"\"Says the word, after a while.\"\"\"
    await asyncio.sleep(0.05)
    return word


clerk = Agent(name="Clerk", instructions="You help.", tools=[slow])
"""
LONG = {
    "name": "long",
    "nodes": [
        {
            "id": "each",
            "type": "map",
            "over": "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]",
            "as": "n",
            "max_parallel": 2,
            "nodes": [
                {"id": "say", "type": "tool", "tool": "slow", "arguments": {"word": "x{{ n }}"}}
            ],
        }
    ],
    "output": "{{ nodes.each.output }}",
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def check(url: str, key: str = "") -> None:
    """Everything that a caller may rely on; raises ``AssertionError``."""
    async with httpx2.AsyncClient(base_url=url, timeout=60, headers=bearer(key)) as client:
        await probes(client)
        await one_agent(client)
        await equal_requests_at_once(client)
        await errors(client)
        await cancelled(client)
        await resumed_streams(client)


async def probes(client: httpx2.AsyncClient) -> None:
    for path in ("/livez", "/readyz", "/openapi.json", "/metrics"):
        answer = await client.get(path)
        assert answer.status_code == 200, (path, answer.text)
    agents = (await client.get("/api/v1/agents")).json()["data"]
    assert [agent["name"] for agent in agents] == ["clerk"]


async def one_agent(client: httpx2.AsyncClient) -> None:
    body = {"agent": "clerk", "input": "Say hello."}
    answer = await client.post("/api/v1/runs?wait=30", json=body)
    assert answer.status_code == 200 and answer.json()["status"] == "succeeded", answer.text
    run = answer.json()
    assert run["output"] and run["usage"]["model_calls"] >= 1
    assert (await client.get(f"/api/v1/runs/{run['id']}")).json() == run
    listed = (await client.get("/api/v1/runs")).json()["data"]
    assert run["id"] in [entry["id"] for entry in listed]


async def equal_requests_at_once(client: httpx2.AsyncClient) -> None:
    body, headers = {"agent": "clerk", "input": "Once."}, {
        "Idempotency-Key": f"once-{uuid.uuid4()}"
    }
    answers = await asyncio.gather(
        *(client.post("/api/v1/runs", json=body, headers=headers) for _ in range(10))
    )
    assert all(answer.status_code in (202, 409) for answer in answers)
    assert len({a.json()["id"] for a in answers if a.status_code == 202}) == 1


async def errors(client: httpx2.AsyncClient) -> None:
    for method, path, status, code in (
        ("GET", "/api/v1/runs/run_none", 404, "not_found"),
        ("GET", "/api/v1/nothing", 404, "not_found"),
        ("DELETE", "/api/v1/runs", 405, "method_not_allowed"),
        ("POST", "/api/v1/runs", 422, "invalid_request"),
    ):
        answer = await client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == status, (method, path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == code


async def cancelled(client: httpx2.AsyncClient) -> None:
    body = {"workflow": LONG, "variables": {}}
    run_id = (await client.post("/api/v1/runs", json=body)).json()["id"]
    answer = await client.post(f"/api/v1/runs/{run_id}/cancel", json={})
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled", answer.text


async def resumed_streams(client: httpx2.AsyncClient) -> None:
    """A reader that is cut again and again, each time on a new connection, misses nothing."""
    run = await client.post("/api/v1/runs", json={"workflow": LONG, "variables": {}})
    path = f"/api/v1/runs/{run.json()['id']}/events"
    seen: list[int] = []
    connections = 0
    while not seen or seen[-1] >= 0:
        connections += 1
        assert connections < 200
        after = {k: v for k, v in client.headers.items() if k == "authorization"}
        after |= {"Last-Event-ID": str(seen[-1])} if seen else {}
        seen += await some(str(client.base_url).rstrip("/") + path, after, most=3)
    seen.pop()
    stored = (await client.get(path, headers={"Accept": "application/json"})).json()["data"]
    assert seen == [event["seq"] for event in stored] == list(range(1, len(stored) + 1))
    assert connections > 5
    final = (await client.get(f"/api/v1/runs/{run.json()['id']}")).json()
    assert final["status"] == "succeeded" and final["output"] == [f"x{n}" for n in range(1, 13)]


async def some(url: str, headers: dict[str, str], most: int) -> list[int]:
    """Up to ``most`` event numbers from a connection of its own, and -1 after the run's last."""
    numbers: list[int] = []
    async with httpx2.AsyncClient(timeout=60) as apart:
        async with apart.stream(
            "GET", url, headers={"Accept": "text/event-stream", **headers}
        ) as s:
            assert s.status_code == 200
            ours: Any = None
            async for line in s.aiter_lines():
                if found := re.fullmatch(r"id: (\d+)", line):
                    ours = int(found[1])
                elif line.startswith("data: ") and ours is not None:
                    event = json.loads(line[6:])
                    assert event["seq"] == ours
                    numbers.append(ours)
                    ours = None
                    if event["type"] in ("run.succeeded", "run.failed", "run.cancelled"):
                        return [*numbers, -1]
                    if len(numbers) == most:
                        return numbers
    return numbers
