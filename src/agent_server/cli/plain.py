"""A run as lines of text, one for each event worth telling, for pipes and log files.

Leans on the same picture and words as the tree. Refuses to print what streams: the finished
answer follows at the end.
"""

from agent_server.cli.errors import printable
from agent_server.cli.tree import arguments, seconds, short, standing
from agent_server.cli.view import StepEvent, said
from agent_server.domain import events as e
from agent_server.domain.ids import task_path
from agent_server.domain.runs import RunStatus

WIDTH = 160


def lines_of(event: e.EventBase) -> list[str]:
    """What ``event`` tells, a line each; none when it is not worth one."""
    texts = [_text(event)]
    if isinstance(event, e.PlanCreated | e.PlanRevised):
        texts += [
            f"  {task.id}: {task.description}"
            + (f" (after {', '.join(task.depends_on)})" if task.depends_on else "")
            for task in event.plan.tasks
        ]
    return [_cut(text) for text in texts if text is not None]


def _cut(text: str) -> str:
    indent = "  " if text.startswith("  ") else ""
    line = indent + " ".join(printable(text).split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _text(event: e.EventBase) -> str | None:
    where = _path(event)
    if isinstance(event, e.RunCreated):
        return f"run {event.run_id}: {event.name}"
    if isinstance(event, e.RunStarted):
        return f"run taken up again, attempt {event.attempt}" if event.attempt > 1 else None
    if isinstance(event, e.PlanCreated | e.PlanRevised):
        word = "plan" if isinstance(event, e.PlanCreated) else f"plan revised, {event.reason}"
        return f"{word}: {len(event.plan.tasks)} tasks"
    if isinstance(event, e.TaskStarted):
        again = f", attempt {event.attempt}" if event.attempt > 1 else ""
        about = f": {event.description}" if event.description else ""
        return f"task {event.path} started{again}: {event.node}{about}"
    if isinstance(event, e.TaskCompleted):
        return f"task {event.path} done: {event.node}"
    if isinstance(event, e.TaskFailed):
        return f"task {event.path} failed: {event.node}: {event.error.message}"
    if isinstance(event, e.TaskSkipped):
        return f"task {event.path} skipped: {event.node}: {event.reason}"
    if isinstance(event, e.StepStarted):
        if event.kind != "tool":
            return None
        return f"{where}tool {event.name}({arguments(event.input)})"
    if isinstance(event, e.StepCompleted):
        took = seconds(event.duration_ms / 1000)
        if event.kind == "model":
            used = f"{event.usage.input_tokens}→{event.usage.output_tokens} tokens"
            return f"{where}model {event.name}: {used}, {took}"
        if event.kind == "tool":
            return f"{where}tool {event.name} = {short(event.output)}"
        return None
    if isinstance(event, e.StepFailed):
        return f"{where}{event.kind} {event.name} failed: {event.error.message}"
    if isinstance(event, e.StepInDoubt):
        return f"{where}{event.kind} {event.name} is in doubt: {event.detail}"
    if isinstance(event, e.MemoryRecalled):
        found = ", ".join(f"{one['id']} ({one['score']:.2f})" for one in event.memories)
        return f"{where}recalled {found or 'nothing'}"
    if isinstance(event, e.MemoryWritten):
        return f"{where}wrote {', '.join(event.memory_ids)} to memory"
    if isinstance(event, e.RunWaiting):
        return f"run {standing(RunStatus.WAITING, event.waiting_for)}: {event.waiting_for.detail}"
    if isinstance(event, e.RunResumed):
        return f"run goes on: {event.reason}"
    if isinstance(event, e.RunSteered):
        return f"{event.by} said into the run: {said(event.input)}"
    if isinstance(event, e.ActionCompleted):
        return f"action {event.action} done, on {event.trigger}"
    if isinstance(event, e.ActionFailed):
        return f"action {event.action} failed, on {event.trigger}: {event.error.message}"
    if isinstance(event, e.BudgetWarning):
        return f"budget: {event.used} of {event.maximum} {event.limit} used"
    return None


def _path(event: e.EventBase) -> str:
    """``task 2.1: `` for a step inside a task, nothing for the run's own steps."""
    if event.task_id is None or not isinstance(event, StepEvent):
        return ""
    return f"task {task_path(event.run_id, event.task_id, event.step)}: "
