"""A recorded run as a task context: handlers run against it as they run after a crash.

Leans on the in-memory context and on the audit. Refuses to have an effect: models and tools answer
from the record, and a task that acts on the world gives what it gave.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, ReplayDiffers, error_info
from agent_server.domain.events import EventBase
from agent_server.domain.history import RunExport
from agent_server.domain.ids import task_id
from agent_server.domain.runs import Usage, WaitingFor
from agent_server.execution.ephemeral import EphemeralContext, EphemeralJournal
from agent_server.execution.ports import (
    NO_USAGE,
    ApprovalAsk,
    ApprovalDecision,
    Estimate,
    Handler,
    RunSnapshot,
    SignalReceived,
    StepRecord,
    Suspend,
    TaskOutcome,
    TaskSpec,
)
from agent_server.inference.audit import Audit

CARRIED_OUT = frozenset({"agent", "tool", "workflow"})
"""Kinds of tasks whose code runs in a replay; whatever else there is gives what is recorded."""
MADE_AGAIN = "plan/accepted/"
"""The one value that is made of recorded answers: how, is what a replay wants to know."""


class Record:
    """A run's export, as a replay looks things up in it."""

    def __init__(self, export: RunExport) -> None:
        self.export = export
        self.tasks = {task["path"]: task for task in export.tasks}
        self.steps: dict[str, list[StepRecord]] = {}
        for step in export.steps:
            found = StepRecord(
                key=step["key"],
                kind=step["kind"],
                name=step["name"],
                status=step["status"],
                agent=step["agent"],
                input=step["input"],
                input_hash=step["input_hash"],
                output=step["output"],
                error=ErrorInfo.model_validate(step["error"]) if step["error"] else None,
                usage=Usage.model_validate(step["usage"]),
                attempts=step["attempts"],
            )
            self.steps.setdefault(step["task_path"], []).append(found)


class ReplayJournal(EphemeralJournal):
    """Holds the recorded steps of one task; nothing new may begin."""

    def __init__(self, record: Record, audit: Audit, path: str) -> None:
        run = record.export.run
        super().__init__(
            run.id,  # type: ignore[arg-type]  # an id as the file has it
            scope=path,
            task=task_id(run.id, path) if path else None,
            recorded=record.steps.get(path, ()),
        )
        self._audit = audit

    def emit(self, event: EventBase) -> None:
        """What happens was told when it was recorded."""

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> int | None:
        raise self._audit.differ(f"the {step.kind} {step.name!r} was not recorded", step.key)

    async def again(
        self, step: StepRecord, estimate: Estimate | None = None, spent: Usage = NO_USAGE
    ) -> int | None:
        raise self._audit.differ(f"the {step.kind} {step.name!r} was not recorded", step.key)


class ReplayContext(EphemeralContext):
    """See ``ports.TaskContext``, answered from the record."""

    def __init__(
        self,
        run: RunSnapshot,
        record: Record,
        audit: Audit,
        handlers: Mapping[str, Handler],
        task: JsonObject,
    ) -> None:
        super().__init__(
            run,
            handlers=handlers,
            journal=ReplayJournal(record, audit, task["path"]),
            path=task["path"],
            node=task["node"],
            payload=task["payload"],
        )
        self._record = record
        self._audit = audit

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        if spec.path not in self._children:
            self._children[spec.path] = await self._compared(spec)
        return self._children[spec.path]

    async def _compared(self, spec: TaskSpec) -> TaskOutcome:
        where = f"task {spec.path} ({spec.node})"
        task = self._record.tasks.get(spec.path)
        if task is None:
            raise self._audit.differ(f"a task of kind {spec.kind!r} was not recorded", where)
        if self._audit.strict and (spec.kind, spec.payload) != (task["kind"], task["payload"]):
            self._audit.output(
                "the task before it",
                [spec.kind, spec.payload],
                [task["kind"], task["payload"]],
                where,
            )
        recorded = TaskOutcome(
            task["status"],
            task["output"],
            ErrorInfo.model_validate(task["error"]) if task["error"] else None,
        )
        if spec.kind not in CARRIED_OUT or recorded.status not in ("succeeded", "failed"):
            return recorded
        context = ReplayContext(self.run, self._record, self._audit, self._handlers, task)
        try:
            outcome = TaskOutcome("succeeded", await self._handlers[spec.kind](context))
        except (ReplayDiffers, Suspend):
            raise
        except Exception as error:
            if self._audit.first is not None:
                raise self._audit.first from None
            outcome = TaskOutcome("failed", error=error_info(error))
        if outcome.error is not None and recorded.error is None:
            raise self._audit.differ(f"it now fails: {outcome.error.message}", where)
        self._audit.output("the task", outcome.output, recorded.output, where)
        return outcome

    async def give_up(self, scopes: tuple[str, ...]) -> None:
        """Nothing of the run lives."""

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        task = self._record.tasks.get(spec.path)
        if self._audit.strict and (task is None or task["status"] != "skipped"):
            how = "not recorded" if task is None else f"recorded as {task['status']}"
            raise self._audit.differ(f"it would be skipped ({reason}); it is {how}", spec.path)

    async def wait_signal(
        self,
        name: str,
        *,
        key: str,
        until: datetime | None = None,
        waiting_for: WaitingFor | None = None,
    ) -> SignalReceived | None:
        got = self._recorded_value(key, f"the signal {name!r} would be waited for, which")
        return None if got is None else SignalReceived.read(got)

    async def take_steers(self, *, key: str) -> list[SignalReceived]:
        whole = self.journal.key(key)
        found = self.journal.recorded(whole).get(whole)
        return [] if found is None else [SignalReceived.read(one) for one in found.output]

    async def sleep_until(self, moment: datetime, *, key: str) -> None:
        self._recorded_value(key, "a timer")

    async def ask_approval(self, ask: ApprovalAsk, *, key: str) -> ApprovalDecision:
        asked = f"approval of {ask.subject!r} would be asked for, which"
        return ApprovalDecision(**self._recorded_value(key, asked))

    def _recorded_value(self, key: str, what: str) -> Any:
        whole = self.journal.key(key)
        found = self.journal.recorded(whole).get(whole)
        if found is None or found.status != "done":
            raise self._audit.differ(f"{what} was not recorded", whole)
        return found.output

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        found = self._recorded_value(key, f"the value {key!r}")
        if key.startswith(MADE_AGAIN):
            self._audit.output("the plan", await make(), found, self.journal.key(key))
        return found
