"""Values at the edge of what is allowed: kept and read again, or refused; never a failure."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.memory.kit import home

FIRST, LAST = "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"
KEPT: tuple[dict[str, Any], ...] = (
    {"created_at": "9999-12-31T23:59:59Z", "occurred_at": "0001-01-01T00:00:00Z"},
    {"created_at": "2026-01-01T00:00:00+05:30"},
    {"metadata": {"n": 10**30, "\0": "\0", "a": {"b": [1, None, 1.5e300]}, "": ""}},
    {"key": "🙂" * 500, "namespace": "\u202e", "session_id": "../..", "author": ""},
    {"subject": "a\nb", "session_id": "s", "position": 10**9},
    {"session_id": "s"},
    {"content": 10**400},
    {"content": {"": {"": []}}},
    {"content": False},
    {"content": "\0apple \x85\u2028"},
)
REFUSED: tuple[dict[str, Any], ...] = (
    {"created_at": FIRST},
    {"expires_at": LAST},
    {"occurred_at": FIRST},
    {"occurred_at": "2026-01-01T00:00:00"},
    {"position": 1},
    {"session_id": "s", "position": 10**9 + 1},
    {"author": "\0"},
    {"importance": 2},
)
SEARCHES: tuple[dict[str, Any], ...] = (
    {"as_of": "9999-12-31T23:59:59Z"},
    {"filter": {"n": 10**30, "\0": "\0"}},
    {"filter": {"a": {"b": [1, None, 1.5e300]}}},
    {"filter": {"a": [], "": None}},
    {"filter": {"x" * 10_000: "y" * 10_000}},
    {"limits": {"knowledge": 0}},
    {"limits": {"knowledge": 10**30}},
    {"kinds": []},
    {"query": "\0 latest yesterday 2024-02-30 9999-12-31 in 1999", "recency": 1, "importance": 1},
)
LISTS = ("memories", "memories?replaced=true", "memories/export", "memories/stats")
NUL = ("memories?q=%00", "memories?key=%00", "memories/export?subject=%00", "memories?run_id=%00")


async def test_no_value_that_is_allowed_makes_a_memory_that_cannot_be_read(
    url: str, tmp_path: Path
) -> None:
    async with home(url, tmp_path) as server:

        async def call(method: str, path: str, body: Any = None) -> Any:
            content = json.dumps(body) if body is not None else None  # as a client may spell it
            headers = {"content-type": "application/json"}
            path = f"/api/v1/{path}"
            return await server.http.request(method, path, content=content, headers=headers)

        for fields in KEPT:
            written = await call("POST", "memories", {"kind": "knowledge", "content": "x"} | fields)
            assert written.status_code == 201, (fields, written.text)
            read = await call("GET", f"memories/{written.json()['id']}")
            assert read.json() == written.json()
            for name in fields.keys() & {"content", "metadata", "key", "subject", "position"}:
                assert read.json()[name] == fields[name]
            if "created_at" in fields:
                told = datetime.fromisoformat(read.json()["created_at"].replace("Z", "+00:00"))
                assert told == datetime.fromisoformat(fields["created_at"].replace("Z", "+00:00"))
                assert told.tzinfo == timezone.utc
        for fields in REFUSED:
            answer = await call("POST", "memories", {"kind": "knowledge", "content": "x"} | fields)
            assert (answer.status_code, len(answer.json()["errors"])) == (422, 1), answer.text
        for fields in SEARCHES:
            found = await call("POST", "memories/search", {"query": "apple x"} | fields)
            assert found.status_code == 200, (fields, found.text)
        for name in ("namespace", "session_id", "subject", "for_subject"):
            odd = await call("POST", "memories/search", {"query": "x", name: "a\0"})
            assert odd.status_code == 422, odd.text
        for moment in (FIRST, LAST, "2026-01-01T00:00:00", "yesterday"):
            late = await call("POST", "memories/search", {"query": "x", "as_of": moment})
            assert late.status_code == 422, late.text
            later = await call(
                "POST", "runs", {"agent": "clerk", "input": "x", "start_after": moment}
            )
            assert later.status_code == 422, later.text
        for change in ({"author": "\0"}, {"subject": "\ud800"}, {"occurred_at": FIRST}):
            edited = await call("PATCH", f"memories/{read.json()['id']}", change)
            assert edited.status_code in (400, 422), edited.text
        for odd_name in ("\0", ""):
            odd = await call("POST", "runs", {"agent": "clerk", "input": "x", "subject": odd_name})
            assert odd.status_code == 422, (odd_name, odd.text)
        for path in LISTS:
            listed = await call("GET", path)
            assert listed.status_code == 200, path
        assert len((await call("GET", LISTS[1])).json()["data"]) == len(KEPT)
        assert {(await call("GET", path)).status_code for path in NUL} == {422}
        gone = await call("DELETE", "subjects/a%0Ab")
        assert gone.status_code == 200 and gone.json()["erased"]["memories"] == 1, gone.text


@pytest.mark.parametrize("zone", ["+00:00", "+05:30", "-08:00"])
async def test_what_was_known_then_does_not_depend_on_the_zone_in_which_it_is_asked(
    url: str, tmp_path: Path, zone: str
) -> None:
    async with home(url, tmp_path) as server:
        fact = {"kind": "knowledge", "content": "an apple"}
        one = await server.call("POST", "/memories", fact, status=201)
        at = datetime.fromisoformat(one["created_at"].replace("Z", "+00:00"))
        local = at.astimezone(datetime.fromisoformat(f"2026-01-01T00:00:00{zone}").tzinfo)
        asked = {"query": "apple", "as_of": local.isoformat()}
        assert (await server.call("POST", "/memories/search", asked))["data"]
        asked["as_of"] = local.replace(year=local.year - 1).isoformat()
        assert (await server.call("POST", "/memories/search", asked))["data"] == []
