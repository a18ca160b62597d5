"""What every call meets at the door: ids, limits, problems, probes."""

import asyncio
import json

import pytest

from agent_server.domain.errors import DatabaseUnavailable
from tests.api.harness import LOOPBACK, Server, listening, settings

RUNS = "/api/v1/runs"
JSON = {"content-type": "application/json"}
FIELDS = {"type", "title", "status", "detail", "instance", "code", "request_id", "hint", "errors"}


@pytest.fixture
def server() -> Server:
    return Server(settings(max_body_bytes=2048))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/api/v1/runs/", 404, "not_found"),
        ("DELETE", RUNS, 405, "method_not_allowed"),
        ("POST", "/livez", 405, "method_not_allowed"),
        ("GET", f"{RUNS}?x=1", 422, "invalid_request"),
    ],
)
async def test_every_error_is_a_whole_problem(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    answer = await server.call(method, path)
    problem = answer.json()
    assert answer.status == status == problem["status"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(problem) == FIELDS
    assert problem["code"] == code
    assert problem["type"] == f"/docs/errors#{code}"
    assert problem["instance"] == path.partition("?")[0]
    assert problem["request_id"] == answer.headers["x-request-id"]


async def test_a_refused_method_is_told_which_are_allowed(server: Server) -> None:
    answer = await server.call("PUT", "/livez")
    assert answer.headers["allow"] == "GET"


async def test_an_unexpected_error_says_nothing_of_the_inside(server: Server) -> None:
    async def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret /etc/path")

    server.runs.get = broken  # type: ignore[method-assign, assignment]
    answer = await server.call("GET", f"{RUNS}/run_{'0' * 32}")
    assert (answer.status, answer.json()["code"]) == (500, "internal")
    assert b"secret" not in answer.body
    assert answer.headers["x-request-id"] in answer.json()["hint"]


async def test_a_request_id_is_taken_or_made(server: Server) -> None:
    taken = await server.call("GET", "/livez", headers={"X-Request-ID": "abc-1"})
    assert taken.headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, 'x"y', ""):
        made = await server.call("GET", "/livez", headers={"X-Request-ID": bad})
        assert made.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "line 1 column 1"),
        (b"hello", "line 1 column 1"),
        (b'{"goal": "g",}', "line 1 column 14"),
        (b'{"goal": "\xff"}', ""),
        (b'{"goal": "\\ud800"}', ""),
        (b'{"goal": "g", "context": {"x": NaN}}', "NaN"),
        (b'{"goal": "g", "context": {"x": -Infinity}}', "Infinity"),
        (b'{"goal": "g", "context": {"x": 1e400}}', "1e400"),
        (b'{"goal": "g", "context": {"x": ' + b"9" * 400 + b".0}}", "too large"),
        (b'{"goal": "g", "context": {"x": ' + b"9" * 5000 + b"}}", "number out of range"),
        (b"   ", "empty"),
    ],
)
async def test_what_is_not_json_is_malformed_with_its_place(body: bytes, said: str) -> None:
    server = Server(settings())
    answer = await server.call("POST", RUNS, body, JSON)
    assert (answer.status, answer.json()["code"]) == (400, "malformed_body")
    assert said in answer.json()["detail"]


@pytest.mark.parametrize("size", [70, 900])
@pytest.mark.parametrize("kind", ["lists", "objects", "mixed", "open"])
async def test_deep_json_is_refused(kind: str, size: int) -> None:
    server = Server(settings())
    made = {
        "lists": "[" * size + "]" * size,
        "objects": '{"a":' * (size // 3 + 43) + "1" + "}" * (size // 3 + 43),
        "mixed": '[{"a":' * (size // 6 + 22) + "1" + "}]" * (size // 6 + 22),
        "open": "[" * size,
    }[kind]
    body = b'{"goal": "g", "context": {"x": %b}}' % made.encode()
    answer = await server.call("POST", RUNS, body, JSON)
    assert (answer.status, answer.json()["code"]) == (400, "malformed_body")


async def test_brackets_in_texts_and_side_by_side_are_not_depth(server: Server) -> None:
    context = {"text": '[{"\\' * 100, "wide": [[] for _ in range(100)]}
    body = json.dumps({"goal": "g", "context": context}).encode()
    assert (await server.call("POST", RUNS, body, JSON)).status == 202


async def test_texts_that_look_like_unusual_numbers_are_texts(server: Server) -> None:
    body = {"goal": "NaN, Infinity and 1e400 are words here", "context": {"x": 1e300}}
    assert (await server.call("POST", RUNS, body)).status == 202


async def test_head_answers_what_get_would_without_a_body(server: Server) -> None:
    for path in ("/livez", "/readyz", "/api/v1/agents"):
        answer = await server.call("HEAD", path)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["content-length"] != "0"
    assert (await server.call("HEAD", "/nowhere")).status == 404


async def test_many_quotes_are_looked_at_once(server: Server) -> None:
    big = Server(settings())
    body = b'{"goal": "' + b'\\"[' * 300_000
    answer = await asyncio.wait_for(big.call("POST", RUNS, body, JSON), 5)
    assert answer.status == 400


@pytest.mark.parametrize(
    "content_type",
    ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", None],
)
async def test_only_json_is_read(server: Server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await server.call("POST", RUNS, b'{"goal": "g"}', headers)
    assert (answer.status, answer.json()["code"]) == (415, "unsupported_media_type")
    assert not server.runs.runs


async def test_a_large_body_is_refused_by_its_length_before_it_is_read(server: Server) -> None:
    answer = await server.call("POST", RUNS, b" " * 2049, JSON)
    assert (answer.status, answer.json()["code"]) == (413, "body_too_large")
    assert "AGENT_SERVER_MAX_BODY_BYTES" in answer.json()["hint"]


async def test_a_large_body_in_chunks_is_refused_when_it_grows_too_large(server: Server) -> None:
    answer = await server.call("POST", RUNS, [b" " * 1000] * 5, JSON)
    assert (answer.status, answer.json()["code"]) == (413, "body_too_large")
    fits = await server.call("POST", RUNS, [b'{"goal":', b'"g"}'], JSON)
    assert fits.status == 202


async def test_a_large_body_over_a_socket_is_answered_before_it_is_sent(server: Server) -> None:
    async with listening(server.app) as port:
        for frame in (b"Content-Length: 100000000\r\n", b"Transfer-Encoding: chunked\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Content-Type: application/json\r\n" + frame + b"\r\n"
            )
            if b"chunked" in frame:
                writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert b" 413 " in head
            writer.close()


async def test_a_body_that_does_not_come_is_408() -> None:
    slow = Server(settings(body_timeout_s=0.05))
    async with listening(slow.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        answer = await asyncio.wait_for(reader.read(), 5)
        assert b" 408 " in answer
        assert b"request_timeout" in answer
        writer.close()


async def test_the_probes_need_no_key_and_no_host() -> None:
    closed = Server(settings(api_key="correct-horse-battery"))
    stranger = ("203.0.113.5", 1)
    for path in ("/livez", "/readyz"):
        answer = await closed.call("GET", path, headers={"host": "evil.example"}, peer=stranger)
        assert (answer.status, answer.json()) == (200, {"status": "ok"})


async def test_not_ready_names_the_check_and_hides_the_reason() -> None:
    async def down() -> None:
        raise DatabaseUnavailable("postgresql://secret@db is gone")

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def fine() -> None:
        return None

    server = Server(
        settings(probe_timeout_s=0.05),
        checks={"database": down, "migrations": hangs, "other": fine},
    )
    answer = await server.call("GET", "/readyz")
    assert (answer.status, answer.json()["code"]) == (503, "unavailable")
    assert [field["path"] for field in answer.json()["errors"]] == ["database", "migrations"]
    assert b"secret" not in answer.body
    assert (await server.call("GET", "/livez")).status == 200


async def test_a_draining_server_is_not_ready_but_alive(server: Server) -> None:
    server.streams.drain()
    assert (await server.call("GET", "/readyz")).status == 503
    assert (await server.call("GET", "/livez")).status == 200


async def test_the_front_page_sends_browsers_to_the_docs(server: Server) -> None:
    browser = await server.call("GET", "/", headers={"accept": "text/html,*/*"})
    assert (browser.status, browser.headers["location"]) == (303, "/docs")
    program = await server.call("GET", "/", headers={"accept": "*/*"})
    assert program.json()["api"] == "/api/v1"


@pytest.mark.parametrize("path", ["/docs", "/docs/errors"])
async def test_pages_load_nothing_from_elsewhere(server: Server, path: str) -> None:
    answer = await server.call("GET", path)
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.body.decode()
    assert "http://" not in page
    assert "https://" not in page
    assert "src=" not in page
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


async def test_calls_are_counted_by_their_route_and_not_by_their_path(server: Server) -> None:
    await server.call("GET", f"{RUNS}/run_{'0' * 32}")
    await server.call("GET", "/nowhere/at/all")
    await server.call("GET", "/livez", peer=LOOPBACK)
    assert server.seen == [
        ("GET", "/api/v1/runs/{run_id}", 404),
        ("GET", "unmatched", 404),
        ("GET", "/livez", 200),
    ]
