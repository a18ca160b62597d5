"""Draws the picture of a run as a tree for a terminal.

Leans on rich. A pure function of the picture, the time and the room there is; refuses to print.
"""

import json
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from agent_server.cli.errors import printable
from agent_server.cli.view import RunView, StepView, TaskView
from agent_server.domain.runs import RunStatus, Usage, WaitingFor

MARKS = {
    "pending": ("○", "dim"),
    "queued": ("○", "dim"),
    "running": ("◐", "cyan"),
    "waiting": ("‖", "yellow"),
    "succeeded": ("✓", "green"),
    "done": ("✓", "green"),
    "failed": ("✗", "red"),
    "in_doubt": ("?", "yellow"),
    "skipped": ("–", "dim"),
    "cancelled": ("–", "dim"),
    "budget_exceeded": ("✗", "red"),
}
NOTES_SHOWN = 3


def render(
    view: RunView, *, now: datetime | None = None, width: int = 100, height: int | None = None
) -> RenderableType:
    """``view`` as a tree of at most ``height`` lines; ``now`` makes running times move.

    Where there is less room, the steps of finished tasks go first, then all but the running
    steps, then the finished tasks.
    """
    tree = _tree(view, now, width, detail=3)
    for detail in (2, 1, 0):
        if height is None or _lines(tree) + 2 <= height:
            break
        tree = _tree(view, now, width, detail)
    return Group(tree, footer(view, now))


def _tree(view: RunView, now: datetime | None, width: int, detail: int) -> Tree:
    tree = Tree(_headline(view, width), guide_style="dim")
    for step in _shown(view.root, detail):
        _add_step(tree, step, width - 4)
    hidden = 0
    for task in view.tasks.values():
        if not task.path:
            continue
        if detail == 0 and task.status not in ("running", "waiting", "failed"):
            hidden += 1
            continue
        branch = tree.add(_task_line(task, now, width - 4))
        for step in _shown(task, detail):
            _add_step(branch, step, width - 8)
    if hidden:
        tree.add(Text(f"… and {hidden} more tasks", style="dim"))
    for note in view.notes[-NOTES_SHOWN:] if detail else []:
        tree.add(Text(_one_line(note, width - 4), style="dim"))
    return tree


def _shown(task: TaskView, detail: int) -> list[StepView]:
    steps = [step for step in task.steps.values() if step.kind != "value"]
    if detail == 3 or (detail == 2 and task.status in ("running", "failed")):
        return steps
    return [step for step in steps if step.status == "running"]


def _lines(tree: Tree) -> int:
    return 1 + sum(_lines(child) for child in tree.children)


def _headline(view: RunView, width: int) -> Text:
    mark, style = MARKS[view.status.value if view.status is not RunStatus.QUEUED else "queued"]
    text = Text.assemble((f"{mark} ", style), (f"{view.kind} ", "dim"), no_wrap=True)
    text.append(_one_line(view.name, max(20, width - 12)), "bold")
    return text


def _task_line(task: TaskView, now: datetime | None, width: int) -> Text:
    mark, style = MARKS[task.status]
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{mark} ", style)
    text.append(printable(task.node), "bold" if task.status == "running" else "")
    tail = ""
    if task.agent:
        tail += f"  {printable(task.agent)}"
    if task.status == "pending" and task.depends_on:
        tail += f"  after {', '.join(task.depends_on)}"
    end = task.ended_at or now
    if task.started_at and end:
        tail += f"  {seconds((end - task.started_at).total_seconds())}"
    room = width - len(text) - len(tail) - 2
    said = f"{task.description} ({task.reason})" if task.reason else task.description
    if said and room > 10:
        text.append("  " + _one_line(said, room), "red" if task.status == "failed" else "")
    text.append(tail, "dim")
    return text


def _add_step(branch: Tree, step: StepView, width: int) -> None:
    mark, style = MARKS[step.status]
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{mark} ", style)
    text.append(step_title(step, width - 20))
    tail = ""
    if step.usage.output_tokens:
        tail += f"  {step.usage.input_tokens}→{step.usage.output_tokens} tokens"
    if step.duration_ms is not None:
        tail += f"  {seconds(step.duration_ms / 1000)}"
    room = width - len(text) - len(tail) - 4
    if step.error and room > 10:
        text.append("  " + _one_line(step.error, room), "red")
    elif step.kind == "tool" and step.output is not None and room > 10:
        text.append(" = " + _one_line(short(step.output), room), "dim")
    elif step.text and room > 10:
        text.append("  " + _tail_of(step.text, room), "italic dim")
    text.append(tail, "dim")
    branch.add(text)


def step_title(step: StepView, room: int = 80) -> str:
    """What a step is: ``model demo`` or ``add(a=1, b=2)``."""
    if step.kind != "tool":
        return printable(f"{step.kind} {step.name}".strip())
    return _one_line(f"{step.name}({arguments(step.input)})", max(room, 20))


def footer(view: RunView, now: datetime | None) -> Text:
    """The line under the tree: the run's state, its time, what it used and cost."""
    waits = view.waiting_for
    parts = [standing(view.status, waits)]
    if waits is not None and waits.paused_by is None:
        parts[0] += f": {printable(waits.detail)}".rstrip(": ")
    end = view.ended_at or now
    if view.started_at and end:
        parts.append(seconds((end - view.started_at).total_seconds()))
    parts.append(usage_line(view.usage))
    return Text("  ".join([*parts, view.id]), style="dim")


def standing(status: RunStatus, waits: WaitingFor | None) -> str:
    """How a run stands, in a few words: ``waiting for approval``, ``paused by ann``."""
    if waits is None:
        return status.value.replace("_", " ")
    if waits.paused_by is not None:
        return f"paused by {printable(waits.paused_by)}"
    return f"waiting for {waits.kind}" + (f" {waits.signal!r}" if waits.signal else "")


def usage_line(usage: Usage) -> str:
    """``3 model calls, 2 tool calls, 900→120 tokens, $0.0031``; without a model call, no more than
    the calls."""
    calls = f"{_count(usage.model_calls, 'model call')}, {_count(usage.tool_calls, 'tool call')}"
    if not usage.model_calls:
        return calls
    cost = "cost unknown" if usage.cost_usd is None else f"${usage.cost_usd:.4f}"
    return f"{calls}, {usage.input_tokens}→{usage.output_tokens} tokens, {cost}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def seconds(duration_s: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 20 s``."""
    if duration_s < 10:
        return f"{max(duration_s, 0):.2f} s"
    if duration_s < 90:
        return f"{duration_s:.1f} s"
    return f"{int(duration_s // 60)} min {int(duration_s % 60)} s"


def arguments(value: Any) -> str:
    """A tool's arguments as in a call: ``a=1, b=x``."""
    if isinstance(value, str):
        try:
            return arguments(json.loads(value)) if value.startswith("{") else str(value)
        except ValueError:
            return str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={short(item)}" for name, item in value.items())
    return "" if value is None else short(value)


def short(value: Any) -> str:
    """A JSON value on one line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _one_line(text: str, room: int) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= room else line[: max(room - 1, 1)] + "…"


def _tail_of(text: str, room: int) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= room else "…" + line[-(room - 1) :]
