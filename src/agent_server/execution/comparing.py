"""Two runs side by side: which steps differ, and what came of it.

Leans on the stored ledger alone. Refuses to judge: another answer is a difference, not a fault.

Ids that a provider makes up (of answers and of tool calls) say nothing and are left out: a tool
call is known by its place, "the second call of ``add`` here".
"""

import json
from collections import Counter
from typing import Any, Literal

from sqlalchemy import Row

from agent_server.domain.base import JsonObject
from agent_server.domain.history import Brief, Comparison, StepDifference
from agent_server.domain.runs import RunStatus
from agent_server.execution.store import Whole, usage_of

_COMPARED: tuple[Literal["name", "input", "output", "status"], ...] = (
    "name",
    "input",
    "output",
    "status",
)
_MADE_UP = ("id", "response_id", "call_id", "usage", "prefix")


def compared(a: Whole, b: Whole) -> Comparison:
    """The differences between ``a`` and ``b``, those of steps in the order of the runs."""
    left, right = _placed(a), _placed(b)
    found: list[StepDifference] = []
    same = 0
    for place in dict.fromkeys([*left, *right]):
        one, other = left.get(place), right.get(place)
        if one is None or other is None:
            row = one if one is not None else other
            assert row is not None
            only: Literal["a", "b"] = "b" if one is None else "a"
            found.append(StepDifference(step=place, name=row.name, only_in=only))
            continue
        changed = tuple(
            name for name in _COMPARED if _bare(getattr(one, name)) != _bare(getattr(other, name))
        )
        if changed:
            found.append(StepDifference(step=place, name=one.name, changed=changed))
        else:
            same += 1
    plans = _plan(a), _plan(b)
    outputs_same = a.run.output == b.run.output
    outcome_same = outputs_same and a.run.status == b.run.status
    return Comparison(
        same=not found and outcome_same and plans[0] == plans[1],
        a=_brief(a, plans[0]),
        b=_brief(b, plans[1]),
        first_difference=_said(found[0]) if found else _outcome_said(a, b, outcome_same),
        output_same=outputs_same,
        plan_same=plans[0] == plans[1],
        steps_same=same,
        steps=tuple(found),
    )


def _placed(run: Whole) -> dict[str, Row[Any]]:
    """The model and tool calls by their place, in the order in which they began."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    placed: dict[str, Row[Any]] = {}
    for row in run.steps:
        if row.kind == "value":
            continue
        scope, _, last = row.key.rpartition("/")
        outer, _, kind = scope.rpartition("/")
        where = names.get(outer, outer)
        if row.kind == "tool":
            last = f"{row.name}#{counts[f'{where}/{row.name}'] + 1}"
            counts[f"{where}/{row.name}"] += 1
        place = "/".join(part for part in (where, kind, last) if part)
        names[row.key] = placed_key = place
        placed[placed_key] = row
    return placed


def _bare(value: Any) -> Any:
    """``value`` without what a provider makes up anew each time."""
    if isinstance(value, dict):
        return {name: _bare(item) for name, item in value.items() if name not in _MADE_UP}
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return value


def _plan(run: Whole) -> tuple[str, ...]:
    plans: list[JsonObject] = [
        event["plan"] for event in run.events if event["type"] in ("plan.created", "plan.revised")
    ]
    if not plans:
        return ()
    return tuple(
        f"{task['id']} ({task.get('agent') or 'generalist'}): {task['description']}"
        for task in plans[-1]["tasks"]
    )


def _brief(run: Whole, plan: tuple[str, ...]) -> Brief:
    row = run.run
    began = row.started_at or row.created_at
    return Brief(
        id=row.id,
        status=RunStatus(row.status),
        output=row.output,
        error=(row.error or {}).get("message"),
        usage=usage_of(row),
        duration_s=(row.ended_at - began).total_seconds() if row.ended_at else None,
        steps=sum(step.kind != "value" for step in run.steps),
        plan=plan,
    )


def _said(step: StepDifference) -> str:
    if step.only_in is not None:
        return f"{step.step} ({step.name}) is only in {step.only_in}"
    return f"{step.step} ({step.name}) differs in {', '.join(step.changed)}"


def _outcome_said(a: Whole, b: Whole, same: bool) -> str | None:
    if same:
        return None
    if a.run.status != b.run.status:
        return f"a ended as {a.run.status}, b as {b.run.status}"
    shown = [json.dumps(run.run.output)[:200] for run in (a, b)]
    return f"the output is {shown[0]} in a and {shown[1]} in b"
