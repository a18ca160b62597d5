"""The contract suite of long-term memory: what every ``memory.ports.Memories`` must hold.

Subclass ``MemoryStoreContract`` in a test module whose fixture ``store`` gives an empty store.
Leans on pytest with asyncio in ``auto`` mode; refuses to know how the store is built.
"""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection

from agent_server.domain.base import utcnow
from agent_server.domain.errors import Conflict, InvalidCursor, NotFound, PreconditionFailed
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import (
    Memory,
    MemoryChange,
    MemoryFilter,
    MemoryPart,
    MemoryQuery,
    MemorySource,
    MemoryUse,
    NewMemory,
)
from agent_server.memory.ports import Memories

ONE, TWO = Tenant("one"), Tenant("two")
ALL = MemoryFilter()
HOSTILE = (
    "what's c++ and e-mail?",
    'AND OR NOT NEAR( "x',
    "(",
    '"',
    "*",
    "hello OR 1_hello",
    "words:hello",
    "^hello -hello +hello",
    "'; DROP TABLE memories; --",
    "\x00\ud800",
    "",
    " \n",
    "hello " * 50_000,
    "x" * 1_000_000,
)


def fact(content: Any, **more: Any) -> NewMemory:
    return NewMemory(kind=more.pop("kind", "knowledge"), content=content, **more)


async def _search(store: Memories, text: str, tenant: Tenant = ONE, **more: Any) -> list[Memory]:
    found = await store.search(tenant, MemoryQuery(query=text, **more))
    return [one.memory for one in found]


class MemoryStoreContract:
    """One test for each promise."""

    async def test_what_was_written_is_read_and_found(self, store: Memories) -> None:
        source = MemorySource(run_id="run_1", agent="clerk")
        when = datetime(2024, 5, 6, tzinfo=timezone.utc)
        draft = fact(
            {"city": "Lisbon", "since": 2019},
            key="home",
            author="Ana",
            subject="ana",
            metadata={"a": [1, "b"]},
            importance=0.5,
            occurred_at=when,
            source=source,
        )
        [added] = await store.add(ONE, [draft])
        assert added.new
        assert await store.get(ONE, added.memory.id) == added.memory
        assert [m for m in await _search(store, "who lives in LISBON?")] == [added.memory]
        kept = added.memory
        assert (kept.content, kept.source, kept.occurred_at) == (draft.content, source, when)
        assert (kept.version, kept.metadata, kept.subject) == (1, {"a": [1, "b"]}, "ana")

    async def test_no_tenant_sees_anothers(self, store: Memories) -> None:
        [added] = await store.add(ONE, [fact("hello world", session_id="s", subject="x")])
        there = added.memory.id
        assert await _search(store, "hello world", TWO) == []
        assert (await store.page(TWO, ALL, limit=10, cursor=None)).data == ()
        for call in (
            store.get(TWO, there),
            store.history(TWO, there),
            store.neighbours(TWO, there),
            store.used_by(TWO, there),
            store.edit(TWO, there, MemoryChange(content="x"), source=MemorySource()),
        ):
            with pytest.raises(NotFound):
                await call
        assert await store.delete(TWO, [there]) == 0
        assert await store.delete_where(TWO, MemoryFilter(subject="x")) == 0
        assert (await store.stats(TWO)).memories == 0
        assert (await store.get(ONE, there)).content == "hello world"

    async def test_the_same_ids_of_two_tenants_are_two_memories_in_every_call(
        self, store: Memories
    ) -> None:
        whole, piece = "mem_whole", "mem_piece"
        part = MemoryPart(memory_id=whole, index=0)

        def imported(word: str) -> list[NewMemory]:
            return [
                fact(f"{word} doc", kind="document", id=whole, key="k", subject="ada"),
                fact(f"{word} zeppelin", kind="document", id=piece, part_of=part, subject="ada"),
            ]

        def use(run: str) -> MemoryUse:
            return MemoryUse(
                memory_id=piece, run_id=run, step_id="1", query="q", score=1.0, at=utcnow()
            )

        async def seen(tenant: Tenant) -> tuple[object, ...]:
            every = MemoryFilter(replaced=True)
            return (
                [m async for m in store.export(tenant, every)],
                [await store.history(tenant, one) for one in (whole, piece)],
                await store.used_by(tenant, piece),
                await _search(store, "zeppelin doc", tenant, mode="text"),
                (await store.stats(tenant)).by_kind,
            )

        for tenant, word in ((ONE, "red"), (TWO, "blue")):
            added = await store.add(tenant, imported(word))
            assert [one.new for one in added] == [True, True]
            assert added[0].memory.content == f"{word} doc"
            again = await store.add(tenant, imported("other"))
            assert [(one.new, one.memory.content.split()[0]) for one in again] == [
                (False, word)
            ] * 2
            await store.used(tenant, [use(f"run_{word}")])
        hers = await seen(TWO)
        change = MemoryChange(content="red again")
        await store.edit(ONE, piece, change, source=MemorySource())
        assert await seen(TWO) == hers
        await store.add(ONE, [fact("newer doc", key="k", id="mem_newer")])
        assert (await store.get(ONE, piece)).superseded_by == "mem_newer"
        assert await seen(TWO) == hers
        soon = utcnow() + timedelta(seconds=5)
        await store.edit(ONE, "mem_newer", MemoryChange(expires_at=soon), source=MemorySource())
        await store.add(TWO, [fact("stays", id="mem_newer")])
        hers = await seen(TWO)
        assert await store.sweep(soon + timedelta(seconds=1)) == 1
        assert await seen(TWO) == hers
        assert await store.delete(ONE, [whole]) == 1
        assert (await store.stats(ONE)).memories == 0
        assert await seen(TWO) == hers
        await store.add(ONE, imported("third"))
        assert await store.delete_where(ONE, MemoryFilter(subject="ada", parts=True)) == 2
        assert await seen(TWO) == hers

    async def test_what_expired_of_one_tenant_leaves_the_same_id_of_another(
        self, store: Memories
    ) -> None:
        gone = {"expires_at": utcnow() - timedelta(seconds=1)}
        await store.add(ONE, [fact("a", id="mem_a", **gone), fact("b", id="mem_b")])
        await store.add(TWO, [fact("a", id="mem_a"), fact("b", id="mem_b", **gone)])
        assert await store.sweep(utcnow()) == 2
        assert [m.id async for m in store.export(ONE, ALL)] == ["mem_b"]
        assert [m.id async for m in store.export(TWO, ALL)] == ["mem_a"]

    async def test_any_text_is_a_query_that_stays_in_its_namespace(self, store: Memories) -> None:
        await store.add(TWO, [fact("hello there")])
        await store.add(ONE, [fact("hello me"), fact("hello you", namespace="other")])
        for query in HOSTILE:
            found = await _search(store, query, namespace="default", mode="text")
            assert [m.content for m in found] == (["hello me"] if "hello" in query else []), query
            # Vectors are near to something whatever is asked, but only in that namespace.
            near = await _search(store, query, namespace="default")
            assert {m.content for m in near} <= {"hello me"}, query
            await store.page(ONE, MemoryFilter(q=query), limit=5, cursor=None)

    async def test_words_of_many_languages_are_found(self, store: Memories) -> None:
        asked = [
            ("我在北京住了三年", "北京"),
            ("昨日は東京でラーメンを食べた", "東京のラーメン"),
            ("어제 서울에서 만났다", "서울"),
            ("she was happy 🎉 about it", "🎉"),
            ("Das Café in Zürich schließt", "cafe zurich schliesst"),
            ("they were running late", "run"),
            ("The Who are playing", "the who"),
            ("南方", "南"),
        ]
        await store.add(ONE, [*(fact(content) for content, _ in asked), fact("something else")])
        for content, query in asked:
            assert (await _search(store, query))[0].content == content, query

    async def test_one_rare_word_of_many_is_enough(self, store: Memories) -> None:
        await store.add(ONE, [fact("the zeppelin landed"), *(fact(f"line {i}") for i in range(30))])
        found = await _search(store, "tell me about every zeppelin that anybody mentioned")
        assert found[0].content == "the zeppelin landed"

    async def test_a_key_is_superseded_and_what_was_known_then_is_still_known(
        self, store: Memories
    ) -> None:
        early = utcnow() - timedelta(days=2)
        [old] = await store.add(ONE, [fact("Ana lives in Porto", key="home", created_at=early)])
        [new] = await store.add(ONE, [fact("Ana lives in Faro", key="home")])
        assert new.memory.supersedes == old.memory.id
        assert [m.content for m in await _search(store, "where does Ana live")] == [
            "Ana lives in Faro"
        ]
        then = await _search(store, "where does Ana live", as_of=early + timedelta(days=1))
        assert [m.content for m in then] == ["Ana lives in Porto"]
        before = await _search(store, "where does Ana live", as_of=early - timedelta(days=1))
        assert before == []
        assert (await store.get(ONE, old.memory.id)).superseded_by == new.memory.id
        with pytest.raises(Conflict):
            await store.edit(ONE, old.memory.id, MemoryChange(content="x"), source=MemorySource())

    async def test_what_was_said_again_and_again_takes_the_place_of_nothing_else(
        self, store: Memories
    ) -> None:
        again = [fact("The kiln is hot", author=name) for name in ("ada", "bob") for _ in range(90)]
        others = [fact(f"The kiln was hot on day {n} of the long first firing") for n in range(12)]
        for part in (again[:90], again[90:], others):
            await store.add(ONE, part)
        found = await _search(store, "kiln hot", limit=10)
        assert len({(one.content, one.author) for one in found}) == len(found) == 10
        assert {one.author for one in found} >= {"ada", "bob"}

    async def test_whoever_is_spared_keeps_its_key_and_the_other_is_kept_without_one(
        self, store: Memories
    ) -> None:
        run = MemorySource(run_id="run_1")
        others, both = frozenset({"others"}), frozenset({"others", "people"})
        ada = fact("green", key="colour", subject="ada", source=run)
        [hers] = await store.add(ONE, [ada])
        bob = ada.model_copy(update={"id": "mem_bob", "subject": "bob", "spares": others})
        for new in (True, False):  # Repeated it finds its own.
            [his] = await store.add(ONE, [bob])
            assert (his.new, his.memory.id, his.memory.key) == (new, "mem_bob", None)
        assert (await store.get(ONE, hers.memory.id)).replaced_at is None
        hers_now = ada.model_copy(update={"content": "red", "spares": both})
        [later] = await store.add(ONE, [hers_now])
        assert later.memory.supersedes == hers.memory.id
        [written] = await store.add(ONE, [fact("blue", key="colour")])
        [spared] = await store.add(ONE, [hers_now.model_copy(update={"content": "grey"})])
        assert (spared.memory.key, spared.memory.supersedes) == (None, None)
        assert (await store.get(ONE, written.memory.id)).replaced_at is None

    async def test_the_same_under_the_same_key_or_id_is_written_once(self, store: Memories) -> None:
        [first] = await store.add(
            ONE,
            [
                fact("same", key="k"),
            ],
        )
        [again] = await store.add(ONE, [fact("same", key="k")])
        assert not again.new and again.memory.id == first.memory.id
        twice = await store.add(ONE, [fact("b", id="mem_given"), fact("b", id="mem_given")])
        assert [one.new for one in twice] == [True, False]
        three = await store.add(ONE, [fact("1", key="z"), fact("2", key="z"), fact("3", key="z")])
        assert [one.new for one in three] == [True] * 3
        page = await store.page(ONE, MemoryFilter(key="z"), limit=9, cursor=None)
        assert [m.content for m in page.data] == ["3"]
        whole = await store.page(ONE, MemoryFilter(key="z", replaced=True), limit=9, cursor=None)
        assert {m.content for m in whole.data} == {"1", "2", "3"}

    async def test_an_edit_keeps_history_and_refuses_a_stale_version(self, store: Memories) -> None:
        [added] = await store.add(ONE, [fact("red car", session_id="s", author="Ana")])
        there = added.memory.id
        edited = await store.edit(
            ONE,
            there,
            MemoryChange(content="blue car", importance=1),
            source=MemorySource(principal="bob"),
            expected_version=1,
        )
        assert (edited.version, edited.position, edited.author) == (2, 0, "Ana")
        assert edited.created_at == added.memory.created_at
        assert [m.content for m in await store.history(ONE, there)] == ["red car", "blue car"]
        assert await _search(store, "red", mode="text") == []
        assert [m.id for m in await _search(store, "blue", mode="text")] == [there]
        with pytest.raises(PreconditionFailed):
            await store.edit(
                ONE, there, MemoryChange(content="x"), source=MemorySource(), expected_version=1
            )
        with pytest.raises(PreconditionFailed):
            await store.delete(ONE, [there], expected_version=1)

    async def test_what_is_about_others_takes_no_place_in_an_answer(self, store: Memories) -> None:
        others = [fact(f"secret word {i}", subject="bob") for i in range(200)]
        mine = [fact("a secret of some more words", subject="ana"), fact("and a secret of nobody")]
        await store.add(ONE, [*others, *mine])
        for mode in ("text", "hybrid"):
            found = await _search(store, "secret word", for_subject="ana", limit=2, mode=mode)
            assert {memory.subject for memory in found} == {"ana", None}

    async def test_a_deletion_reaches_versions_pieces_uses_and_indexes(
        self, store: Memories
    ) -> None:
        [whole] = await store.add(ONE, [fact("doc", kind="document", searchable=False)])
        part = MemoryPart(memory_id=whole.memory.id, index=0, heading=("Intro",))
        [piece] = await store.add(ONE, [fact("a zeppelin", kind="document", part_of=part)])
        await store.edit(
            ONE, piece.memory.id, MemoryChange(content="two zeppelins"), source=MemorySource()
        )
        use = MemoryUse(
            memory_id=piece.memory.id, run_id="r", step_id="1", query="q", score=1.0, at=utcnow()
        )
        await store.used(ONE, [use, use])
        assert await store.used_by(ONE, piece.memory.id) == [use]
        assert [m.part_of for m in await _search(store, "intro")] == [part]
        assert (await store.page(ONE, ALL, limit=9, cursor=None)).data == (whole.memory,)
        assert await store.delete(ONE, [whole.memory.id, "mem_unknown"]) == 1
        assert await _search(store, "zeppelin intro") == []
        with pytest.raises(NotFound):
            await store.get(ONE, piece.memory.id)

    async def test_what_is_erased_before_its_use_is_noted_is_not_used(
        self, store: Memories
    ) -> None:
        kept, gone = await store.add(ONE, [fact("kept"), fact("gone")])
        await store.delete(ONE, [gone.memory.id])
        uses = [
            MemoryUse(
                memory_id=one.memory.id, run_id="r", step_id="1", query="q", score=1.0, at=utcnow()
            )
            for one in (kept, gone)
        ]

        def refuses(transaction: Connection) -> None:
            raise Conflict("erased")

        with pytest.raises(Conflict):
            await store.used(ONE, uses, fence=refuses)
        assert await store.used_by(ONE, kept.memory.id) == []
        assert await store.used(TWO, uses) == set()
        assert await store.used(ONE, uses) == {kept.memory.id}
        assert await store.used_by(ONE, kept.memory.id) == uses[:1]
        with pytest.raises(Conflict):
            change = MemoryChange(content="changed")
            await store.edit(ONE, kept.memory.id, change, source=MemorySource(), fence=refuses)
        assert (await store.get(ONE, kept.memory.id)).content == "kept"

    async def test_pages_follow_each_other_without_gap_or_repetition(self, store: Memories) -> None:
        await store.add(ONE, [fact(f"n{i}", metadata={"i": i}) for i in range(25)])
        seen: list[str] = []
        cursor = None
        while True:
            page = await store.page(ONE, ALL, limit=7, cursor=cursor)
            seen += [m.id for m in page.data]
            if (cursor := page.next_cursor) is None:
                break
        assert len(seen) == len(set(seen)) == 25
        exported = [m async for m in store.export(ONE, ALL, batch=10)]
        assert [m.id for m in exported] == [
            m.id for m in sorted(exported, key=lambda m: int(m.metadata["i"]))
        ]
        assert {m.id for m in exported} == set(seen)
        with pytest.raises(InvalidCursor):
            await store.page(ONE, ALL, limit=5, cursor="nonsense")

    async def test_filters_compare_values_whatever_the_key_says(self, store: Memories) -> None:
        hostile = "a'] ) OR 1=1 --"
        await store.add(
            ONE,
            [
                fact("red apple", metadata={hostile: "x", "tags": ["a", "b"], "n": 1}),
                fact("green apple", metadata={hostile: "y", "n": 2, "flag": True}),
                fact("apple pie", kind="message", session_id="s", subject="ana"),
            ],
        )

        async def found(**more: Any) -> set[str]:
            return {m.content for m in await _search(store, "apple", **more)}

        assert await found(filter={hostile: "x"}) == {"red apple"}
        assert await found(filter={"tags": "b"}) == {"red apple"}
        assert await found(filter={"n": [1, 2.0]}) == {"red apple", "green apple"}
        assert await found(filter={"flag": True}) == {"green apple"}
        assert await found(filter={"flag": 1}) == set()
        assert await found(filter={"x' OR '1'='1": "x"}) == set()
        assert await found(kinds=["message"]) == {"apple pie"}
        assert await found(session_id="s") == await found(subject="ana") == {"apple pie"}
        assert await found(limits={"knowledge": 1}) >= {"apple pie"}
        assert len(await found(limits={"knowledge": 1})) == 2
        assert len(await found(limit=1)) == 1

    async def test_what_expired_is_not_found_and_is_swept(self, store: Memories) -> None:
        soon = utcnow() + timedelta(days=1)
        gone = utcnow() - timedelta(seconds=1)
        await store.add(ONE, [fact("old news", expires_at=gone), fact("news", expires_at=soon)])
        assert [m.content for m in await _search(store, "news")] == ["news"]
        assert await store.sweep(utcnow()) == 1
        assert await store.sweep(utcnow()) == 0
        assert (await store.stats(ONE)).memories == 1
        # What was superseded expires as well; of an edited one, the version that holds decides.
        old = await store.add(ONE, [fact("old home", key="home", expires_at=soon)])
        await store.add(ONE, [fact("new home", key="home")])
        [late] = await store.add(ONE, [fact("a visit", expires_at=soon)])
        await store.edit(ONE, late.memory.id, MemoryChange(expires_at=None), source=MemorySource())
        assert await store.sweep(soon) == 2, "the news and the old home"
        with pytest.raises(NotFound):
            await store.get(ONE, old[0].memory.id)
        assert (await store.get(ONE, late.memory.id)).version == 2

    async def test_an_edit_of_a_document_reaches_its_pieces(self, store: Memories) -> None:
        whole = fact("All of it.", kind="document", id="mem_0", searchable=False)
        pieces = [
            fact(
                f"piece {n} of the guide",
                kind="document",
                id=f"mem_1{n}",
                part_of=MemoryPart(memory_id="mem_0", index=n),
                metadata={"page": n},
            )
            for n in range(3)
        ]
        await store.add(ONE, [whole, *pieces])
        change = MemoryChange(subject="ada", metadata={"shelf": "a"})
        await store.edit(ONE, "mem_0", change, source=MemorySource())
        assert await _search(store, "guide", for_subject="bob") == []
        found = await _search(store, "guide", for_subject="ada", filter={"shelf": "a"})
        assert {(m.content, m.metadata["page"]) for m in found} == {
            (f"piece {n} of the guide", n) for n in range(3)
        }

    async def test_neighbours_are_those_of_the_conversation_in_order(self, store: Memories) -> None:
        turns = [fact(f"turn {i}", kind="message", session_id="s") for i in range(6)]
        added = await store.add(ONE, turns[:3]) + await store.add(ONE, turns[3:])
        assert [a.memory.position for a in added] == list(range(6))
        near = await store.neighbours(ONE, added[3].memory.id, before=2, after=1)
        assert [m.content for m in near] == ["turn 1", "turn 2", "turn 4"]

    async def test_the_answer_is_found_beside_the_question(self, store: Memories) -> None:
        talk = [
            "How is work?",
            "Which instrument do you play?",
            "The cello, since I was six.",
            "Oh!",
        ]
        await store.add(
            ONE,
            [fact(text, kind="message", session_id="s1") for text in talk]
            + [fact(f"I like tea number {i}", kind="message", session_id="s2") for i in range(9)],
        )
        found = await store.search(ONE, MemoryQuery(query="which instrument is played?"))
        assert "The cello, since I was six." in [one.memory.content for one in found[:3]]
        answer = next(one for one in found if "cello" in one.memory.content)
        assert set(answer.matched) >= {"neighbours"}
        assert answer.score == pytest.approx(sum(answer.matched.values()), abs=1e-4)

    async def test_a_named_author_and_a_named_date_count_softly(self, store: Memories) -> None:
        def said(author: str, month: int) -> NewMemory:
            when = datetime(2024, month, 5, tzinfo=timezone.utc)
            return fact(f"I went hiking, says {author[0]}{month}", author=author, occurred_at=when)

        await store.add(ONE, [said(a, n) for a in ("Ana", "Ben") for n in (2, 7)])
        found = await _search(store, "When did Ben go hiking in July?")
        assert (found[0].author, found[0].occurred_at and found[0].occurred_at.month) == ("Ben", 7)
        assert len(found) == 4

    async def test_a_message_that_only_asks_comes_behind_one_that_says(
        self, store: Memories
    ) -> None:
        asks, says = "You painted the fence?", "We painted the fence white this week."
        for kind, first in (("message", says), ("knowledge", asks)):
            await store.add(ONE, [fact(one, kind=kind, namespace=kind) for one in (says, asks)])
            found = await _search(store, "painted fence", namespace=kind)
            assert (found[0].content, len(found)) == (first, 2)
        [message, _] = await _search(store, "painted fence", namespace="message")
        asking = MemoryChange(content="Have we painted the fence white this week?")
        await store.edit(ONE, message.id, asking, source=MemorySource())
        found = await _search(store, "painted fence", namespace="message")
        assert found[0].content == "You painted the fence?"

    async def test_recency_and_importance_count_only_when_asked(self, store: Memories) -> None:
        def plan(year: int, importance: float) -> NewMemory:
            when = datetime(year, 1, 1, tzinfo=timezone.utc)
            return fact(f"the plan of {year}", occurred_at=when, importance=importance)

        await store.add(ONE, [plan(2021, 0.1), plan(2022, 0.9), plan(2023, 0.2)])
        plain = await store.search(ONE, MemoryQuery(query="the plan"))
        assert all({"recency", "importance"}.isdisjoint(one.matched) for one in plain)
        assert (await _search(store, "the latest plan"))[0].content == "the plan of 2023"
        assert (await _search(store, "plan", recency=1.0))[0].content == "the plan of 2023"
        assert (await _search(store, "plan", importance=1.0))[0].content == "the plan of 2022"

    async def test_one_subject_is_erased_entirely(self, store: Memories) -> None:
        await store.add(
            ONE,
            [fact("ana's secret", subject="ana", key="k"), fact("ben's secret", subject="ben")],
        )
        await store.add(ONE, [fact("ana's new secret", subject="ana", key="k")])
        assert await store.delete_where(ONE, MemoryFilter(subject="ana")) == 2
        assert [m.content for m in await _search(store, "secret")] == ["ben's secret"]
        left = await store.page(ONE, MemoryFilter(replaced=True), limit=9, cursor=None)
        assert [m.subject for m in left.data] == ["ben"]

    async def test_the_same_wording_is_answered_once(self, store: Memories) -> None:
        await store.add(ONE, [fact("same words"), fact("Same words!"), fact("words")])
        assert len(await _search(store, "same words")) == 2
