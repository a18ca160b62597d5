"""Replays exported runs against the present code: offline, the same way each time.

Leans on the server's own parts, of which it opens no database and asks no model, and on the recorded
context. Refuses to guess: a question that was not recorded ends the replay with that difference.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from agents import Model
from pydantic import Field, ValidationError

from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.errors import (
    InvalidRequest,
    ReplayDiffers,
    UnknownModel,
    error_info,
)
from agent_server.domain.history import EXPORT_FORMAT, EXPORT_VERSION, RunExport
from agent_server.domain.ids import DEFAULT_TENANT, RunId, Tenant
from agent_server.domain.json_schema import schema_fault
from agent_server.domain.runs import RunRequest, RunStatus
from agent_server.execution.ports import FinalOutput, RunSnapshot, Suspend
from agent_server.inference.audit import AUDIT, Audit
from agent_server.inference.models import make_usage
from agent_server.inference.providers import Providers
from agent_server.inference.replaying import CARRIED_OUT, Record, ReplayContext
from agent_server.memory.session_store import SessionStore
from agent_server.reasoning.fit import fit
from agent_server.server import Parts, build_parts
from agent_server.settings import Settings

SUFFIX = ".run.json"
"""How the file of a regression test is called."""
FOLDER = Path("tests") / "recorded"


class Checks(Frozen):
    """What a regression test asks, instead of the same in everything.

    A recorded answer then counts for whatever is asked at its place.
    """

    output_equals: Any = None
    output_contains: str | None = None
    output_schema: JsonObject | None = None
    max_model_calls: int | None = Field(default=None, ge=0)
    max_tool_calls: int | None = Field(default=None, ge=0)
    max_cost_usd: Decimal | None = Field(default=None, ge=0)
    """At the present prices."""
    tools: tuple[str, ...] | None = None
    """The tools that are called, in this order; others may be called between them."""


@dataclass(frozen=True)
class Report:
    """What a replay found. ``difference`` is the first one; ``failures`` are checks that failed."""

    run_id: str
    difference: str | None = None
    failures: tuple[str, ...] = ()
    model_calls: int = 0
    tool_calls: int = 0
    cost_usd: Decimal | None = None
    output: Any = None

    @property
    def ok(self) -> bool:
        return self.difference is None and not self.failures


def read_export(path: Path) -> RunExport:
    """The export in the file. Raises ``InvalidRequest`` that says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{str(path)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict) or value.get("format") != EXPORT_FORMAT:
        raise InvalidRequest(
            f"{str(path)!r} is not an exported run.",
            hint="`agent-server runs export RUN` writes one.",
        )
    if value.get("version") != EXPORT_VERSION:
        raise InvalidRequest(
            f"{str(path)!r} has the version {value.get('version')!r} of the format; this program "
            f"reads {EXPORT_VERSION}.",
            hint="Export the run again.",
        )
    try:
        return RunExport.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{str(path)!r} is damaged at {where}: {first['msg']}.") from error


class Replayer:
    """The present code, loaded once, against which any number of runs is replayed."""

    def __init__(self, parts: Parts, conversations: "_Conversations") -> None:
        self._parts = parts
        self._conversations = conversations

    async def replay(self, export: RunExport) -> Report:
        """Run the code against the record. Raises ``InvalidRequest`` for what cannot be replayed:
        a run that did not come to an end of its own, or whose content was taken out."""
        run = export.run
        if export.redacted == "content":
            raise InvalidRequest(
                f"The content of {run.id!r} was taken out: there is nothing to replay.",
                hint="Export it without `redact`, or with `redact=secrets`.",
            )
        if run.status not in (RunStatus.SUCCEEDED, RunStatus.FAILED):
            raise InvalidRequest(
                f"The run {run.id!r} is {run.status.value}: only a run that succeeded or failed "
                "has an end to compare with.",
            )
        checks = None if export.checks is None else _checks(export.checks)
        audit = Audit(strict=checks is None)
        record = Record(export)
        request = RunRequest.model_validate(export.request)
        handler = self._parts.engine.handlers.get(f"run.{run.kind}")
        snapshot = RunSnapshot(
            id=RunId(run.id), tenant=DEFAULT_TENANT, request=request, created_at=run.created_at
        )
        root = record.tasks.get("")
        if handler is None or root is None:
            raise InvalidRequest(f"The export of {run.id!r} has no root task.")
        context = ReplayContext(snapshot, record, audit, self._parts.engine.handlers, root)
        self._conversations.items = list(export.session)
        outcome = await self._outcome(handler, context, audit)
        difference = str(audit.first.detail) if audit.first is not None else None
        if difference is None:
            difference = _end(export, outcome, strict=checks is None)
        if difference is None and checks is None:
            difference = _left(record, audit)
        report = self._report(export, audit, outcome)
        failures = () if checks is None else tuple(_failures(checks, report, audit))
        return replace(report, difference=difference, failures=failures)

    async def _outcome(self, handler: Any, context: ReplayContext, audit: Audit) -> "_Outcome":
        token = AUDIT.set(audit)
        try:
            output = await handler(context)
        except ReplayDiffers:
            return _Outcome(RunStatus.FAILED)
        except Suspend as pause:
            audit.differ(f"it would stand still ({pause.waiting_for.detail})", "the run")
            return _Outcome(RunStatus.WAITING)
        except Exception as error:
            return _Outcome(RunStatus.FAILED, error=error)
        finally:
            AUDIT.reset(token)
        value = output.value if isinstance(output, FinalOutput) else output
        return _Outcome(RunStatus.SUCCEEDED, json.loads(json.dumps(value)))

    def _report(self, export: RunExport, audit: Audit, outcome: "_Outcome") -> Report:
        models = [step for step in audit.visited if step.kind == "model"]
        prices = self._parts.prices
        costs = [
            prices.cost_usd(step.name, make_usage(**step.output["usage"]))
            for step in models
            if step.output is not None
        ]
        known = [cost for cost in costs if cost is not None]
        return Report(
            export.run.id,
            model_calls=len(models),
            tool_calls=len(audit.visited) - len(models),
            cost_usd=sum(known, Decimal(0)) if known and len(known) == len(costs) else None,
            output=outcome.output,
        )


@asynccontextmanager
async def replayer(settings: Settings) -> AsyncIterator[Replayer]:
    """Load the agents that ``settings`` name. Raises ``AgentsFileError`` if one cannot be."""
    conversations = _Conversations()
    parts = build_parts(
        settings.model_copy(update={"reload": False}), _NoModels(settings), sessions=conversations
    )
    await parts.registry.load()
    try:
        yield Replayer(parts, conversations)
    finally:
        await parts.registry.close()
        await parts.providers.aclose()


def as_test(export: RunExport, checks: Checks | None = None) -> RunExport:
    """``export`` as a regression test: exact, or with ``checks``."""
    given = None if checks is None else checks.model_dump(mode="json", exclude_none=True)
    return export.model_copy(update={"checks": given or None})


def recorded_tests(paths: Sequence[Path]) -> list[Path]:
    """The files of regression tests in ``paths``, which are files or folders, in order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(path.rglob(f"*{SUFFIX}"))
        elif path.exists():
            found.append(path)
        else:
            raise InvalidRequest(
                f"There is no {str(path)!r}.", hint="`agent-server test add RUN` makes a test."
            )
    return found


class _Conversations(SessionStore):
    """Sessions as they were before the recorded run."""

    def __init__(self) -> None:
        self.items: list[JsonObject] = []

    def of(self, tenant: Tenant) -> Any:
        return _Conversation(self.items)


@dataclass(frozen=True)
class _Conversation:
    told: list[JsonObject] = field(default_factory=list)

    async def items(self, session_id: str) -> list[JsonObject]:
        return self.told


class _Silent(Model):
    """A model that is never asked."""

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        raise UnknownModel("A replay asks no model.")

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise UnknownModel("A replay asks no model.")


class _NoModels(Providers):
    """Every name is the silent model's."""

    def get_model(self, model_name: str | None = None) -> Model:
        return _Silent()


@dataclass(frozen=True)
class _Outcome:
    status: RunStatus
    output: Any = None
    error: Exception | None = None


def _checks(given: JsonObject) -> Checks:
    try:
        checks = Checks.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"The checks are not valid at {where}: {first['msg']}.") from error
    if checks.output_schema is not None:
        fault = schema_fault(checks.output_schema)
        if fault is not None:
            raise InvalidRequest(f"output_schema is not a JSON Schema: {fault}")
    return checks


def _end(export: RunExport, outcome: _Outcome, *, strict: bool) -> str | None:
    """How the end differs, if it does."""
    run = export.run
    if outcome.status is not run.status:
        why = f": {error_info(outcome.error).message}" if outcome.error is not None else ""
        return f"the run ends as {outcome.status.value}{why}; recorded is {run.status.value}"
    if outcome.error is not None and run.error is not None:
        info = error_info(outcome.error)
        if strict and (info.code, info.message) != (run.error.code, run.error.message):
            return f"the run fails with {info.message!r}; recorded is {run.error.message!r}"
    if strict and outcome.output != run.output:
        now, then = (json.dumps(value)[:300] for value in (outcome.output, run.output))
        return f"the output is {now}; recorded is {then}"
    return None


def _left(record: Record, audit: Audit) -> str | None:
    """What the recorded run did and the present code does not, if there is anything."""
    visited = {step.key for step in audit.visited}
    for path, steps in record.steps.items():
        task = record.tasks.get(path, {})
        if path and (task.get("kind") not in CARRIED_OUT or task.get("status") != "succeeded"):
            continue
        for step in steps:
            if step.kind != "value" and step.status == "done" and step.key not in visited:
                return f"{step.key}: the recorded {step.kind} call of {step.name!r} is not made"
    return None


def _failures(checks: Checks, report: Report, audit: Audit) -> list[str]:
    """The checks that the replayed run does not pass."""
    found = []
    output = report.output
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    if checks.output_equals is not None and output != checks.output_equals:
        found.append(f"the output is {text[:300]}, not {json.dumps(checks.output_equals)[:300]}")
    if checks.output_contains is not None and checks.output_contains not in text:
        found.append(f"the output does not contain {checks.output_contains!r}: {text[:300]}")
    if checks.output_schema is not None:
        found += [
            f"the output does not fit: {fault}" for fault in fit(output, checks.output_schema)[1]
        ]
    for name in ("model_calls", "tool_calls", "cost_usd"):
        most, used = getattr(checks, f"max_{name}"), getattr(report, name)
        if most is not None and used is None:
            found.append(f"{name} is not known: a model has no known price")
        elif most is not None and used > most:
            found.append(f"{name} is {used}, more than {most}")
    if checks.tools is not None:
        called = iter([step.name for step in audit.visited if step.kind == "tool"])
        missing = [name for name in checks.tools if name not in called]
        if missing:
            found.append(f"the tool {missing[0]!r} is not called (in that order)")
    return found
