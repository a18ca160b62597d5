"""The guard: no address that is not public, by whatever spelling, name or detour (attack 10)."""

import asyncio
import ipaddress

import httpx2
import pytest

from agent_server.actions.ssrf import (
    AddressRefused,
    AddressUnreachable,
    AnswerTimeout,
    Gate,
    GuardedHttp,
    PinnedTransport,
)
from agent_server.domain.addresses import is_public
from agent_server.domain.errors import ToolError
from tests.actions.conftest import LocalServer

PUBLIC = "93.184.215.14"

NOT_PUBLIC = [
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "http://[2606:4700::5efe:127.0.0.1]/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://100.64.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://192.0.0.8/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://localhost/",
    "http://LOCALHOST/",
    "https://127.0.0.1:8443/",
]

NO_ADDRESS = [
    "ftp://93.184.215.14/",
    "file:///etc/passwd",
    "gopher://93.184.215.14/",
    "http://user:secret@93.184.215.14/",
    "http:///nothing",
    "http://[fe80::1%25eth0]/",
    "http://999.999.999.999/",
    "http://1.2.3.4.5.6/",
    "//93.184.215.14/",
    "not an address",
    "",
]


def saying(status: int, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(b"ok"))


class Recorder(httpx2.AsyncBaseTransport):
    """Stands in for the network: keeps what would have gone out."""

    def __init__(self, *answers: httpx2.Response) -> None:
        self.sent: list[httpx2.Request] = []
        self._answers = list(answers)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request)
        return self._answers.pop(0) if self._answers else saying(200)


class Rebinding:
    """A resolver whose answers change from call to call."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0)


async def loopback(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


@pytest.mark.parametrize("url", NOT_PUBLIC)
async def test_an_address_that_is_not_public_is_refused_in_every_spelling(url: str) -> None:
    network = Recorder()
    http = GuardedHttp(resolver=loopback, transport=network)
    with pytest.raises(AddressRefused):
        await http.request("GET", url)
    assert network.sent == []


@pytest.mark.parametrize("url", NO_ADDRESS)
async def test_what_is_no_plain_web_address_is_refused(url: str) -> None:
    network = Recorder()

    async def nothing(host: str, port: int) -> list[str]:
        raise OSError("not known")

    http = GuardedHttp(resolver=nothing, transport=network, allow_private=True)
    with pytest.raises(ToolError):
        await http.request("GET", url)
    assert network.sent == []


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses_are_let_through(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


async def test_one_private_answer_among_public_ones_is_refused() -> None:
    network = Recorder()
    http = GuardedHttp(resolver=Rebinding([PUBLIC, "10.0.0.1"]), transport=network)
    with pytest.raises(AddressRefused, match="10.0.0.1"):
        await http.request("GET", "http://mixed.example/")
    assert network.sent == []


async def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    network = Recorder()
    resolver = Rebinding([PUBLIC], ["127.0.0.1"])
    http = GuardedHttp(resolver=resolver, transport=network)
    await http.request("GET", "https://rebind.example:8443/path?q=1")
    assert resolver.asked == ["rebind.example"]
    (sent,) = network.sent
    assert sent.url.host == PUBLIC
    assert sent.url.port == 8443
    assert sent.headers["host"] == "rebind.example:8443"
    assert sent.extensions["sni_hostname"] == "rebind.example"


async def test_a_second_request_to_a_name_that_moved_is_refused() -> None:
    http = GuardedHttp(resolver=Rebinding([PUBLIC], ["127.0.0.1"]), transport=Recorder())
    await http.request("GET", "http://rebind.example/")
    with pytest.raises(AddressRefused):
        await http.request("GET", "http://rebind.example/")


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1/", "http://[::1]/", "//localhost/", "file:///etc/passwd"]
)
async def test_a_redirect_to_what_is_not_public_is_refused(location: str) -> None:
    network = Recorder(saying(302, location=location))

    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "localhost" else [PUBLIC]

    with pytest.raises(AddressRefused):
        await GuardedHttp(resolver=resolver, transport=network).request("GET", "http://a.example/")
    assert len(network.sent) == 1


async def test_a_redirect_to_another_origin_leaves_secrets_behind() -> None:
    network = Recorder(saying(307, location="http://b.example/x"))

    async def resolver(host: str, port: int) -> list[str]:
        return [PUBLIC]

    answer = await GuardedHttp(resolver=resolver, transport=network).request(
        "GET",
        "http://a.example/",
        headers={"Authorization": "Bearer s", "X-Api-Key": "s", "Accept": "text/plain"},
    )
    assert answer.status == 200
    first, second = network.sent
    assert first.headers["x-api-key"] == "s"
    assert "authorization" not in second.headers
    assert "x-api-key" not in second.headers
    assert second.headers["accept"] == "text/plain"
    assert second.headers["host"] == "b.example"


async def test_a_redirect_of_a_post_is_answered_and_not_followed() -> None:
    network = Recorder(saying(307, location="http://b.example/"))
    http = GuardedHttp(resolver=Rebinding([PUBLIC]), transport=network)
    answer = await http.request("POST", "http://a.example/", content=b"x")
    assert answer.status == 307


async def test_redirects_without_end_are_given_up(local_server: LocalServer) -> None:
    local_server.say(302, b"", location="/again")
    with pytest.raises(ToolError, match="redirects more than 5 times"):
        await GuardedHttp(allow_private=True).request("GET", local_server.url)
    assert len(local_server.seen) == 6


async def test_a_real_server_on_loopback_answers_when_private_is_allowed(
    local_server: LocalServer,
) -> None:
    local_server.say(200, {"ok": True})
    answer = await GuardedHttp(allow_private=True).request(
        "GET", f"http://localhost:{local_server.port}/x"
    )
    assert (answer.status, answer.body) == (200, b'{"ok": true}')
    assert local_server.seen[0].headers["host"] == f"localhost:{local_server.port}"


async def test_the_same_server_is_refused_by_default(local_server: LocalServer) -> None:
    local_server.say(200, {"ok": True})
    with pytest.raises(AddressRefused, match="not a public address"):
        await GuardedHttp().request("GET", local_server.url)
    assert local_server.seen == []


async def test_a_large_body_is_cut_off(local_server: LocalServer) -> None:
    local_server.say(200, b"x" * 5_000_000)
    answer = await GuardedHttp(allow_private=True).request("GET", local_server.url)
    assert answer.truncated
    assert len(answer.body) == 64 * 1024


async def test_a_closed_port_is_unreachable() -> None:
    with pytest.raises(AddressUnreachable):
        await GuardedHttp(allow_private=True).request("GET", "http://127.0.0.1:1/")


async def test_a_server_that_says_nothing_runs_into_the_time_limit() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises(AnswerTimeout, match="within 0.2 s"):
            await GuardedHttp(allow_private=True).request(
                "GET", f"http://127.0.0.1:{port}/", timeout_s=0.2
            )
    finally:
        server.close()


async def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    class OneDown(Recorder):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.host == PUBLIC:
                raise httpx2.ConnectError("refused")
            return await super().handle_async_request(request)

    network = OneDown()
    transport = PinnedTransport(Gate(resolver=Rebinding([PUBLIC, "8.8.8.8"])), network)
    async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
        assert (await client.get("http://two.example/")).status_code == 200
    assert [str(r.url.host) for r in network.sent] == ["8.8.8.8"]


async def test_a_secret_in_the_address_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ToolError) as caught:
        await GuardedHttp(allow_private=True).request(
            "GET", "http://u:hunter2@127.0.0.1:1/?k=hunter2"
        )
    assert "hunter2" not in str(caught.value)
