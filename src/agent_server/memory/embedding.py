"""Vectors follow memories: made behind the writes, and moved from one embedder to the next.

Leans on the store and on an embedder. Refuses to hold a write up: a memory is found by its text at
once, and by its vector when ``run`` came round to it. What is without a vector is found by looking,
not by a list of things to do, so that nothing is forgotten in a crash, while the embedder is down,
or when a memory was written by another process.

While memories move to a new embedder, queries are put to both, if the old one can still be made;
the old one's vectors are erased when the new one has seen everything.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import Any

import anyio
import structlog
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    delete,
    insert,
    select,
    text,
    update,
)

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError, ConfigurationError, Unavailable
from agent_server.memory.embedders import Embedder
from agent_server.memory.recall import QueryVector
from agent_server.memory.store import Embeds, MemoryStore
from agent_server.memory.words import text_of
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_embedders as e
from agent_server.storage.tables import memory_vectors as v

log = structlog.get_logger(__name__)

CACHED_QUERIES = 512
QUERY_TIMEOUT_S = 5.0
SILENT_S = 10.0
"""So long queries go without an embedder that one of them waited for in vain."""
LOOK_S = 5.0
"""Seconds until memories of other processes are looked for."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
CONTEXT_CHARS = 300
"""So much of the turn before is embedded with a turn: an answer alone often says nothing."""
MAX_CHARS = 4_000
PROBE = "dimension"
"""A text that any embedder takes."""
MakeEmbedder = Callable[[str, str], Embedder | None]
"""An embedder of that provider and model, for the one that vectors are still kept of."""


class Embedding:
    """``recall.QueryVectors``, and the work behind it: ``run`` as a task, beside the server."""

    configured = True

    def __init__(self, store: MemoryStore, embedder: Embedder, make: MakeEmbedder) -> None:
        self._store = store
        self.embedder = embedder
        self._opened = [embedder]
        self._make = make
        self._number: int | None = None
        self._dimension = 0
        self._before: tuple[int, int, Embedder] | None = None
        """Its number, the dimension of its vectors, and itself."""
        self._wake = anyio.Event()
        self._cache: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._silent_until: dict[int, float] = {}
        """Of embedders that gave a query no answer in time, by number."""
        self.refused: ConfigurationError | None = None
        """Why no vectors are made, if asking again cannot help."""
        self.trouble: str | None = None
        """Why memories are without a vector, as far as it was their embedder."""
        self.because: str | None = "the embedder has not answered yet"
        """Why the last query was without a vector."""
        self._refused_texts: list[str] = []
        """Why, of each memory whose text alone was refused."""
        store.written.append(lambda: self._wake.set())
        store.describe_embedder = self._describe

    async def _describe(self) -> Embeds:
        name = f"{self.embedder.provider}/{self.embedder.model}"
        return Embeds(name, self._number, self.trouble)

    async def of(self, text: str) -> Sequence[QueryVector]:
        asked = [] if self._number is None else [(self._number, self._dimension, self.embedder)]
        if self._before is not None:
            asked.append(self._before)
        found = []
        for number, dimension, embedder in asked:
            vector = await self._query(number, embedder, text[:MAX_CHARS])
            if vector is not None and len(vector) != 4 * dimension:
                self.because = (
                    f"the embedder gave one of {len(vector) // 4} numbers, and memories have "
                    f"{dimension}; restart to embed them anew"
                )
                log.warning("memory.query_of_another_dimension", given=len(vector) // 4)
            elif vector is not None:
                found.append(QueryVector(number, vector))
        return found

    async def _query(self, number: int, embedder: Embedder, text: str) -> bytes | None:
        """The query's vector; None when the embedder fails: text answers alone then."""
        place = (number, text)
        vector = self._cache.get(place)
        if vector is None:
            if monotonic() < self._silent_until.get(number, 0.0):
                return None
            try:
                with anyio.fail_after(QUERY_TIMEOUT_S):
                    [vector] = await embedder.embed([text])
            except TimeoutError:
                self._silent_until[number] = monotonic() + SILENT_S
                self.because = f"the embedder gave none within {QUERY_TIMEOUT_S:g} s"
                log.warning("memory.query_not_embedded", error=self.because)
                return None
            except AgentServerError as error:
                self.because = error.detail.rstrip(".")
                log.warning("memory.query_not_embedded", error=str(error))
                return None
            self._cache[place] = vector
            if len(self._cache) > CACHED_QUERIES:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(place)
        return vector

    async def run(self) -> None:
        """Make vectors until cancelled."""
        pause = FIRST_PAUSE_S
        while True:
            self._wake = anyio.Event()
            try:
                await self.catch_up()
                refused = self._refused_texts
                self.trouble = f"{len(refused)} refused: {refused[0]}" if refused else None
                pause = FIRST_PAUSE_S
                wait = LOOK_S
            except ConfigurationError as error:
                self.refused, self.trouble = error, _told(error)
                log.error("memory.embedder_refused", error=error.detail, hint=error.hint)
                wait = LONGEST_PAUSE_S
            except AgentServerError as error:
                self.trouble = _told(error)
                log.warning("memory.embedder_down", error=error.detail, again_in_s=pause)
                wait, pause = pause, min(pause * 2, LONGEST_PAUSE_S)
            except Exception as error:  # Not to stop for ever, with nobody told why.
                self.trouble = f"{type(error).__name__}: {error}"
                log.exception("memory.embedding_failed", again_in_s=pause)
                wait, pause = pause, min(pause * 2, LONGEST_PAUSE_S)
            with anyio.move_on_after(wait):
                await self._wake.wait()

    async def close(self) -> None:
        for embedder in self._opened:
            await embedder.close()

    async def _register(self) -> None:
        """Find out how long its vectors are, and which embedder's are there."""
        index = self._store.vectors
        if index is None:
            raise ConfigurationError(
                "An embedder is set, but vectors cannot be searched here: "
                f"{(self._store.no_vectors_because or '').rstrip('.')}."
            )
        await self._look_before(index.kept_in)
        try:
            [vector] = await self.embedder.embed([PROBE])
        except AgentServerError as error:
            self.because = error.detail.rstrip(".")
            raise
        here: JsonObject = {
            "provider": self.embedder.provider,
            "model": self.embedder.model,
            "dimension": len(vector) // 4,
            "version": self.embedder.version,
            "kept_in": index.kept_in,
        }
        same = and_(*(e.c[name] == value for name, value in here.items()))

        def transaction(connection: Connection) -> int:
            if connection.dialect.name == "postgresql":
                connection.execute(text("LOCK TABLE memory_embedders IN EXCLUSIVE MODE"))
            number = connection.execute(select(e.c.id).where(same)).scalar()
            if number is None:
                connection.execute(insert(e).values(**here, complete=False))
                number = connection.execute(select(e.c.id).where(same)).scalar_one()
                index.make_room(connection, number, here["dimension"])
            return int(number)

        self._dimension = here["dimension"]
        self._number = await self._store.database.write(transaction)
        await self._look_before(index.kept_in)

    async def _look_before(self, kept_in: str) -> None:
        """Have queries put to the embedder before this one, too, if vectors of it are there; also
        while this one does not answer."""
        mine = and_(
            e.c.provider == self.embedder.provider,
            e.c.model == self.embedder.model,
            e.c.version == self.embedder.version,
        )
        not_mine = ~mine if self._number is None else e.c.id != self._number
        others = select(e).where(not_mine, e.c.kept_in == kept_in)
        others = others.order_by(e.c.complete.desc(), e.c.id.desc())
        before = await self._store.database.read(lambda c: c.execute(others).first())
        if before is not None and (self._before is None or self._before[0] != before.id):
            with suppress(AgentServerError):
                if (old := self._make(before.provider, before.model)) is not None:
                    self._opened.append(old)
                    self._before = (before.id, before.dimension, old)

    async def catch_up(self) -> int:
        """Embed everything that has no vector yet; how many.

        Raises ``Unavailable`` and ``ConfigurationError``, as the embedder does.
        """
        if self._number is None:
            await self._register()
        done = last = 0
        self._refused_texts = []
        while True:
            rows = await self._store.database.read(partial(self._waiting, last=last))
            if not rows:
                break
            last = rows[-1][0].serial
            done += await self._embed(rows)
        await self._completed()
        return done

    def _waiting(self, connection: Connection, last: int) -> list[tuple[Row[Any], str]]:
        """The next rows without a vector, each with the text that is embedded for it."""
        before = m.alias("before")
        turn_before = and_(
            before.c.space == m.c.space,
            before.c.session_id == m.c.session_id,
            before.c.position == m.c.position - 1,
            before.c.replaced_at.is_(None),
        )
        asked = (
            select(
                m.c.serial, m.c.id, m.c.space, m.c.author, m.c.content, m.c.heading,
                before.c.content.label("before"),
            )
            .select_from(m.outerjoin(before, turn_before))
            .where(m.c.serial > last, m.c.searchable, m.c.replaced_at.is_(None),
                   self._vector().is_(None))
            .order_by(m.c.serial)
            .limit(self.embedder.batch)
        )  # fmt: skip
        # Two may have one place in a conversation, as after an import: any of them came before.
        rows: dict[int, Any] = {row.serial: row for row in connection.execute(asked)}
        return [(row, _text(row)) for row in rows.values()]

    def _vector(self) -> ColumnElement[Any]:
        """Of the row of ``m`` at hand, NULL if it has none. Each is looked up by its key: as a join
        PostgreSQL would read all vectors there are, until it has counted them."""
        its = (v.c.embedder == self._number, v.c.space == m.c.space, v.c.serial == m.c.serial)
        return select(v.c.serial).where(*its).scalar_subquery()

    async def _embed(self, rows: Sequence[tuple[Row[Any], str]]) -> int:
        texts = [text for _, text in rows]
        try:
            vectors = await self.embedder.embed(texts)
        except (ConfigurationError, Unavailable) as error:
            await self.embedder.embed([PROBE])  # Raises, too, if it is not about these texts.
            if len(rows) == 1:  # One text that it does not take harms no other.
                self._refused_texts.append(error.detail)
                log.warning("memory.not_embedded", serial=rows[0][0].serial)
                return 0
            half = len(rows) // 2
            return await self._embed(rows[:half]) + await self._embed(rows[half:])
        self._silent_until.clear()
        await self._store.database.write(lambda c: self._keep(c, rows, vectors))
        return len(rows)

    def _keep(
        self, connection: Connection, rows: Sequence[tuple[Row[Any], str]], vectors: list[bytes]
    ) -> None:
        index = self._store.vectors
        assert index is not None and self._number is not None
        if any(len(vector) != 4 * self._dimension for vector in vectors):
            lengths = sorted({len(vector) // 4 for vector in vectors})
            raise Unavailable(
                f"The embedder gave vectors of {lengths} numbers, and {self._dimension} before.",
                hint="Its model was changed behind its name: restart to embed anew.",
            )
        # Locked and looked at again: it may be gone, edited, or embedded by another process, and on
        # SQLite another memory may have the number of one that is gone.
        serials = [row.serial for row, _ in rows]
        live = select(m.c.serial, m.c.id).where(m.c.serial.in_(serials), m.c.replaced_at.is_(None))
        found = {tuple(row) for row in connection.execute(live.with_for_update())}
        wanted = {row.serial for row, _ in rows if (row.serial, row.id) in found}
        there = select(m.c.serial).where(m.c.serial.in_(serials), self._vector().is_not(None))
        wanted -= set(connection.execute(there).scalars())
        index.put(
            connection,
            self._number,
            [
                {
                    "embedder": self._number,
                    "space": row.space,
                    "serial": row.serial,
                    "text_hash": sha256(text.encode("utf-8", "replace")).hexdigest(),
                    "vector": vector,
                }
                for (row, text), vector in zip(rows, vectors, strict=True)
                if row.serial in wanted
            ],
        )

    async def _completed(self) -> None:
        """Everything has a vector: those of other embedders have served."""
        number, old = self._number, e.c.id != self._number

        def transaction(connection: Connection) -> bool:
            done = connection.execute(
                update(e).where(e.c.id == number, ~e.c.complete).values(complete=True)
            ).rowcount
            others = list(connection.execute(select(e.c.id).where(old)).scalars())
            if others:
                if self._store.vectors is not None:
                    self._store.vectors.forget(connection, others)
                connection.execute(delete(v).where(v.c.embedder.in_(others)))
                connection.execute(delete(e).where(old))
            return bool(done or others)

        state = select(e.c.complete, e.c.id).where(old | ~e.c.complete)
        if await self._store.database.read(lambda c: c.execute(state).first()) is None:
            return
        await self._store.database.write(transaction)
        self._before = None  # Closed with the others: a query may be asking it at this moment.


def _told(error: AgentServerError) -> str:
    return f"{error.detail} {error.hint}" if error.hint else error.detail


def _text(row: Row[Any]) -> str:
    said = " ".join((*(row.heading or ()), text_of(row.content)))
    if row.author:
        said = f"{row.author}: {said}"
    if row.before is not None:
        said = f"{text_of(row.before)[-CONTEXT_CHARS:]}\n{said}"
    return said[:MAX_CHARS]
