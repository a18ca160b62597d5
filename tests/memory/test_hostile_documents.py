"""A document that is made to be read for ever is refused in time, and holds nobody else up."""

import asyncio
import base64
import io
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfWriter
from pypdf.generic import DictionaryObject, NameObject, StreamObject

from agent_server.domain.errors import InvalidDocument
from agent_server.memory.apart import Apart
from agent_server.memory.documents import Documents
from tests.memory.kit import Home, home
from tests.memory.test_documents import pdf_of

PDF = "application/pdf"
MIB = 1 << 20


def slow_pdf(pages: int, words: int) -> bytes:
    """A small file whose pages all show the same long text."""
    writer = PdfWriter()
    names = {"Type": "Font", "Subtype": "Type1", "BaseFont": "Helvetica"}
    font = DictionaryObject({NameObject(f"/{k}"): NameObject(f"/{v}") for k, v in names.items()})
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    text = StreamObject()
    text._data = zlib.compress(b"BT /F1 12 Tf 20 200 Td (a) Tj ET\n" * words)
    text[NameObject("/Filter")] = NameObject("/FlateDecode")
    shown = writer._add_object(text)
    for _ in range(pages):
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        page[NameObject("/Contents")] = shown
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def sent(data: bytes) -> dict[str, Any]:
    content = base64.b64encode(data).decode()
    return {"kind": "document", "media_type": PDF, "content": content}


async def test_a_pdf_that_takes_for_ever_is_refused_and_others_are_answered_meanwhile(
    tmp_path: Path,
) -> None:
    hostile = slow_pdf(pages=500, words=20_000)
    assert len(hostile) < 200_000
    async with home(f"sqlite:///{tmp_path}/data/s.db", tmp_path, document_read_s=2.5) as server:
        reading = asyncio.create_task(server.call("POST", "/memories", sent(hostile), status=422))
        answered = 0
        while not reading.done():
            await server.call("GET", "/memories")
            answered += 1
        refused = await reading
        assert refused["code"] == "invalid_document", refused
        assert "longer than 2.5 s" in refused["detail"]
        assert "AGENT_SERVER_DOCUMENT_READ_S" in refused["hint"]
        assert answered > 20
        # Many of them share the time of one request.
        many = {"memories": [sent(slow_pdf(pages=1, words=5_000))] * 40}
        refused = await server.call("POST", "/memories", many, status=422)
        assert "longer than 2.5 s" in refused["detail"]
        await _reads(server)


async def _reads(server: Home) -> None:
    found = await server.call("POST", "/memories", sent(pdf_of("The kiln is hot")), status=201)
    assert "The kiln is hot" in found["content"]


async def test_a_pdf_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    hostile = slow_pdf(pages=1, words=2_000_000)
    assert len(hostile) < 400_000
    url = f"sqlite:///{tmp_path}/data/s.db"
    async with home(url, tmp_path, document_read_bytes=256 * MIB) as server:
        refused = await server.call("POST", "/memories", sent(hostile), status=422)
        assert refused["code"] == "invalid_document"
        assert "of memory" in refused["detail"], refused
        assert "AGENT_SERVER_DOCUMENT_READ_BYTES" in refused["hint"]
        await _reads(server)


async def test_two_are_read_at_a_time_and_others_wait_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_server.memory.desk.PATIENCE_S", 0.01)
    hostile = sent(slow_pdf(pages=500, words=20_000))
    async with home(f"sqlite:///{tmp_path}/data/s.db", tmp_path, document_read_s=3) as server:
        posts = [server.http.post("/api/v1/memories", json=hostile) for _ in range(4)]
        answers = await asyncio.gather(*posts)
        assert sorted(answer.status_code for answer in answers) == [422, 422, 503, 503]
        busy = next(answer.json() for answer in answers if answer.status_code == 503)
        assert "documents are being read" in busy["detail"]
        await _reads(server)


def test_what_is_read_apart_is_what_is_read_here() -> None:
    apart = Documents(apart=Apart(seconds=30, memory_bytes=1024 * MIB))
    for data in (pdf_of("Press start", "Wait"), pdf_of("x", password="secret"), b"no pdf"):
        outcomes: list[Any] = []
        for documents in (Documents(), apart):
            try:
                outcomes.append(documents.read(data, PDF, documents.deadline()))
            except InvalidDocument as error:
                outcomes.append((error.detail, error.hint))
        assert outcomes[0] == outcomes[1]


def test_a_reader_whose_server_was_killed_ends_by_itself() -> None:
    command = [sys.executable, "-m", "agent_server.memory.apart", PDF, str(1024 * MIB), "1"]
    left = subprocess.run(command, input=slow_pdf(pages=500, words=20_000), capture_output=True)
    assert left.returncode in (-signal.SIGXCPU, -signal.SIGKILL), left


def test_the_process_that_reads_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given what it needs to begin: a reader that is taken over finds no key."""
    monkeypatch.setenv("AGENT_SERVER_API_KEY", "key-of-the-house")
    seen: list[dict[str, str]] = []
    begin = subprocess.run

    def run(*args: Any, env: dict[str, str], **more: Any) -> Any:
        seen.append(env)
        return begin(*args, env=env, **more)

    monkeypatch.setattr("agent_server.memory.apart.subprocess.run", run)
    apart = Apart(seconds=30, memory_bytes=1024 * MIB)
    assert apart.read(pdf_of("Wait"), PDF, apart.deadline())
    assert set(seen[0]) <= {"PATH", "SYSTEMROOT", "PYTHONPATH"}
