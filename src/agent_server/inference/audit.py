"""What a replay holds against the record: each question, each call, each offer of tools.

Leans on the words of the ledger. Refuses to answer anything: the recorded answers come from the
ledger, as they do after a crash. While no replay goes on there is no audit, and nothing here runs.
"""

import json
from collections.abc import Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, ReplayDiffers, RunError, error_codes
from agent_server.execution.ports import StepRecord

SHOWN = 300
"""Characters of each side that a difference shows."""


@dataclass
class Audit:
    """Raises ``ReplayDiffers`` at the first difference, and keeps it.

    ``strict`` holds questions and instructions against the record word by word; without it a
    recorded answer counts for whatever is asked at its place. ``visited`` are the steps that the
    replay came by.
    """

    strict: bool = True
    first: ReplayDiffers | None = None
    visited: list[StepRecord] = field(default_factory=list)

    def differ(self, what: str, where: str) -> ReplayDiffers:
        """Note a difference, and give the error to raise."""
        error = ReplayDiffers(f"{where}: {what}")
        if self.first is None:
            self.first = error
        return self.first

    def model(
        self, now: StepRecord, recorded: StepRecord | None, matched: bool, offered: Collection[str]
    ) -> None:
        """The model is about to be asked ``now``; ``recorded`` stands at that place."""
        if recorded is None:
            raise self.differ(
                f"the model would be asked once more than recorded, by {now.agent!r}: "
                f"{_shown(now.input['items'])}",
                now.key,
            )
        if not matched:
            raise self.differ(_asked_otherwise(now, recorded), now.key)
        said_now, said_then = (one.input.get("instructions") for one in (now, recorded))
        if self.strict and said_now != said_then:
            told = _first_change(said_then or "", said_now or "")
            raise self.differ(f"the instructions of {now.agent!r} differ: {told}", now.key)
        self.visited.append(recorded)
        if recorded.status == "failed":
            raise as_raised(recorded.error)
        gone = [name for name in _called(recorded) if name not in offered]
        if gone:
            raise self.differ(
                f"the recorded answer calls {gone[0]!r}, which {now.agent!r} no longer has "
                f"(it has {', '.join(sorted(offered)) or 'no tools'})",
                now.key,
            )

    def tool(self, now: StepRecord, recorded: StepRecord | None, matched: bool) -> None:
        """The tool of ``now`` is about to be called."""
        if recorded is None:
            raise self.differ(
                f"the tool {now.name!r} would be called, which was not recorded, with "
                f"{_shown(now.input)}",
                now.key,
            )
        if not matched and (self.strict or now.name != recorded.name):
            raise self.differ(
                f"the tool {now.name!r} would be called with {_shown(now.input)}; recorded is "
                f"{recorded.name!r} with {_shown(recorded.input)}",
                now.key,
            )
        self.visited.append(recorded)

    def output(self, what: str, now: Any, recorded: Any, where: str) -> None:
        """Something gave ``now``."""
        if self.strict and now != recorded:
            raise self.differ(f"{what} gives {_shown(now)}; recorded is {_shown(recorded)}", where)


AUDIT: ContextVar[Audit | None] = ContextVar("agent_server_audit", default=None)
"""Set while a recorded run is replayed."""


def as_raised(error: ErrorInfo | None) -> RunError:
    """A recorded failure, to be raised again as what it was."""
    if error is None:
        return RunError("The recorded step failed.")
    kind = error_codes().get(error.code, RunError)
    if not issubclass(kind, RunError):
        kind = RunError
    raised = kind(error.message, hint=error.hint)
    raised.errors = error.errors
    return raised


def _called(recorded: StepRecord) -> Iterable[str]:
    output: JsonObject = recorded.output or {}
    for item in output.get("output", ()):
        if isinstance(item, dict) and item.get("type") == "function_call":
            yield str(item.get("name"))


def _asked_otherwise(now: StepRecord, recorded: StepRecord) -> str:
    if now.agent != recorded.agent:
        return f"{now.agent!r} would ask the model; recorded is {recorded.agent!r}"
    asked, before = now.input["items"], (recorded.input or {}).get("items", [])
    for number, (one, other) in enumerate(zip(asked, before, strict=False), start=1):
        if one != other:
            told = _first_change(_text(other), _text(one))
            return f"the model would be asked something else in item {number}: {told}"
    return (
        f"the model would be asked something else: {len(asked)} new items, recorded are "
        f"{len(before)}"
    )


def _first_change(before: str, now: str) -> str:
    """Both texts from shortly before the first place at which they differ."""
    at = next(
        (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b),
        min(len(before), len(now)),
    )
    start = max(0, at - 40)
    cut = "…" if start else ""
    shown = [f"{cut}{text[start : start + SHOWN]}" for text in (now, before)]
    return f"now {shown[0]!r}; recorded is {shown[1]!r}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
