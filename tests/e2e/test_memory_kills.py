"""Memory over real processes: killed in the middle of an import or a consolidation, and resumed."""

import asyncio
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.durability.world import ready
from tests.support.model_thread import ModelThread, rule
from tests.support.server_process import Nursery

from .kit import Api, House

MEMORIES = "/api/v1/memories"
FACTS = {"facts": [{"content": "Ada moved to Bergen.", "relation": "new", "key": "ada/home"}]}
SCRIPT = [
    rule("List the facts", {"text": json.dumps(FACTS)}),
    rule("moved", {"text": "So you live in Bergen now."}),
]
LINES = 800
Json = dict[str, Any]


def dying(house: House, nursery: Nursery, crash_at: str, **env: str) -> Api:
    """A server that kills itself there; ready if it has got so far."""
    server = nursery.start(house.env | env, folder=house.folder, crash_at=crash_at)
    try:
        asyncio.run(ready(server))
    except AssertionError:
        assert house.ended(Api(server.url, server))
    return Api(server.url, server)


def everything(api: Api, **filters: Any) -> list[Json]:
    return api.listed(MEMORIES, **filters)


@pytest.mark.parametrize(
    "crash_at",
    ["submit.after_commit:2", "task.before_end", "task.after_end", "run.before_end:2"],
)
def test_a_consolidation_that_is_killed_goes_on_and_keeps_each_fact_once(
    tmp_path: Path, nursery: Nursery, models: ModelThread, crash_at: str
) -> None:
    models.script(*SCRIPT)
    house = House(tmp_path / "house", nursery, models, AGENT_SERVER_MEMORY_CONSOLIDATION="true")
    api = dying(house, nursery, crash_at)
    run_id = api.submit(
        agent="talker", input="I moved to Bergen and like it a lot.", session_id="s"
    )
    assert house.ended(api), "it was not killed"
    api.http.close()
    api = house.start()
    assert api.ended(run_id)["status"] == "succeeded"
    runs = api.listed("/api/v1/runs", workflow="memory-consolidation")
    for _ in range(50):
        if runs:
            break
        api.ended(run_id)
        runs = api.listed("/api/v1/runs", workflow="memory-consolidation")
    assert [api.ended(run["id"])["status"] for run in runs] == ["succeeded"]
    facts = everything(api, kind="knowledge", replaced="true")
    assert [fact["content"] for fact in facts] == ["Ada moved to Bergen."]
    assert facts[0]["metadata"]["from_run"] == run_id
    turns = everything(api, session_id="s")
    assert [turn["kind"] for turn in turns] == ["message", "message"]
    api.http.close()


@pytest.mark.parametrize("victim", ["command", "server"])
def test_an_import_that_is_killed_is_finished_by_a_second_one_without_a_double(
    tmp_path: Path, nursery: Nursery, models: ModelThread, victim: str
) -> None:
    house = House(tmp_path / "house", nursery, models)
    source = tmp_path / "memories.jsonl"
    source.write_text(
        "".join(
            json.dumps({"kind": "message", "content": f"line {n % 700}", "session_id": "s"}) + "\n"
            for n in range(LINES)
        )
    )
    api = house.start()
    command = house.run("memory", "import", str(source), "--batch", "25", "--server", api.url)
    for _ in range(4_000):
        if api.get(f"{MEMORIES}/stats")["memories"] >= 25:
            break
    if victim == "command":
        command.signal(signal.SIGKILL)
    else:
        assert api.server is not None
        asyncio.run(api.server.kill())
    assert command.exit_code() != 0
    if victim == "server":
        api.http.close()
        api = house.start()
    before = api.get(f"{MEMORIES}/stats")["memories"]
    assert 0 < before < LINES and before % 25 == 0
    again = house.run("memory", "import", str(source), "--batch", "100", "--server", api.url)
    assert again.exit_code() == 0, again.output
    told = re.search(r"(\d+) memories imported, (\d+) there already, 0 failed", again.output)
    assert told, again.output
    new, there = int(told[1]), int(told[2])
    assert new + there == LINES
    # What a killed command had sent last may have been written after the look.
    assert there in ({before, before + 25} if victim == "command" else {before})
    found = everything(api, session_id="s")
    assert len(found) == LINES
    assert sorted(memory["position"] for memory in found) == list(range(LINES))
    texts = [memory["content"] for memory in sorted(found, key=lambda m: m["position"])]
    assert texts == [f"line {n % 700}" for n in range(LINES)]
    api.http.close()


def test_a_folder_is_imported_exported_and_imported_elsewhere(
    tmp_path: Path, nursery: Nursery, models: ModelThread
) -> None:
    house = House(tmp_path / "house", nursery, models)
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.md").write_text("not this")
    (folder / "guide.md").write_text("# Guide\n\n" + "Words. " * 400 + "\n\n## Kiln\n\nRoom 3.")
    (folder / "sub" / "note.txt").write_text("The loom is in room 7.")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "empty.txt").touch()
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("not this either")
    api = house.start()
    at = ("--server", api.url)
    for told in ("2 documents imported, 0 there already", "0 documents imported, 2 there already"):
        imported = house.run("memory", "import", str(folder), *at)
        assert imported.exit_code() == 1
        assert "picture.png" in imported.output and "not text" in imported.output
        assert "broken.pdf: The document is not a PDF that can be read" in imported.output
        assert "empty.txt: The document is not valid: content must not be empty." in imported.output
        assert f"{told}, 3 failed; links that were not followed: " in imported.output
        assert imported.output.endswith("followed: out\n")
        titles = {memory["metadata"]["title"] for memory in everything(api)}
        assert titles == {"guide.md", "sub/note.txt"} and len(everything(api)) == 2
    (folder / "sub" / "note.txt").write_text("The loom is in room 8.")
    newer = house.run("memory", "import", str(folder), *at)
    assert newer.exit_code() == 1
    assert "1 documents imported, 1 there already, 3 failed; an older" in newer.output
    assert "superseded by sub/note.txt; links" in newer.output
    plain = house.run("memory", "search", "Kiln room", "--limit", "1", *at)
    assert plain.exit_code() == 0 and "  title guide.md, score" in plain.output, plain.output
    found = house.run("memory", "search", "where is the loom?", "--json", *at)
    assert found.exit_code() == 0, found.output
    assert [one["memory"]["content"] for one in json.loads(found.output)][0] == (
        "The loom is in room 8."
    )
    api.http.post(
        MEMORIES, json={"kind": "knowledge", "content": {"a": [1]}, "importance": 0.5}
    ).raise_for_status()
    before = everything(api)
    said = house.run("memory", "export", "-", *at)
    assert said.exit_code() == 0 and len(said.output.splitlines()) == len(before), said.output
    files = {suffix: tmp_path / f"all{suffix}" for suffix in (".jsonl", ".json")}
    for file in files.values():
        out = house.run("memory", "export", str(file), *at)
        assert out.exit_code() == 0, out.output
    readable = json.loads(files[".json"].read_text())
    assert readable["format"] == "agent-server.memories/1" and len(readable["memories"]) == 3
    api.http.close()
    assert api.server is not None
    asyncio.run(api.server.kill())
    for suffix, file in files.items():
        other = House(tmp_path / f"other{suffix}", nursery, models)
        api = other.start()
        for told in ("3 memories imported, 0 there", "0 memories imported, 3 there already"):
            command = other.run("memory", "import", str(file), "--server", api.url)
            assert command.exit_code() == 0 and told in command.output, command.output
        after = everything(api)
        for name in ("id", "content", "kind", "key", "importance", "created_at"):
            assert [m[name] for m in after] == [m[name] for m in before], name
        assert {m["metadata"]["exported_source"]["principal"] for m in after} == {"anonymous"}
        best = api.http.post(f"{MEMORIES}/search", json={"query": "Kiln room"}).json()["data"]
        assert best[0]["memory"]["part_of"]["heading"] == ["Guide", "Kiln"]
        api.http.close()
        assert api.server is not None
        asyncio.run(api.server.kill())


def test_a_line_that_is_too_large_for_the_server_keeps_out_no_other(
    tmp_path: Path, nursery: Nursery, models: ModelThread
) -> None:
    house = House(tmp_path / "house", nursery, models, AGENT_SERVER_MAX_DOCUMENT_BYTES="1048576")
    source = tmp_path / "large.jsonl"
    words = ["first", "large " * 5_000_000, "last"]
    lines = [json.dumps({"kind": "knowledge", "content": word}) for word in words]
    source.write_text("\n".join(lines))
    api = house.start()
    command = house.run("memory", "import", str(source), "--server", api.url)
    assert command.exit_code() == 1
    assert "large.jsonl:2: " in command.output, command.output[:2_000]
    assert "2 memories imported, 0 there already, 1 failed" in command.output
    assert {memory["content"] for memory in everything(api)} == {"first", "last"}
    api.http.close()


def test_what_is_wrong_with_a_file_is_said_line_by_line_and_the_rest_is_imported(
    tmp_path: Path, nursery: Nursery, models: ModelThread
) -> None:
    house = House(tmp_path / "house", nursery, models)
    source = tmp_path / "some.jsonl"
    good = json.dumps({"kind": "knowledge", "content": "good"})
    source.write_text(f'{good}\n{{"kind": "knowledge"}}\nnot json\n[1]\n\n{good}\n')
    command = house.run("memory", "import", str(source))  # a server inside the command
    assert command.exit_code() == 1
    for line in ("some.jsonl:2", "some.jsonl:3", "some.jsonl:4"):
        assert line in command.output
    assert "2 memories imported, 0 there already, 3 failed" in command.output
    for name, text in (("cut.json", "{"), ("other.json", "[1]"), ("latin.jsonl", "\xe9")):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        refused = house.run("memory", "import", str(tmp_path / name))
        assert refused.exit_code() == 1 and f"{name}' is not" in refused.output, refused.output
    nowhere = house.run("memory", "export", str(tmp_path / "no" / "all.json"))
    assert nowhere.exit_code() == 1 and "cannot be written" in nowhere.output, nowhere.output
    source.write_text("earlier")
    refused = house.run("memory", "export", str(source), "--kind", "banana")
    assert refused.exit_code() == 1 and source.read_text() == "earlier", refused.output
    missing = house.run("memory", "import", str(tmp_path / "nowhere"))
    assert missing.exit_code() == 1 and "no file or folder" in missing.output
    stats = house.run("memory", "stats", "--json")
    assert stats.exit_code() == 0 and json.loads(stats.output)["memories"] == 2
    for wrong in (("add", " "), ("search", "x", "--kind", "banana")):
        refused = house.run("memory", *wrong)
        assert refused.exit_code() == 1 and "Error: The " in refused.output, refused.output
        assert len(refused.output.strip().splitlines()) == 1, "what is wrong is said once"
    added = house.run("memory", "add", "Ada likes green.", "--subject", "ada", "--key", "a")
    assert added.exit_code() == 0
    identity = added.output.strip().splitlines()[-1]
    shown = house.run("memory", "show", identity)
    assert shown.exit_code() == 0 and "Ada likes green." in shown.output
    more = ("--meta", "team=4", "--meta", "city=Oslo", "--author", "bo", "--session", "s")
    more += ("--importance", "0.5", "--occurred-at", "2024-05-06T10:00:00Z")
    other = house.run("memory", "add", "Ada likes tea.", "--subject", "bo", *more)
    assert other.exit_code() == 0, other.output

    def found(*filters: str) -> list[Any]:
        command = house.run("memory", "search", "What does Ada like?", "--json", *filters)
        assert command.exit_code() == 0, command.output
        return [one["memory"] for one in json.loads(command.output)]

    assert len(found()) == 2
    for filters in (
        ("--subject", "bo"),
        ("--for-subject", "bo"),
        ("-f", "team=4", "-f", "city=Oslo"),
    ):
        [tea] = found(*filters, "--mode", "text")
        assert tea["content"] == "Ada likes tea."
        assert tea["metadata"] == {"team": 4, "city": "Oslo"}
        assert (tea["author"], tea["session_id"], tea["importance"]) == ("bo", "s", 0.5)
        assert tea["occurred_at"] == "2024-05-06T10:00:00Z"
    assert found("--filter", "team=5") == []
    plain = house.run("memory", "search", "tea", "--subject", "bo")
    assert plain.exit_code() == 0
    assert "about bo, said by bo, happened 2024-05-06 10:00, score" in plain.output
    wrong_filter = house.run("memory", "search", "x", "--filter", "team")
    assert wrong_filter.exit_code() == 1 and "is not `name=value`" in wrong_filter.output
    listed = house.run("memory", "show", "--subject", "ada")
    assert listed.exit_code() == 0 and identity in listed.output
    erased = house.run("memory", "erase", "ada", "--yes")
    assert erased.exit_code() == 0 and '"memories": 1' in erased.output
    gone = house.run("memory", "forget", identity)
    assert gone.exit_code() == 1 and "Error:" in gone.output
