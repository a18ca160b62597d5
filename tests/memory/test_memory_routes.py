"""Memories through the API: written, found, edited, superseded, deleted."""

import asyncio
import base64
import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_server.domain.ids import Tenant
from agent_server.domain.memories import MemoryQuery
from agent_server.memory import long_term
from tests.memory.kit import Home, home
from tests.memory.test_documents import pdf_of
from tests.support.until import until

FACT = {"kind": "knowledge", "content": "Ada's favourite colour is green."}
GUIDE = "# Guide\n\n" + "\n\n".join(
    f"## Part {n}\n\nThe {word} stands in room {n}. " + "It is kept there. " * 40
    for n, word in enumerate(["anvil", "lathe", "kiln", "loom"], start=1)
)


async def search(server: Home, query: str, **more: Any) -> list[Any]:
    answer = await server.call("POST", "/memories/search", {"query": query, **more})
    return list(answer["data"])


async def test_a_memory_is_written_read_found_edited_and_deleted(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        made = await server.http.post("/api/v1/memories", json=FACT | {"metadata": {"a b": 1}})
        assert made.status_code == 201, made.text
        memory = made.json()
        assert made.headers["location"] == f"/api/v1/memories/{memory['id']}"
        assert made.headers["etag"] == '"1"'
        assert memory["source"] == dict.fromkeys(memory["source"]) | {"principal": "anonymous"}
        (found,) = await search(server, "what colour does Ada like?")
        assert found["memory"] == memory and found["score"] > 0 and found["matched"]
        path = f"/memories/{memory['id']}"
        edited = await server.call(
            "PATCH", path, {"content": "It is blue."}, headers={"If-Match": '"1"'}
        )
        assert (edited["version"], edited["content"]) == (2, "It is blue.")
        for tag in ('"1"', '"x"', 'W/"nothing"'):
            refused = await server.call(
                "PATCH", path, {"content": "red"}, headers={"If-Match": tag}, status=412
            )
            assert refused["code"] == "precondition_failed"
        history = await server.call("GET", f"{path}/history")
        assert [version["content"] for version in history["data"]] == [
            FACT["content"],
            "It is blue.",
        ]
        assert await server.call("DELETE", path) == {"id": memory["id"], "deleted": True}
        for method, where in (("GET", path), ("PATCH", path), ("DELETE", path)):
            body = {"content": "x"} if method == "PATCH" else None
            assert (await server.call(method, where, body, status=404))["code"] == "not_found"
        assert await search(server, "blue") == []


async def test_a_batch_is_written_whole_or_not_at_all(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        turns = [
            {"kind": "message", "content": f"turn {n}", "session_id": "s", "author": "ada"}
            for n in range(5)
        ]
        written = (await server.call("POST", "/memories", {"memories": turns}, status=201))["data"]
        assert [memory["position"] for memory in written] == list(range(5))
        bad = [*turns, {"kind": "message", "content": " "}]
        refused = await server.call("POST", "/memories", {"memories": bad}, status=422)
        assert refused["errors"][0]["path"].startswith("memories.5")
        too_many = {"memories": [FACT] * 1001}
        await server.call("POST", "/memories", too_many, status=422)
        assert len((await server.call("GET", "/memories", session_id="s"))["data"]) == 5
        many = {"memories": [FACT | {"content": f"fact {n}"} for n in range(1000)]}
        assert len((await server.call("POST", "/memories", many, status=201))["data"]) == 1000


async def test_the_same_key_and_body_write_once_even_at_once(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        headers = {"Idempotency-Key": "k1"}

        async def write(body: Any = FACT) -> Any:
            return await server.http.post("/api/v1/memories", json=body, headers=headers)

        answers = await asyncio.gather(*[write() for _ in range(10)])
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["id"] for answer in answers}) == 1
        replays = [a for a in answers if a.headers.get("idempotency-replayed") == "true"]
        assert len(replays) == 9
        assert len((await server.call("GET", "/memories"))["data"]) == 1
        other = await write(FACT | {"content": "another"})
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


async def test_a_repeated_call_answers_the_memory_that_was_there_before_the_first(
    url: str, tmp_path: Path
) -> None:
    body = {"kind": "knowledge", "content": "green", "key": "colour"}
    async with home(url, tmp_path) as server:
        first = await server.call("POST", "/memories", body, status=201)
        for key in ("k1", "k1"):
            again = await server.call(
                "POST", "/memories", body, status=201, headers={"Idempotency-Key": key}
            )
            assert again["id"] == first["id"]
        many = {"memories": [body, body | {"key": "other"}]}
        for new in (1, 0):
            batch = await server.call("POST", "/memories", many, status=201)
            assert (batch["new"], batch["data"][0]["id"]) == (new, first["id"])


async def test_the_same_words_under_a_key_are_written_again_where_more_is_said_of_them(
    url: str, tmp_path: Path
) -> None:
    body = FACT | {"key": "colour", "expires_at": "2999-01-01T00:00:00Z", "importance": 0.5}
    changes: list[dict[str, Any]] = [
        {"expires_at": "2999-06-01T00:00:00Z"},
        {"expires_at": None},
        {"subject": "ada"},
        {"author": "ada"},
        {"importance": 1.0},
        {"occurred_at": "2026-01-01T00:00:00Z"},
        {"session_id": "s"},
        {"kind": "context"},
    ]
    async with home(url, tmp_path) as server:
        held = await server.call("POST", "/memories", body, status=201)
        for change in changes:
            body |= change
            new = await server.call("POST", "/memories", body, status=201)
            assert (new["supersedes"], new | change) == (held["id"], new)
            assert (await server.call("POST", "/memories", body, status=201))["id"] == new["id"]
            held = new
        less = {name: body[name] for name in ("kind", "content", "key")}
        assert (await server.call("POST", "/memories", less, status=201))["id"] == held["id"]
        erased = (await server.call("DELETE", "/subjects/ada"))["erased"]
        assert erased["memories"] == 6 and await search(server, "colour") == []


async def test_two_writers_on_one_key_leave_one_that_holds_and_the_other_in_its_past(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:
        bodies = [FACT | {"key": "ada/colour", "content": f"colour {n}"} for n in range(8)]
        written = await asyncio.gather(
            *[server.call("POST", "/memories", body, status=201) for body in bodies]
        )
        held = (await server.call("GET", "/memories", key="ada/colour"))["data"]
        assert len(held) == 1
        everything = await server.call("GET", "/memories", key="ada/colour", replaced="true")
        assert {memory["id"] for memory in everything["data"]} == {m["id"] for m in written}
        assert [one["memory"]["id"] for one in await search(server, "colour")] == [held[0]["id"]]


async def test_a_long_document_is_found_by_its_pieces_and_superseded_whole(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:
        document = {
            "kind": "document",
            "content": GUIDE,
            "media_type": "text/markdown",
            "key": "file:guide.md",
            "metadata": {"title": "guide.md"},
        }
        whole = await server.call("POST", "/memories", document, status=201)
        assert whole["content"] == GUIDE and not whole["searchable"]
        listed = (await server.call("GET", "/memories"))["data"]
        assert [memory["id"] for memory in listed] == [whole["id"]]
        pieces = (await server.call("GET", "/memories", part_of=whole["id"], limit=50))["data"]
        assert len(pieces) >= 4
        best = (await search(server, "in which room stands the kiln?"))[0]["memory"]
        assert "kiln" in best["content"] and best["part_of"]["heading"] == ["Guide", "Part 3"]
        again = await server.call("POST", "/memories", document, status=201)
        assert again["id"] == whole["id"]
        assert len((await server.call("GET", "/memories", part_of=whole["id"]))["data"]) == len(
            pieces
        )
        newer = GUIDE.replace("kiln", "forge")
        await server.call("POST", "/memories", document | {"content": newer}, status=201)
        texts = [one["memory"]["content"] for one in await search(server, "kiln forge", limit=50)]
        assert any("forge" in text for text in texts)
        assert not any("kiln" in text for text in texts)
        twice = [document | {"content": newer + end} for end in (" one", " two")]
        await server.call("POST", "/memories", {"memories": twice}, status=201)
        held = [one["memory"]["part_of"] for one in await search(server, "forge", limit=50)]
        assert len({part["memory_id"] for part in held}) == 1
        edit = await server.call(
            "PATCH", f"/memories/{pieces[0]['id']}", {"content": "x"}, status=409
        )
        assert edit["code"] == "conflict"
        await server.call("DELETE", f"/memories/{whole['id']}")
        assert (await server.call("GET", "/memories", part_of=whole["id"], replaced="true"))[
            "data"
        ] == []


async def test_what_was_learnt_before_goes_into_the_past_of_its_key_in_whatever_order_it_comes(
    url: str, tmp_path: Path
) -> None:
    homes = {2018: "Bergen", 2020: "Rome", 2022: "Riga", 2024: "Oslo"}

    def fact(year: int, key: str) -> Any:
        at = f"{year}-06-01T00:00:00Z"
        return {"kind": "knowledge", "content": homes[year], "key": key, "created_at": at}

    async with home(url, tmp_path) as server:
        orders = [list(order) for order in permutations(homes)]
        for n, order in enumerate(orders):
            facts = [fact(year, f"bob/home/{n}") for year in order]
            cut = n % 4
            for some in (facts[:cut], facts[cut:]):
                if some:
                    await server.call("POST", "/memories", {"memories": some}, status=201)
        for n, order in enumerate(orders):
            listed = await server.call("GET", "/memories", key=f"bob/home/{n}")
            assert [one["content"] for one in listed["data"]] == ["Oslo"], order
            past = (
                await server.call("GET", "/memories", key=f"bob/home/{n}", replaced="true", limit=9)
            )["data"]
            assert [one["content"] for one in past] == ["Oslo", "Riga", "Rome", "Bergen"], order
            for one, next_one in zip(past[1:], past, strict=False):
                assert one["replaced_at"] == next_one["created_at"], order
                assert one["superseded_by"] == next_one["id"], order
                assert next_one["supersedes"] == one["id"], order
        for year, town in homes.items():
            found = await search(server, town, as_of=f"{year + 1}-01-01T00:00:00Z", limit=50)
            assert {one["memory"]["content"] for one in found} == {town}
        assert await search(server, "Rome") == []


async def test_what_has_expired_is_not_found_and_is_soon_deleted(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = {"expires_at": "2020-01-01T00:00:00Z"}
    async with home(url, tmp_path) as server:
        gone = await server.call("POST", "/memories", FACT | past, status=201)
        kept = await server.call("POST", "/memories", FACT | {"content": "It is blue."}, status=201)
        assert [one["memory"]["id"] for one in await search(server, "green blue")] == [kept["id"]]
    monkeypatch.setattr(long_term, "SWEEP_EVERY_S", 0.01)
    async with home(url, tmp_path) as server:

        async def deleted() -> bool:
            listed = (await server.call("GET", "/memories"))["data"]
            return [one["id"] for one in listed] == [kept["id"]]

        await until(deleted)
        await server.call("GET", f"/memories/{gone['id']}/history", status=404)


async def test_a_limit_of_a_kind_is_none_or_more(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        await server.call("POST", "/memories", FACT, status=201)
        assert await search(server, "colour", limits={"knowledge": 0}) == []
        asked = {"query": "colour", "limits": {"knowledge": -1}}
        refused = await server.call("POST", "/memories/search", asked, status=422)
        assert refused["errors"][0]["path"] == "limits.knowledge"


async def test_what_there_is_enough_of_takes_no_place_of_other_kinds(
    url: str, tmp_path: Path
) -> None:
    texts = {"message": "Ada, it is {}", "outcome": "It was Ada at {}"}
    many = [
        {"kind": kind, "content": text.format(n)} for kind, text in texts.items() for n in range(90)
    ]
    fact = FACT | {"content": "Ada lives by the sea, with an old dog and more books than shelves."}
    async with home(url, tmp_path) as server:
        await server.call("POST", "/memories", {"memories": [*many, fact]}, status=201)
        for limits, told in (
            ({"message": 0, "outcome": 0}, {"knowledge": 1}),
            ({"message": 2, "outcome": 3}, {"message": 2, "outcome": 3, "knowledge": 1}),
            ({"message": 2, "knowledge": 0}, {"message": 2, "outcome": 8}),
        ):
            found = await search(server, "Ada", limits=limits)
            assert Counter(one["memory"]["kind"] for one in found) == told
            assert [one["score"] for one in found] == sorted(f["score"] for f in found)[::-1]
        only = await search(server, "Ada", limits={"message": 2}, kinds=["message"])
        assert len(only) == 2


async def pages(server: Home, **filters: Any) -> list[Any]:
    """All that a list has, one by one."""
    page = await server.call("GET", "/memories", limit=1, **filters)
    found = list(page["data"])
    while page["next_cursor"] is not None:
        assert len(page["data"]) == 1
        page = await server.call("GET", "/memories", limit=1, cursor=page["next_cursor"], **filters)
        found += page["data"]
    return found


async def test_a_list_of_replaced_versions_shows_each_however_it_is_paged(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:
        fact = await server.call("POST", "/memories", FACT | {"key": "ada/colour"}, status=201)
        for colour in ("red", "blue"):
            await server.call("PATCH", f"/memories/{fact['id']}", {"content": colour})
        newer = FACT | {"key": "ada/colour", "content": "violet"}
        await server.call("POST", "/memories", newer, status=201)
        shown = [one["content"] for one in await pages(server, key="ada/colour", replaced="true")]
        assert shown == ["violet", "blue", "red", FACT["content"]]


async def test_the_pieces_of_a_document_are_listed_in_their_order_and_found_by_their_words(
    url: str, tmp_path: Path
) -> None:
    guide = {"kind": "document", "content": GUIDE, "media_type": "text/markdown", "key": "guide"}
    async with home(url, tmp_path) as server:
        whole = await server.call("POST", "/memories", guide, status=201)
        await server.call("POST", "/memories", FACT, status=201)
        await server.call("POST", "/memories", guide | {"namespace": "else"}, status=201)
        pieces = await pages(server, part_of=whole["id"])
        assert [one["part_of"]["index"] for one in pieces] == list(range(len(pieces)))
        assert len(pieces) >= 4
        with_word = await server.call("GET", "/memories", q="kiln stands", namespace="default")
        assert [one["id"] for one in with_word["data"]] == [whole["id"]]
        theirs = (await server.call("GET", "/memories", q="kiln", part_of=whole["id"]))["data"]
        assert ["kiln" in one["content"] for one in theirs] == [True]
        assert (await server.call("GET", "/memories", q="kiln anvil"))["data"] == []
        listed = await server.call("GET", "/memories", limit=1)
        wrong = {"cursor": listed["next_cursor"], "part_of": whole["id"]}
        refused = await server.call("GET", "/memories", status=422, **wrong)
        assert refused["code"] == "invalid_cursor"


@pytest.mark.parametrize(
    "place",
    [
        ["2026-01-01T00:00:00+00:00", "mem_\x00 1"],
        ["2026-01-01T00:00:00+00:00", "mem_\ud800 1"],
        ["2026-01-01T00:00:00+00:00", "mem_a " + "9" * 40],
        ["0001-01-01T00:00:00+14:00", "mem_a 1"],
        ["2026-01-01T00:00:00", "mem_a 1"],
        ["2026-01-01T00:00:00+00:00", 1],
        {"at": "2026-01-01T00:00:00+00:00"},
    ],
)
async def test_a_cursor_that_no_page_gave_is_refused(url: str, tmp_path: Path, place: Any) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")
    async with home(url, tmp_path) as server:
        for path in ("/memories", "/sessions", "/runs"):
            if path != "/memories" and "9" * 40 in str(place):
                continue  # There it is an id as good as any.
            refused = await server.call("GET", path, status=422, cursor=cursor)
            assert refused["code"] == "invalid_cursor"


@pytest.mark.parametrize("content", ["", "  \n", None])
async def test_a_memory_is_neither_written_nor_made_blank(
    url: str, tmp_path: Path, content: Any
) -> None:
    async with home(url, tmp_path) as server:
        body = {"kind": "knowledge", "content": content}
        await server.call("POST", "/memories", body, status=422)
        body["content"] = {}
        made = await server.call("POST", "/memories", body, status=201)
        path = f"/memories/{made['id']}"
        await server.call("PATCH", path, {"content": content}, status=422)
        assert (await server.call("PATCH", path, {"content": []}))["content"] == []


async def test_a_pdf_is_sent_in_base64_and_what_is_none_is_refused(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:
        content = base64.b64encode(pdf_of("The kiln is hot")).decode()
        pdf = {"kind": "document", "media_type": "application/pdf", "content": content}
        written = await server.call("POST", "/memories", pdf, status=201)
        assert written["content"].strip() == "# Part 1\n\nThe kiln is hot"
        for bad in (
            pdf | {"content": "not base64!"},
            pdf | {"content": base64.b64encode(b"no pdf").decode()},
            pdf | {"media_type": "image/png"},
            {"kind": "document", "content": "a\u0000b"},
        ):
            refused = await server.call("POST", "/memories", bad, status=422)
            assert refused["code"] == "invalid_document" and refused["hint"]
        refused = await server.call("POST", "/memories", {**FACT, "media_type": "x"}, status=422)
        assert refused["code"] == "invalid_request"


async def test_a_document_may_be_larger_than_other_bodies(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path, max_document_bytes=3_000_000) as server:
        text = "\n\n".join(f"Paragraph {n} is about something." for n in range(50_000))
        big = {"kind": "document", "content": text[:2_000_000]}
        assert (await server.call("POST", "/memories", big, status=201))["kind"] == "document"
        refused = await server.call("POST", "/memories", big | {"content": text * 2}, status=413)
        assert "MAX_DOCUMENT_BYTES" in refused["hint"]
        long = {"query": "something " * 100_000}
        assert len((await server.call("POST", "/memories/search", long))["data"]) == 10
        assert (
            await server.call("POST", "/memories/search", {"query": "x" * 1_100_000}, status=413)
        )["code"] == "body_too_large"


@pytest.mark.parametrize(
    "query",
    ["", "   ", '"x', "AND OR NOT", "c++ (", "*", "e-mail:", "🙂", "what's", "\u0000", "x'); --"],
)
async def test_any_text_is_a_query(url: str, tmp_path: Path, query: str) -> None:
    async with home(url, tmp_path) as server:
        await server.call("POST", "/memories", FACT, status=201)
        await search(server, query)


async def test_another_tenants_memories_are_not_there(url: str, tmp_path: Path) -> None:
    async with home(url, tmp_path) as server:
        memory = await server.call("POST", "/memories", FACT, status=201)
        other = Tenant("other")
        store = server.parts.memories
        assert await store.search(other, MemoryQuery(query="colour green ada")) == []
        assert (await store.stats(other)).memories == 0
        assert (await server.parts.erasure.erase(other, "ada")).erased == {}
        assert await server.call("GET", f"/memories/{memory['id']}") == memory


async def test_hostile_metadata_is_kept_as_it_is_and_filters_by_it_are_values(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/data/server.db"
    async with home(url, tmp_path) as server:

        @settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
        @given(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
            | st.sampled_from(["$.a", "a' OR 1=1 --", 'a"]', "a.b", "x') OR ('1'='1", "%", "\\"]),
            st.one_of(st.integers(-5, 5), st.text(max_size=5), st.booleans()),
        )
        def check(key: str, value: Any) -> None:
            async def once() -> None:
                body = FACT | {"metadata": {key: value}}
                memory = await server.call("POST", "/memories", body, status=201)
                assert memory["metadata"] == {key: value}
                hit = await search(server, "favourite colour", filter={key: value}, limit=200)
                assert memory["id"] in {one["memory"]["id"] for one in hit}
                assert all(one["memory"]["metadata"][key] == value for one in hit)
                await server.call("DELETE", f"/memories/{memory['id']}")

            asyncio.run_coroutine_threadsafe(once(), loop).result(30)

        loop = asyncio.get_running_loop()
        await asyncio.to_thread(check)
