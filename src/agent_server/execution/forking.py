"""What a new run shares with the one it comes from, and what it does anew.

Leans on the stored ledger alone. Refuses to write. The order of things is that of the run's events:
it is the one order that all processes agree on.

A fork does its starting point anew, and whatever may depend on it: what began after it had ended.
What began before is shared, even if it ended later, since it cannot have seen the result. Inside
the tasks around the starting point that goes step by step; any other task is shared as a whole.

A retry does anew what failed last: of the task that made the run fail its last step, and of the
tasks around it what came after. Tasks that succeeded are shared, whenever they ran.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import (
    ApprovalExpired,
    BudgetExceeded,
    InvalidRequest,
    RunCancelled,
)
from agent_server.domain.ids import task_id
from agent_server.domain.runs import Usage
from agent_server.execution.store import Whole

ENDED = ("succeeded", "failed", "skipped")
NEVER = float("inf")
APPROVAL = "/approval"
"""Ends the key of the step that holds the decision about a call."""
RECONCILED = "/reconciled/"
"""Stands in the key of the step that holds how a call in doubt went, behind the call's own key."""
_STOPPED = (BudgetExceeded.code, RunCancelled.code)
"""Errors that say nothing against the step before them."""


@dataclass
class Share:
    """``tasks`` are shared as ended; ``steps`` are shared, also those of tasks that go on.
    ``point`` is the task at which a fork starts."""

    tasks: list[Row[Any]] = field(default_factory=list)
    steps: list[Row[Any]] = field(default_factory=list)
    point: Row[Any] | None = None
    step: Row[Any] | None = None

    def repeated(self, origin: Whole) -> list[Row[Any]]:
        """The tool calls that were begun and are not shared."""
        kept = {row.key for row in self.steps}
        return [row for row in origin.steps if row.kind == "tool" and row.key not in kept]

    def actions(self, origin: Whole) -> list[Row[Any]]:
        """The tasks of actions that were begun and are not shared."""
        kept = {row.path for row in self.tasks}
        kinds = ("action", "action_node")
        return [
            row
            for row in origin.tasks
            if row.kind in kinds and row.attempts and row.path not in kept
        ]


@dataclass(frozen=True)
class _Span:
    """Between which events something happened."""

    begin: float = NEVER
    end: float = NEVER


class Timeline:
    """When the tasks and steps of a run began and ended, by the numbers of its events."""

    def __init__(self, origin: Whole) -> None:
        self.steps: dict[str, _Span] = {}
        self.tasks: dict[str, _Span] = {}
        for event in origin.events:
            kind, seq = event["type"], event["seq"]
            if kind.startswith("step."):
                self._note(self.steps, event["step"], seq, kind != "step.started")
            elif kind.startswith("task."):
                self._note(self.tasks, event["path"], seq, kind != "task.started")
        self.revised = max(
            (event["seq"] for event in origin.events if event["type"] == "plan.revised"), default=0
        )

    @staticmethod
    def _note(spans: dict[str, _Span], name: str, seq: int, ended: bool) -> None:
        span = spans.get(name, _Span(begin=seq))
        spans[name] = _Span(min(span.begin, seq), seq if ended else span.end)

    def step(self, key: str) -> _Span:
        return self.steps.get(key, _Span())

    def task(self, path: str) -> _Span:
        return self.tasks.get(path, _Span())


def around(outer: str, path: str) -> bool:
    """Whether the task at ``outer`` is the one at ``path`` or has it inside."""
    return outer in ("", path) or path.startswith((f"{outer}.", f"{outer}/"))


def fork_share(origin: Whole, start: str | None) -> Share:
    """What a fork that starts at ``start`` shares. Raises ``InvalidRequest`` for no such place."""
    if start is None:
        return Share(point=_root(origin))
    task, step = _place(origin, start)
    times = Timeline(origin)
    whole_task = step is None
    here = times.task(task.path) if step is None else times.step(step.key)
    began_at = task.created_at if step is None else step.started_at
    ended_at = (task if step is None else step).ended_at
    share = Share(point=task, step=step)
    ancestors = {row.path for row in origin.tasks if around(row.path, task.path)}
    if whole_task:
        ancestors.discard(task.path)
    kept: set[str] = set()
    for row in origin.tasks:
        if row.path in ancestors or (whole_task and around(task.path, row.path)):
            continue
        if row.hidden:
            before = ended_at is None or row.created_at < ended_at
        else:
            before = times.task(row.path).begin < here.end
        inside = any(around(other.path, row.path) for other in share.tasks)
        if before or inside:
            kept.add(row.path)
            if row.status in ENDED:
                share.tasks.append(row)  # one that goes on is shared as far as it is
    for one in origin.steps:
        if one.task_path in kept:
            share.steps.append(one)
        elif whole_task and around(task.path, one.task_path):
            continue
        elif one.task_path in ancestors:
            if step is not None and f"{step.key}/".startswith(f"{one.key}/"):
                continue  # the step itself, or the call that it is a part of
            if step is not None and one.key.startswith(f"{step.key}/"):
                continue
            if one.kind == "value":
                if one.ended_at is not None and one.ended_at <= began_at:
                    share.steps.append(one)
            elif times.step(one.key).begin < here.end:
                share.steps.append(one)
    return _with_decisions(origin, share)


def retry_share(origin: Whole) -> Share:
    """What the retry of a run that did not succeed shares."""
    times = Timeline(origin)
    tolerant = _tolerant(origin)
    chains: dict[str, list[Row[Any]]] = {}
    for row in origin.tasks:
        chains.setdefault(row.path.partition("@")[0], []).append(row)
    share, again = Share(), []
    for row in origin.tasks:
        if row.path == "":
            continue
        if row.status in ("succeeded", "skipped"):
            share.tasks.append(row)
        elif row.status == "failed":
            last = max(chains[row.path.partition("@")[0]], key=lambda one: one.created_at)
            superseded = last.path != row.path or times.task(row.path).end < times.revised
            stopped = (row.error or {}).get("code") in _STOPPED
            if not stopped and (superseded or row.node in tolerant):
                share.tasks.append(row)
            else:
                again.append(row)
    failed_at = min((times.task(row.path).end for row in again), default=NEVER)
    dropped = {key for row in again for key in _tail(origin, times, row.path, row.error)}
    if not again:
        dropped |= _tail(origin, times, "", origin.run.error)
    first = min((row.ended_at for row in again if row.ended_at), default=None)
    kept = {row.path for row in share.tasks}
    for step in origin.steps:
        if step.task_path in kept:
            share.steps.append(step)
        elif step.key in dropped:
            continue
        elif step.kind == "value" and step.task_path == "":
            if first is None or (step.ended_at is not None and step.ended_at <= first):
                share.steps.append(step)
        elif step.kind == "value" or step.task_path or times.step(step.key).begin < failed_at:
            share.steps.append(step)
    return _with_decisions(origin, share)


def _with_decisions(origin: Whole, share: Share) -> Share:
    """``share`` without what was decided about calls that are made again: consent is for one call,
    and how a call went says nothing about the next. That a call was not to be made stays."""
    kept = {row.key: row.status for row in share.steps}
    made = {row.key for row in origin.steps if row.kind == "tool"}
    failed = {row.path: (row.error or {}).get("code") for row in origin.tasks}
    failed[""] = (origin.run.error or {}).get("code")

    def counts(row: Row[Any]) -> bool:
        if row.kind != "value" or "/tool/" not in f"/{row.key}":
            return True
        call, reconciled, _ = row.key.partition(RECONCILED)
        if reconciled:
            return kept.get(call) in ("done", "failed")
        if not row.key.endswith(APPROVAL):
            return True
        call = row.key.removesuffix(APPROVAL)
        if call in made:
            return call in kept
        expired = failed.get(row.task_path) == ApprovalExpired.code
        return row.output["decision"] in (("reject",) if expired else ("reject", "expired"))

    share.steps = [row for row in share.steps if counts(row)]
    return share


def _tail(origin: Whole, times: Timeline, path: str, error: Any) -> set[str]:
    """The keys of the last step of the task, with which it failed, and of the calls around it."""
    own = [step for step in origin.steps if step.task_path == path and step.kind != "value"]
    own.sort(key=lambda step: (times.step(step.key).begin, step.started_at))
    dropped = {step.key for step in own if step.kind == "model" and step.status == "failed"}
    if own and (error or {}).get("code") not in _STOPPED:
        last = own[-1]
        if last.status == "failed" or (last.kind == "model" and last.status == "done"):
            dropped.add(last.key)
    return dropped | {step.key for step in own for key in dropped if key.startswith(f"{step.key}/")}


def _tolerant(origin: Whole) -> set[str]:
    """The nodes whose failure the workflow or the plan puts up with."""
    found: set[str] = set()
    todo: list[Any] = [origin.run.request.get("workflow")]
    todo += [event["plan"] for event in origin.events if event["type"].startswith("plan.")]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("on_error", "fail") != "fail" or value.get("on_failure") == "continue":
                found.add(str(value.get("id")))
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return found


def _root(origin: Whole) -> Row[Any]:
    return next(row for row in origin.tasks if row.path == "")


def _place(origin: Whole, start: str) -> tuple[Row[Any], Row[Any] | None]:
    """The task, and the step where one is meant, that ``start`` names."""
    tasks = {row.path: row for row in origin.tasks}
    for row in origin.tasks:
        if row.path and not row.hidden and start in (row.path, task_id(origin.run.id, row.path)):
            return row, None
    for step in origin.steps:
        if step.key == start and step.kind != "value":
            return tasks[step.task_path], step
    known = [row.path for row in origin.tasks if row.path and not row.hidden]
    known += [step.key for step in origin.steps if step.kind != "value"]
    listed = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
    raise InvalidRequest(
        f"The run {origin.run.id!r} has no task and no step {start[:200]!r}.",
        hint=f"Give a task's id or path, or a step's key: {listed or 'it has none yet'}.",
    )


def with_arguments(origin: Whole, step: Row[Any], arguments: JsonObject) -> dict[str, Any]:
    """The recorded answer of the model that asked for the tool call ``step``, asking for other
    ``arguments``: its key and output. Raises ``InvalidRequest`` where no model asked for it."""
    scope, _, call = step.key.rpartition("tool/")
    call = call.partition("~")[0]
    for one in origin.steps:
        inside = one.key.startswith(f"{scope}model/") and one.task_path == step.task_path
        if one.kind != "model" or not inside or one.status != "done":
            continue
        changed = json.loads(json.dumps(one.output))
        for item in changed.get("output", ()):
            if item.get("type") == "function_call" and item.get("call_id") == call:
                item["arguments"] = json.dumps(arguments)
                return {one.key: changed}
    raise InvalidRequest(
        f"The arguments of {step.key!r} cannot be changed: no model asked for this call.",
        hint="Fork from its task instead.",
    )


def shared_events(origin: Whole, share: Share, run_id: str) -> list[tuple[str, str]]:
    """The origin's events of what is shared, as the first events of the run ``run_id``: without
    a number, in their order, and with no usage, which is not paid twice."""
    steps = {row.key for row in share.steps}
    tasks = {row.path for row in share.tasks}
    paths = {str(task_id(origin.run.id, row.path)): row.path for row in origin.tasks}
    said = []
    for event in origin.events:
        kind: str = event["type"]
        plan = re.match(r"plan\.(created|revised)", kind)
        if plan:
            kept = f"plan/accepted/{event['plan'].get('revision', 1)}" in steps
        elif kind.startswith(("task.", "action.")):
            kept = event["path"] in tasks
        elif kind.startswith(("step.", "message.", "approval.")):
            kept = event["step"] in steps if "step" in event else False
        else:
            kept = False
        if not kept:
            continue
        copy = {name: value for name, value in event.items() if name != "seq"}
        copy["run_id"] = run_id
        if copy.get("task_id") is not None:
            copy["task_id"] = task_id(run_id, paths[copy["task_id"]])
        if "usage" in copy:
            copy["usage"] = Usage().model_dump(mode="json")
        said.append((kind, json.dumps(copy, separators=(",", ":"))))
    return said
