"""What is exported is imported as it was: everything that a memory says, and where it stands."""

import base64
import json
import os
import pwd
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_server.cli.memory_import import (
    FORMAT,
    _import_memories,
    _json,
    _memory,
    _write_lines,
    _write_readable,
    files_in,
)
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.ids import Tenant, new_id
from agent_server.domain.memories import KINDS, MemoryChange, MemoryFilter, MemorySource
from agent_server.domain.memory_api import MemoryInput
from agent_server.memory.desk import MemoryDesk
from agent_server.memory.documents import Documents
from agent_server.memory.store import MemoryStore
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from tests.memory.kit import Home, home
from tests.memory.test_documents import pdf_of

Json = dict[str, Any]
ANEW = ("version", "updated_at", "source", "supersedes")
"""What an import says itself: it makes a first version, and who imports is who wrote it here."""
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
)
SAID = TEXT.filter(lambda text: bool(text.strip()))
VALUES = st.recursive(st.booleans() | st.integers(-9, 9) | TEXT, st.lists, max_leaves=4)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone.utc))
MEMORIES = st.builds(
    dict,
    kind=st.sampled_from([kind for kind in KINDS if kind != "document"]),
    content=SAID | st.lists(VALUES, max_size=3) | st.dictionaries(TEXT, VALUES, max_size=3),
    namespace=st.sampled_from(["default", "höhle", "a/b"]),
    session_id=st.none() | st.sampled_from(["s", "日本"]),
    author=st.none() | TEXT,
    subject=st.none() | TEXT,
    metadata=st.dictionaries(TEXT, VALUES, max_size=2),
    importance=st.none() | st.floats(0, 1),
    expires_at=st.none() | MOMENTS,
    occurred_at=st.none() | MOMENTS,
    created_at=st.none() | MOMENTS,
)
GUIDE = {"kind": "document", "media_type": "text/markdown", "metadata": {"title": "g"}}


def plain(exported: Json) -> Json:
    left = {name: value for name, value in exported.items() if name not in ANEW}
    metadata = {k: v for k, v in exported["metadata"].items() if k != "exported_source"}
    return left | {"metadata": metadata}


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(MEMORIES, min_size=1, max_size=6), st.integers(0, 5), st.booleans())
async def test_an_export_imported_into_an_empty_tenant_and_exported_again_is_the_same(
    tmp_path: Path, drafts: list[Json], edited: int, keyed: bool
) -> None:
    database = database_at(f"sqlite:///{tmp_path}/{new_id('mem')}/server.db")
    await database.open()
    await database.write(upgrade)
    store = MemoryStore(database)
    await store.open()
    desk = MemoryDesk(database, store, Documents())
    one, two, three = map(Tenant, ("one", "two", "three"))

    async def each(*tenants: Tenant) -> AsyncIterator[Tenant]:
        for tenant in tenants:
            async for _ in store.export(tenant, MemoryFilter()):
                yield tenant

    async def exported(tenant: Tenant) -> list[Json]:
        found = [m async for m in store.export(tenant, MemoryFilter(), batch=2)]
        return [m.model_dump(mode="json") for m in found if m.part_of is None]

    async def imported(tenant: Tenant, memories: list[Json]) -> list[Json]:
        lines = [_json(memory) for memory in memories]
        inputs = [_memory(line, {}, Counter()) for line in lines]
        for again in (False, True):
            done = await desk.write(tenant, inputs, source=MemorySource(principal=tenant))
            assert done.new == (0 if again else len(lines))
        return await exported(tenant)

    try:
        guide = "# A\n\n" + "Words of it.\n\n" * 200 + "# B\n\nThe end.\u2028"
        keys = [{"key": f"k/{n}"} if keyed else {} for n in range(len(drafts))]
        inputs = [MemoryInput(**draft, **key) for draft, key in zip(drafts, keys, strict=True)]
        inputs.append(MemoryInput(**GUIDE, content=guide, key="guide"))
        written = await desk.write(one, inputs, source=MemorySource(principal="ann"))
        # Written anew, so that it stands behind the others, but not in its conversation.
        changed = written.memories[edited % len(drafts)]
        await store.edit(
            one, changed.id, MemoryChange(importance=0.25), source=MemorySource(principal="bob")
        )
        first = await exported(one)
        second = await imported(two, first)
        assert list(map(plain, second)) == list(map(plain, first))
        sources = [memory["metadata"]["exported_source"]["principal"] for memory in second]
        assert sources == ["bob" if m["id"] == changed.id else "ann" for m in first]
        third = await imported(three, json.loads(json.dumps(second)))
        assert [m | dict.fromkeys(ANEW) for m in third] == [m | dict.fromkeys(ANEW) for m in second]
        pieces = Counter([t async for t in each(one, two, three)])
        assert pieces[one] == pieces[two] == pieces[three] > len(first)
    finally:
        await database.close()


async def test_what_is_too_much_for_one_call_is_sent_in_several_and_what_is_too_large_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, source = f"sqlite:///{tmp_path}/data/server.db", tmp_path / "many.jsonl"
    sizes = [6_000, 6_000, 6_000, 40_000, 6_000, 6_000, 6_000]
    lines = [json.dumps({"kind": "context", "content": "x" * size}) for size in sizes]
    source.write_text("\n".join(lines))
    async with home(url, tmp_path, max_body_bytes=16_000, max_document_bytes=16_000) as server:
        assert not await _import_memories(server.client, source, {}, 200)
        told = capsys.readouterr().err
        assert "many.jsonl:4: " in told and "6 memories imported, 0 there already, 1 fail" in told
        assert (await server.call("GET", "/memories/stats"))["memories"] == 6


def test_what_of_a_folder_is_left_out_is_known(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        for name in ("open", "closed", ".hidden"):
            (top / name).mkdir()
            (top / name / "a.md").write_text("text")
        (top / "link").symlink_to(top / "open")
        (top / "open" / "in.md").symlink_to(top / "open" / "a.md")
        (top / "open" / "out.md").symlink_to("/etc/passwd")
        (top / "open" / "nothing.md").symlink_to("nowhere")
        (top / "closed").chmod(0)
        top.chmod(0o755)
        me = os.geteuid()
        if me == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)  # For root nothing is closed.
        try:
            files = files_in(top)
        finally:
            os.seteuid(me)
            (top / "closed").chmod(0o700)
    assert files is not None
    assert list(files.found) == ["open/a.md", "open/in.md"]
    assert files.links == ["link", "open/nothing.md", "open/out.md"]
    assert [(name, error.strerror) for name, error in files.closed] == [
        ("closed", "Permission denied")
    ]


async def test_one_memory_that_the_server_refuses_keeps_out_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, source = f"sqlite:///{tmp_path}/data/server.db", tmp_path / "mixed.jsonl"
    fine = [{"kind": "knowledge", "content": f"fine {n}"} for n in range(5)]
    no_pdf = {"kind": "document", "content": "***", "media_type": "application/pdf"}
    deep: Any = "end"
    for _ in range(200):
        deep = [deep]
    too_deep = {"kind": "knowledge", "content": "deep", "metadata": {"a": deep}}
    memories = [fine[0], no_pdf, *fine[1:3], too_deep, *fine[3:]]
    source.write_text("\n".join(json.dumps(memory) for memory in memories))
    async with home(url, tmp_path) as server:
        assert not await _import_memories(server.client, source, {}, 200)
        told = capsys.readouterr().err
        assert "mixed.jsonl:2: " in told and "not base64" in told and "mixed.jsonl:5: " in told
        assert "5 memories imported, 0 there already, 2 failed" in told
        kept = (await server.call("GET", "/memories"))["data"]
        assert {one["content"] for one in kept} == {one["content"] for one in fine}


async def test_a_line_that_is_half_an_export_is_named_and_keeps_out_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, source = f"sqlite:///{tmp_path}/data/server.db", tmp_path / "half.jsonl"
    fine = {"kind": "knowledge", "content": "fine"}
    halves: list[dict[str, Any]] = [
        {"content": "of no kind", "version": 1},
        fine | {"version": 2, "source": "a wiki"},
        fine | {"version": 2, "metadata": ["a"]},
    ]
    source.write_text("\n".join(json.dumps(line) for line in [*halves, fine]))
    readable = tmp_path / "half.json"
    readable.write_text(json.dumps({"format": FORMAT, "memories": 5}))
    async with home(url, tmp_path) as server:
        assert not await _import_memories(server.client, source, {}, 200)
        told = capsys.readouterr().err
        assert all(f"half.jsonl:{number}: " in told for number in (1, 2, 3)), told
        assert "1 memories imported, 0 there already, 3 failed" in told
        with pytest.raises(InvalidRequest, match="not an export"):
            await _import_memories(server.client, readable, {}, 200)


async def test_a_readable_file_has_a_content_that_is_empty(tmp_path: Path) -> None:
    url, readable = f"sqlite:///{tmp_path}/data/server.db", tmp_path / "all.json"
    async with home(url, tmp_path) as server:
        body = {"kind": "context", "content": {}}
        written = await server.call("POST", "/memories", body, status=201)
        with readable.open("w") as out:
            assert await _write_readable(server.client.memories.export(), out) == 1
        await server.call("DELETE", f"/memories/{written['id']}")
        assert await _import_memories(server.client, readable, {}, 200)
        assert (await server.call("GET", f"/memories/{written['id']}"))["content"] == {}


@pytest.mark.parametrize("media_type", ["text/html", "application/pdf"])
async def test_what_was_read_from_a_page_keeps_its_headings_from_server_to_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], media_type: str
) -> None:
    if media_type == "application/pdf":
        parts = [pdf_of("Press the knob " + "and wait " * 50, "Oil it " + "every day " * 90)]
        short, content = pdf_of("Only this"), parts[0]
    else:
        short = b"<h1>Part 1</h1><p>Only this</p>"
        sections = [f"<h2>Step {n}</h2><p>{'Turn the knob. ' * 60}</p>" for n in range(3)]
        content = f"<h1>Part 1</h1><p>Begin.</p>{''.join(sections)}".encode()

    def document(data: bytes, key: str) -> Json:
        pdf = media_type == "application/pdf"
        text = base64.b64encode(data).decode() if pdf else data.decode()
        return {"kind": "document", "content": text, "media_type": media_type, "key": key}

    async def headings(server: Home, key: str) -> list[Any]:
        (whole,) = (await server.call("GET", "/memories", key=key))["data"]
        pieces = (await server.call("GET", "/memories", part_of=whole["id"]))["data"]
        return [(one["part_of"]["heading"], one["content"]) for one in pieces]

    lines = tmp_path / "all.jsonl"
    async with home(f"sqlite:///{tmp_path}/one/server.db", tmp_path) as server:
        await server.call("POST", "/memories", document(short, "short"), status=201)
        await server.call("POST", "/memories", document(content, "long"), status=201)
        found, *_ = (await server.call("POST", "/memories/search", {"query": "Part 1"}))["data"]
        assert "Part 1" in found["memory"]["content"]
        first = await headings(server, "long")
        assert len(first) >= 2 and first[0][0]
        with lines.open("w") as out:
            await _write_lines(server.client.memories.export(), out)
    async with home(f"sqlite:///{tmp_path}/two/server.db", tmp_path) as server:
        assert await _import_memories(server.client, lines, {}, 200), capsys.readouterr().err
        assert await headings(server, "long") == first
        (whole,) = (await server.call("GET", "/memories", key="short"))["data"]
        assert whole["content"] == "# Part 1\n\nOnly this"
