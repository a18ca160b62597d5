"""Rules 1 and 2 of the attacks: who is let in, and which pages may make a browser call."""

from typing import Any

import pytest

from agent_server.api.app import build_app
from agent_server.auth.gate import Gate, require_safe
from agent_server.auth.hosts import is_loopback, split_host
from agent_server.domain.errors import ConfigurationError
from tests.api.harness import KEY, LOOPBACK, Server, settings

RUNS = "/api/v1/runs"
LAN = ("192.168.1.5", 1)
PROBES = {"/livez", "/readyz"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


def every_route() -> list[tuple[str, str]]:
    app = Server(settings()).app
    assert build_app is not None
    return [
        (method, route.path.replace("{run_id}", "run_" + "0" * 32).replace("{name}", "clerk"))
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or ())
    ]


ROUTES = every_route()


def test_there_are_routes_to_walk() -> None:
    assert len(ROUTES) > 15


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("api_key", [None, KEY])
async def test_a_stranger_gets_401_on_all_but_the_probes(
    method: str, path: str, api_key: str | None
) -> None:
    server = Server(settings(api_key=api_key))
    answer = await server.call(method, path, peer=LAN)
    if path in PROBES:
        assert answer.status == 200
    else:
        assert (answer.status, answer.json()["code"]) == (401, "unauthorized")
        assert "AGENT_SERVER_API_KEY" in answer.json()["hint"] or api_key
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_with_a_key_set_this_machine_needs_it_too(method: str, path: str) -> None:
    server = Server(settings(api_key=KEY))
    expected = 200 if path in PROBES else 401
    assert (await server.call(method, path)).status == expected


async def test_an_unknown_path_tells_a_stranger_nothing() -> None:
    assert (await Server(settings()).call("GET", "/secret", peer=LAN)).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
    ],
)
async def test_the_key_lets_anybody_in_from_anywhere(headers: dict[str, str]) -> None:
    for env in ("development", "production"):
        server = Server(settings(api_key=KEY, env=env))
        proxied = headers | {"x-forwarded-for": "203.0.113.9"}
        assert (await server.call("GET", RUNS, headers=proxied, peer=LAN)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong-key-here"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": KEY},
        {"authorization": "Bearer "},
        {"x-api-key": ""},
        {"x-api-key": "é"},
        {"cookie": f"api_key={KEY}"},
    ],
)
async def test_a_key_that_does_not_fit_lets_nobody_in(headers: dict[str, str]) -> None:
    server = Server(settings(api_key=KEY))
    assert (await server.call("GET", RUNS, headers=headers)).status == 401
    assert (await server.call("GET", f"{RUNS}?api_key={KEY}")).status == 401


@pytest.mark.parametrize(
    "header",
    [
        "forwarded",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded",
        "x-real-ip",
        "true-client-ip",
        "cf-connecting-ip",
    ],
)
async def test_behind_a_proxy_nobody_is_anonymous(header: str) -> None:
    answer = await Server(settings()).call("GET", RUNS, headers={header: "127.0.0.1"})
    assert answer.status == 401
    assert header in answer.json()["detail"]


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        (("127.0.0.1", 1), 200),
        (("127.8.8.8", 1), 200),
        (("::1", 1), 200),
        (("::ffff:127.0.0.1", 1), 200),
        (("::ffff:10.0.0.1", 1), 401),
        (("10.0.0.1", 1), 401),
        (("0.0.0.0", 1), 401),
        (("172.17.0.1", 1), 401),
        (("localhost", 1), 401),
        (("", 1), 401),
        (None, 401),
    ],
)
async def test_only_this_machine_is_anonymous(peer: tuple[str, int] | None, status: int) -> None:
    assert (await Server(settings()).call("GET", RUNS, peer=peer)).status == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST.:8000", 200),
        ("app.localhost", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("evil.example", 401),
        ("evil.example:8000", 401),
        ("127.0.0.1.evil.example", 401),
        ("localhost.evil.example", 401),
        ("localhost@evil.example", 401),
        ("evil.example#localhost", 401),
        ("evil.example/localhost", 401),
        ("2130706433", 401),
        ("0x7f.1", 401),
        ("0.0.0.0:8000", 401),
        ("192.168.1.5:8000", 401),
        ("localhost:x", 401),
        ("", 401),
    ],
)
async def test_a_rebound_name_is_not_this_machine(host: str, status: int) -> None:
    assert (await Server(settings()).call("GET", RUNS, headers={"host": host})).status == status


@pytest.mark.parametrize(
    ("values", "host", "status"),
    [
        ({"allowed_hosts": "box.lan, other.lan"}, "box.lan:8000", 200),
        ({"allowed_hosts": "box.lan"}, "third.lan", 401),
        ({"allowed_hosts": "*"}, "anything.example", 200),
        ({"host": "192.168.1.5"}, "192.168.1.5:8000", 200),
        ({"host": "0.0.0.0"}, "0.0.0.0:8000", 401),
    ],
)
async def test_hosts_that_the_operator_names_are_this_machine(
    values: dict[str, Any], host: str, status: int
) -> None:
    server = Server(settings(**values))
    assert (await server.call("GET", RUNS, headers={"host": host})).status == status


@pytest.mark.parametrize(
    ("values", "host", "status"),
    [
        ({}, "evil.example", 403),
        ({}, "192.168.1.5:8000", 200),
        ({"env": "production"}, "agents.example", 200),
        ({"env": "production", "allowed_hosts": "agents.example"}, "agents.example", 200),
        ({"env": "production", "allowed_hosts": "agents.example"}, "evil.example", 403),
    ],
)
async def test_hosts_are_checked_for_holders_of_the_key_too(
    values: dict[str, Any], host: str, status: int
) -> None:
    server = Server(settings(api_key=KEY, **values))
    headers = {"host": host, "x-api-key": KEY}
    assert (await server.call("GET", RUNS, headers=headers)).status == status


async def test_production_without_a_key_answers_nobody_and_does_not_start() -> None:
    with pytest.raises(ConfigurationError) as refused:
        require_safe(settings(env="production"))
    assert "AGENT_SERVER_API_KEY" in refused.value.detail
    require_safe(settings(env="production", api_key=KEY))
    require_safe(settings())
    assert (await Server(settings(env="production")).call("GET", RUNS)).status == 401


# Pages of other sites


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("https://127.0.0.1:8000", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1:3000", 403),
        ("http://localhost:8000", 403),
        ("http://127.0.0.1", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
        ("chrome-extension://abc", 403),
        ("http://127.0.0.1:8000@evil.example", 403),
    ],
)
async def test_a_page_of_another_origin_is_refused(origin: str, status: int) -> None:
    for server, headers in (
        (Server(settings()), {}),
        (Server(settings(api_key=KEY)), {"x-api-key": KEY}),
    ):
        answer = await server.call("GET", RUNS, headers=headers | {"origin": origin})
        assert answer.status == status
        assert "access-control-allow-origin" not in answer.headers


async def test_what_another_site_makes_a_browser_send_is_refused() -> None:
    server = Server(settings())
    cross = {"sec-fetch-site": "cross-site"}
    body = {"agent": "clerk", "input": "x"}
    assert (await server.call("POST", RUNS, body, headers=cross)).status == 403
    assert (await server.call("GET", RUNS, headers=cross)).status == 403
    embedded = cross | {"sec-fetch-mode": "no-cors"}
    assert (await server.call("GET", RUNS, headers=embedded)).status == 403
    link = cross | {"sec-fetch-mode": "navigate"}
    assert (await server.call("GET", "/docs", headers=link)).status == 200
    assert (await server.call("POST", RUNS, b"a=b", headers=link | FORM)).status == 403
    assert (await server.call("GET", RUNS, headers={"sec-fetch-site": "same-origin"})).status == 200
    assert not server.runs.runs


@pytest.mark.parametrize("body", [b"goal=x", b""])
async def test_a_form_post_starts_nothing(body: bytes) -> None:
    server = Server(settings())
    answer = await server.call("POST", RUNS, body, headers=FORM)
    assert answer.status == 415
    text = await server.call("POST", RUNS, b'{"goal":"x"}', headers={"content-type": "text/plain"})
    assert text.status == 415
    assert not server.runs.runs


async def test_a_preflight_of_another_origin_gets_no_leave() -> None:
    server = Server(settings())
    answer = await server.call(
        "OPTIONS",
        RUNS,
        headers={"origin": "http://evil.example", "access-control-request-method": "POST"},
    )
    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_an_allowed_origin_may_call_and_read() -> None:
    origin = "https://app.example"
    server = Server(settings(api_key=KEY, allowed_origins=f"{origin}/, https://b.example"))
    preflight = await server.call(
        "OPTIONS",
        RUNS,
        headers={"origin": origin, "access-control-request-method": "POST"},
        peer=LAN,
    )
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    called = await server.call("GET", RUNS, headers={"origin": origin, "x-api-key": KEY}, peer=LAN)
    assert (called.status, called.headers["vary"]) == (200, "Origin")
    keyless = await server.call("GET", RUNS, headers={"origin": origin}, peer=LAN)
    assert keyless.status == 401


async def test_a_websocket_is_closed_at_the_door() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/", "headers": [], "client": LOOPBACK}
    await Server(settings()).app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_key_is_kept_as_a_hash_and_shown_nowhere() -> None:
    gate = Gate(settings(api_key=KEY))
    assert KEY not in repr(vars(gate))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_addresses_are_known(address: str) -> None:
    assert is_loopback(address)


def test_a_host_with_anything_more_is_no_host() -> None:
    assert split_host("a.example:80") == ("a.example", "80")
    for value in ("a/b", "a?b", "a#b", "u@a", "a:b", "[::1", ":80", "a:99999"):
        assert split_host(value) is None
