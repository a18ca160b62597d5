"""The ways a request can travel: TLS, a proxy, an answer without a length; and which model a name
means."""

import asyncio
import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any

import pytest
from agents import ModelSettings
from agents.testing import ScriptedModel
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent_server.domain.errors import ModelError, UnknownModel
from agent_server.inference.chat_model import ChatModel
from agent_server.inference.demo import DemoModel
from agent_server.inference.models import ModelRequest, respond
from agent_server.inference.openai_model import text_of
from agent_server.inference.providers import MAX_KEPT, Providers
from agent_server.inference.responses_model import ResponsesModel
from agent_server.inference.wire import Wire
from agent_server.settings import Settings
from tests.support.model_server import ModelServer

ASKED = ModelRequest(None, "Hello", ModelSettings(), [], None, [])
SAID = "Hello from the model server."


def certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "model server")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


async def test_a_server_is_reached_over_tls_and_its_certificate_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    async with ModelServer(tls=context) as server:
        with pytest.raises(ModelError, match="(?i)certificate"):
            await respond(ResponsesModel("m", Wire(server.base_url)), ASKED, None)
        assert server.calls == []
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        wire = Wire(server.base_url)
        for listener in (None, lambda text: None):
            assert text_of(await respond(ResponsesModel("m", wire), ASKED, listener)) == SAID
        await wire.aclose()


async def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ModelServer() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "")
        wire = Wire("http://models.invalid/v1", "k")
        for listener in (None, lambda text: None):
            assert text_of(await respond(ChatModel("m", wire), ASKED, listener)) == SAID
        assert proxy.targets[0].startswith("http://models.invalid/v1/chat/completions")
        proxy.default = {"fault": "half", "text": "a b c d e f"}
        with pytest.raises(ModelError, match="connection"):
            await respond(ChatModel("m", wire), ASKED, lambda text: None)
        await wire.aclose()


async def test_an_answer_that_ends_where_its_connection_ends_is_read() -> None:
    async with ModelServer(default={"fault": "unframed", "text": "All of it."}) as server:
        wire = Wire(server.base_url)
        for _ in range(2):
            assert text_of(await respond(ChatModel("m", wire), ASKED, None)) == "All of it."


async def test_a_query_in_the_base_url_is_kept() -> None:
    async with ModelServer() as server:
        await respond(ChatModel("m", Wire(server.base_url + "?api-version=1")), ASKED, None)
        assert server.targets == ["/v1/chat/completions?api-version=1"]


async def test_many_calls_at_once_share_the_provider() -> None:
    async with ModelServer(default={"text": "x", "latency_s": 0.01}) as server:
        model = ResponsesModel("m", Wire(server.base_url))
        found = await asyncio.gather(
            *(respond(model, ASKED, lambda text: None) for _ in range(100))
        )
        assert {text_of(answer) for answer in found} == {"x"}
        assert len(server.calls) == 100


def providers(**values: Any) -> Providers:
    return Providers(Settings(_env_file=None, **values))  # type: ignore[call-arg]


def test_a_name_means_the_configured_provider_unless_it_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AGENT_SERVER_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    bare = providers()
    assert isinstance(bare.get_model(None), DemoModel)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    local = providers(openai_api="chat_completions")
    chosen = local.get_model(None)
    assert isinstance(chosen, ChatModel) and chosen.model == "gpt-5.2"
    assert local.get_model(None) is chosen
    gateway = local.get_model("openai/gpt-oss")
    assert isinstance(gateway, ChatModel) and gateway.model == "openai/gpt-oss"
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    official = providers(model="gpt-x")
    stripped = official.get_model("openai/gpt-y")
    assert isinstance(stripped, ResponsesModel) and stripped.model == "gpt-y"
    described = official.describe()
    assert {"id": "gpt-x", "provider": "openai", "default": True} in described
    assert "sk-canary" not in repr(described)


def test_an_adapter_that_is_not_installed_says_what_to_install() -> None:
    for name in ("litellm/anthropic/claude-x", "any-llm/mistral/x"):
        with pytest.raises(UnknownModel) as caught:
            providers(model="demo").get_model(name)
        assert "pip install" in (caught.value.hint or "")


def test_a_registered_model_answers_to_its_name() -> None:
    known = providers(model="demo")
    scripted = ScriptedModel([])
    known.register("scripted", scripted)
    assert known.get_model("scripted") is scripted
    assert {"id": "scripted", "provider": "registered", "default": False} in known.describe()


def test_models_that_callers_name_are_not_kept_without_end() -> None:
    known = providers(model="demo")
    for number in range(2 * MAX_KEPT):
        assert known.get_model(f"m{number}") is known.get_model(f"m{number}")
    assert len(known._ready) == MAX_KEPT
    assert [entry["id"] for entry in known.describe()] == ["demo"]
