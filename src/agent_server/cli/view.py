"""A run as its events tell it: the plan, the tasks, the steps, folded into one picture.

Leans on the domain's events alone. Refuses to know how it is drawn, and reads no clock: the
same events always make the same picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from agent_server.domain import events as e
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.ids import task_path
from agent_server.domain.plans import Plan, TaskStatus
from agent_server.domain.runs import RunStatus, StepKind, Usage, WaitingFor

StepEvent = e.StepStarted | e.StepCompleted | e.StepFailed | e.StepInDoubt | e.MessageDelta
KEPT_TEXT = 2_000
"""Characters of a streamed message that are kept for showing."""


@dataclass
class StepView:
    """A model or tool call."""

    key: str
    kind: StepKind
    name: str
    agent: str | None
    input: Any = None
    status: Literal["running", "done", "failed", "in_doubt"] = "running"
    text: str = ""
    """The end of what the model has said so far."""
    output: Any = None
    error: str | None = None
    usage: Usage = Usage()
    duration_ms: int | None = None


@dataclass
class TaskView:
    """A task, planned or under way. The root task, of path ``""``, is the run's own."""

    path: str
    node: str
    description: str = ""
    kind: str = ""
    agent: str | None = None
    status: TaskStatus = "pending"
    depends_on: tuple[str, ...] = ()
    started_at: datetime | None = None
    ended_at: datetime | None = None
    output: Any = None
    reason: str | None = None
    steps: dict[str, StepView] = field(default_factory=dict)


@dataclass
class RunView:
    """What is known of a run. ``apply`` takes its events in order."""

    id: str = ""
    kind: str = ""
    name: str = ""
    status: RunStatus = RunStatus.QUEUED
    started_at: datetime | None = None
    ended_at: datetime | None = None
    revision: int = 0
    tasks: dict[str, TaskView] = field(default_factory=dict)
    """By path; a planned task that has not started stands under ``plan:<id>``."""
    notes: list[str] = field(default_factory=list)
    output: Any = None
    error: ErrorInfo | None = None
    waiting_for: WaitingFor | None = None
    final_usage: Usage | None = None
    paths: dict[str, str] = field(default_factory=dict)
    """Of each task id that was met, the path."""

    @property
    def usage(self) -> Usage:
        """What the run has used so far; at its end, what the server says it used."""
        if self.final_usage is not None:
            return self.final_usage
        return total(s.usage for task in self.tasks.values() for s in task.steps.values())

    @property
    def root(self) -> TaskView:
        return self.tasks.setdefault("", TaskView(path="", node=""))

    def apply(self, event: e.EventBase) -> None:
        """Take the next event in. One that changes nothing to see is passed over."""
        if isinstance(event, e.RunCreated):
            self.id, self.kind, self.name = event.run_id, event.kind, event.name
        elif isinstance(event, e.RunStarted):
            self.status, self.started_at = RunStatus.RUNNING, self.started_at or event.at
        elif isinstance(event, e.PlanCreated):
            self._plan(event.plan)
        elif isinstance(event, e.PlanRevised):
            self._plan(event.plan)
            self.notes.append(f"The plan was revised: {event.reason}")
        elif isinstance(event, e.RunWaiting):
            self.status, self.waiting_for = RunStatus.WAITING, event.waiting_for
        elif isinstance(event, e.RunResumed):
            self.status, self.waiting_for = RunStatus.RUNNING, None
        elif isinstance(event, e.RunSteered):
            self.notes.append(f"{event.by} said: {said(event.input)}")
        elif isinstance(event, e.MemoryRecalled):
            self.notes.append(f"Recalled {len(event.memories)} memories for {event.query!r}.")
        elif isinstance(event, e.ApprovalRequested):
            self.notes.append(f"{event.tool} waits for approval {event.approval_id}.")
        elif isinstance(event, e.ApprovalDecided):
            self.notes.append(f"Approval {event.approval_id}: {event.decision} by {event.by}.")
        elif isinstance(event, e.ActionCompleted):
            self.notes.append(f"Action {event.action} done, on {event.trigger}.")
        elif isinstance(event, e.ActionFailed):
            self.notes.append(f"Action {event.action} failed: {event.error.message}")
        elif isinstance(event, e.BudgetWarning):
            self.notes.append(f"Budget: {event.used} of {event.maximum} {event.limit} used.")
        elif event.ends_run:
            self._end(event)
        else:
            self._task_event(event)

    def _task_event(self, event: e.EventBase) -> None:
        if isinstance(event, e.TaskStarted):
            self._take_up(event.node, event.path)
            task = self._task(event.path, event.node)
            task.node = event.node
            task.description = event.description or task.description
            task.agent, task.kind = event.agent, event.kind
            task.status, task.started_at = "running", task.started_at or event.at
        elif isinstance(event, e.TaskCompleted):
            task = self._task(event.path, event.node)
            task.status, task.output, task.ended_at = "succeeded", event.output, event.at
        elif isinstance(event, e.TaskFailed):
            task = self._task(event.path, event.node)
            task.status, task.reason, task.ended_at = "failed", event.error.message, event.at
        elif isinstance(event, e.TaskSkipped):
            self._take_up(event.node, event.path)
            task = self._task(event.path, event.node)
            task.status, task.reason, task.ended_at = "skipped", event.reason, event.at
        elif isinstance(event, e.StepStarted):
            steps = self._steps(event)
            # A delta may overtake its step's start: the start says where in the order it stands.
            early = steps.pop(event.step, None)
            steps[event.step] = StepView(
                event.step, event.kind, event.name, event.agent, event.input
            )
            if early is not None and early.status == "running":
                steps[event.step].text = early.text
        elif isinstance(event, e.StepCompleted):
            step = self._step(event, event.step, event.kind, event.name)
            step.status, step.output, step.text = "done", event.output, ""
            step.usage, step.duration_ms = event.usage, event.duration_ms
        elif isinstance(event, e.StepFailed):
            step = self._step(event, event.step, event.kind, event.name)
            step.status, step.error = "failed", event.error.message
            step.duration_ms = event.duration_ms
        elif isinstance(event, e.StepInDoubt):
            step = self._step(event, event.step, event.kind, event.name)
            step.status, step.error = "in_doubt", event.detail
        elif isinstance(event, e.MessageDelta):
            step = self._step(event, event.step, "model", "")
            step.text = (step.text + event.text)[-KEPT_TEXT:]

    def _plan(self, plan: Plan) -> None:
        self.revision = plan.revision
        for path in [path for path in self.tasks if path.startswith("plan:")]:
            del self.tasks[path]
        under_way = {task.node for task in self.tasks.values()}
        for planned in plan.tasks:
            if planned.id not in under_way:
                self.tasks[f"plan:{planned.id}"] = TaskView(
                    path=f"plan:{planned.id}",
                    node=planned.id,
                    description=planned.description,
                    agent=planned.agent,
                    depends_on=planned.depends_on,
                )

    def _take_up(self, node: str, path: str) -> None:
        """The planned task ``node`` is now the task at ``path``, at the same place in the list."""
        planned = f"plan:{node}"
        if planned in self.tasks:
            # What was heard of it before its start, since deltas do not wait.
            early = self.tasks.pop(path, None)
            if early is not None:
                self.tasks[planned].steps = early.steps
            self.tasks[planned].path = path
            self.tasks = {path if k == planned else k: task for k, task in self.tasks.items()}

    def _end(self, event: e.EventBase) -> None:
        self.waiting_for, self.ended_at = None, event.at
        if isinstance(event, e.RunSucceeded):
            self.status, self.output = RunStatus.SUCCEEDED, event.output
        elif isinstance(event, e.RunFailed):
            self.status, self.error = RunStatus.FAILED, event.error
        elif isinstance(event, e.RunCancelled):
            self.status = RunStatus.CANCELLED
        elif isinstance(event, e.RunBudgetExceeded):
            self.status, self.error, self.output = (
                RunStatus.BUDGET_EXCEEDED,
                event.error,
                event.output,
            )
        self.final_usage = getattr(event, "usage", None)
        for task in self.tasks.values():
            if task.status in ("running", "pending", "queued", "waiting") and task.path:
                task.status = "cancelled"

    def _task(self, path: str, node: str) -> TaskView:
        return self.tasks.setdefault(path, TaskView(path, node))

    def _steps(self, event: StepEvent) -> dict[str, StepView]:
        """The steps of the event's task, which may not be known yet: deltas do not wait."""
        if event.task_id is None:
            return self.root.steps
        path = self.paths.get(event.task_id)
        if path is None:
            path = task_path(event.run_id, event.task_id, event.step)
            self.paths[event.task_id] = path
        return self._task(path, path).steps

    def _step(self, event: StepEvent, key: str, kind: StepKind, name: str) -> StepView:
        return self._steps(event).setdefault(
            key, StepView(key, kind, name, getattr(event, "agent", None))
        )


def view_of(events: Iterable[e.EventBase]) -> RunView:
    """The picture that ``events`` make."""
    view = RunView()
    for event in events:
        view.apply(event)
    return view


def total(usages: Iterable[Usage]) -> Usage:
    """The sum; its cost is None when no part has one."""
    model_calls = tool_calls = input_tokens = output_tokens = 0
    cost: Decimal | None = None
    for usage in usages:
        model_calls += usage.model_calls
        tool_calls += usage.tool_calls
        input_tokens += usage.input_tokens
        output_tokens += usage.output_tokens
        if usage.cost_usd is not None:
            cost = (cost or Decimal(0)) + usage.cost_usd
    return Usage(
        model_calls=model_calls,
        tool_calls=tool_calls,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=cost,
    )


def said(given: Any) -> str:
    """The text of what was said into a run: a text, or a list of input items."""
    if isinstance(given, list):
        return " ".join(said(item.get("content") or item.get("text") or "") for item in given)
    return str(given)
