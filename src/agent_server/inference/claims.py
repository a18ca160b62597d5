"""Which recorded step answers which call: the matching that makes replay safe.

Leans on the journal's port. Refuses to know what a model or a tool is: it sees keys, digests of
what was asked, and who asked.

A replayed agent asks the same things again, but side by side calls may ask in another order. A
model call is therefore matched by *what* it asks; only when nothing recorded asked that, by its
place. A tool call is matched by the call id that the (replayed) model gave it.
"""

import structlog

from agent_server.execution.ports import Journal, StepRecord
from agent_server.inference.audit import AUDIT

_log = structlog.get_logger(__name__)


class Ledger:
    """What earlier attempts recorded in one task's journal, and what of it has been claimed."""

    def __init__(self, journal: Journal) -> None:
        self.earlier = dict(journal.recorded())
        self._scopes: dict[str, Scope] = {}

    @classmethod
    def of(cls, journal: Journal) -> "Ledger":
        """The one ledger of ``journal``: agents that run in turn share their claims."""
        ledger = journal.notes
        if not isinstance(ledger, cls):
            ledger = journal.notes = cls(journal)
        return ledger

    def scope(self, prefix: str) -> "Scope":
        """The steps whose keys begin with ``prefix`` (``""`` at the root of a run)."""
        found = self._scopes.get(prefix)
        if found is None:
            found = self._scopes[prefix] = Scope(self, prefix)
        return found


class Scope:
    """The calls of one agent loop; a tool call's own inner loop has a scope of its own."""

    def __init__(self, ledger: Ledger, prefix: str) -> None:
        self.ledger = ledger
        self.prefix = prefix
        self._start = f"{prefix}/" if prefix else ""
        self._claimed: set[str] = set()
        self._calls = 0
        self._by_digest: dict[str, list[str]] = {}
        start = f"{self._start}model/"
        for key, step in ledger.earlier.items():
            if step.input_hash and key.startswith(start) and "/" not in key[len(start) :]:
                self._by_digest.setdefault(step.input_hash, []).append(key)

    @property
    def used(self) -> bool:
        """Whether any call was made here in this attempt."""
        return bool(self._claimed)

    @property
    def replaying(self) -> bool:
        """Whether an answer that was recorded here has not been asked for yet."""
        start = f"{self._start}model/"
        return any(
            step.status == "done" and key not in self._claimed
            for key, step in self.ledger.earlier.items()
            if key.startswith(start) and "/" not in key[len(start) :]
        )

    def model_call(self, digest: str, agent: str) -> tuple[str, StepRecord | None]:
        """The key of a model call, and what an earlier attempt recorded under it, if anything."""
        self._calls += 1
        earlier = self.ledger.earlier
        same = [key for key in self._by_digest.get(digest, ()) if key not in self._claimed]
        if same:
            done = [key for key in same if earlier[key].status == "done"]
            return self._claim((done or same)[0])
        number = self._calls
        key = f"{self._start}model/{number}"
        step = earlier.get(key)
        audit = AUDIT.get()
        if audit is not None and audit.strict:
            return self._claim(key)[0], None  # held against what is recorded there
        if step is not None and key not in self._claimed and step.agent == agent:
            _log.warning(
                "replay.diverged",
                step=key,
                agent=agent,
                detail="the input differs from the recorded one; the recorded answer is kept",
            )
            return self._claim(key)
        while key in earlier or key in self._claimed:
            number += 1
            key = f"{self._start}model/{number}"
        return self._claim(key)

    def tool_call(self, call_id: str, digest: str) -> tuple[str, StepRecord | None]:
        """The key of a tool call, and what an earlier attempt recorded under it, if anything.

        A call id that comes again is another call: models served locally reuse theirs.
        """
        key, step = self._claim(self.next_tool_key(call_id, digest))
        same = step is None or step.input_hash in (None, digest)
        return key, step if same else None

    def next_tool_key(self, call_id: str, digest: str) -> str:
        """The key that ``tool_call`` would give."""
        base = self.tool_key(call_id)
        key, number = base, 1
        while True:
            step = self.ledger.earlier.get(key)
            if key not in self._claimed:
                if step is None or step.input_hash in (None, digest):
                    return key
                if AUDIT.get() is not None:
                    return key
                _log.warning(
                    "replay.diverged",
                    step=key,
                    detail="the arguments differ from the recorded ones; it is another call",
                )
            number += 1
            key = f"{base}~{number}"

    def tool_key(self, call_id: str) -> str:
        """The key of the first call with that id."""
        return f"{self._start}tool/{call_id.replace('/', '_')}"

    def _claim(self, key: str) -> tuple[str, StepRecord | None]:
        self._claimed.add(key)
        return key, self.ledger.earlier.get(key)
