"""Raw sockets that send headers or a body too slowly, or too much: what every front says to them.

Leans on the port and on ``LIMITS``. Refuses to know what stands behind it.
"""

import asyncio
import json

import anyio
import httpx2

START = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = (
    b"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"%bContent-Length: 100000\r\n\r\n"
)
LIMITS = {"AGENT_SERVER_HEADER_TIMEOUT_S": "1", "AGENT_SERVER_BODY_TIMEOUT_S": "1"}


async def check(port: int, key: str = "") -> None:
    """Raises ``AssertionError``. What is open all the while, longer than any limit, goes on."""
    post = POST % (f"Authorization: Bearer {key}\r\n" if key else "").encode()
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx2.AsyncClient(base_url=url, timeout=30, headers=headers) as beside:
        run = {"workflow": {"name": "w", "nodes": [{"id": "w", "type": "wait", "signal": "go"}]}}
        made = (await beside.post("/api/v1/runs", json=run)).json()["id"]
        path = f"/api/v1/runs/{made}/events"
        async with beside.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
            *slow, second, silent, empty, huge = await asyncio.gather(
                said_to(port, START),
                said_to(port, START, b"X"),
                said_to(port, START + b"X-Long: ", b"y"),
                said_to(port, post + b"{"),
                said_to(port, post + b"{", b" "),
                said_to(port, START + b"\r\n" + START, b"Z"),
                said_to(port, b""),
                said_to(port, b"\r\n", b"\r\n"),
                said_to(port, START + b"X-Huge: " + b"y" * 60_000, b"y" * 6_000),
            )
            assert all(is_problem(answer, 408, "request_timeout") for answer in slow)
            assert b"HEADER_TIMEOUT_S" in slow[0] and b"BODY_TIMEOUT_S" in slow[-1]
            first, _, rest = second.partition(b'{"status":"ok"}')
            assert first.startswith(b"HTTP/1.1 200 ") and is_problem(rest, 408, "request_timeout")
            assert (silent, empty) == (b"", b"")
            assert is_problem(huge, 431, "headers_too_large")
            answer = await beside.post(f"/api/v1/runs/{made}/signals/go", json={})
            assert answer.status_code == 202, answer.text
            assert "run.succeeded" in (await stream.aread()).decode()


async def said_to(port: int, first: bytes, drip: bytes = b"") -> bytes:
    """All that is answered to ``first`` and then ``drip`` again and again, until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    heard = b""
    try:
        with anyio.fail_after(20):
            while True:
                piece = None
                with anyio.move_on_after(0.02 if drip else 20):
                    piece = await reader.read(65536)
                if piece == b"":
                    return heard
                heard += piece or b""
                if piece is None:
                    writer.write(drip)
    except ConnectionError:
        return heard
    finally:
        writer.close()


def is_problem(answer: bytes, status: int, code: str) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    problem = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"application/problem+json" in head
    assert problem["request_id"].encode() in head and problem["hint"]
    return bool(problem["status"] == status and problem["code"] == code)
