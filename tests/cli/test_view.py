"""The picture of a run, drawn from recorded events."""

import io
import re
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from decimal import Decimal

from rich.console import Console, RenderableType

from agent_server.cli.follow import LiveTree, display_for
from agent_server.cli.plain import lines_of
from agent_server.cli.tree import render
from agent_server.cli.view import RunView, view_of
from agent_server.domain import events as e
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.ids import task_id
from agent_server.domain.plans import Plan, PlanTask
from agent_server.domain.runs import RunStatus, Usage

RUN = "run_01a205383a8c74b6b8bd9d4176ed97ab"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)


def task(path: str) -> str:
    return task_id(RUN, path)


PLAN = Plan(
    tasks=(
        PlanTask(id="facts", description="Collect the facts", agent="clerk"),
        PlanTask(id="sums", description="Add the figures"),
        PlanTask(id="report", description="Write the report", depends_on=("facts", "sums")),
    )
)
RECORDED: list[e.EventBase] = [
    e.RunCreated(run_id=RUN, at=at(0), kind="goal", name="Write a report"),
    e.RunStarted(run_id=RUN, at=at(0)),
    e.StepStarted(step="model/1", kind="model", name="demo", at=at(0)),
    e.StepCompleted(
        step="model/1",
        kind="model",
        name="demo",
        at=at(1),
        duration_ms=1000,
        usage=Usage(model_calls=1, input_tokens=100, output_tokens=40, cost_usd=Decimal("0.002")),
    ),
    e.PlanCreated(plan=PLAN, at=at(1)),
    e.TaskStarted(path="1", node="facts", kind="agent", agent="clerk", task_id=task("1"), at=at(1)),
    e.TaskStarted(path="2", node="sums", kind="agent", task_id=task("2"), at=at(1)),
    e.StepStarted(
        step="2/tool/c1",
        kind="tool",
        name="add",
        input={"a": 1, "b": "x"},
        task_id=task("2"),
        at=at(2),
    ),
    e.StepCompleted(
        step="2/tool/c1",
        kind="tool",
        name="add",
        task_id=task("2"),
        at=at(2.5),
        duration_ms=500,
        output=3,
        usage=Usage(tool_calls=1),
    ),
    e.StepStarted(step="1/model/1", kind="model", name="demo", task_id=task("1"), at=at(2)),
    e.MessageDelta(step="1/model/1", task_id=task("1"), text="The facts "),
    e.MessageDelta(step="1/model/1", task_id=task("1"), text="are these"),
]
REST: list[e.EventBase] = [
    e.TaskCompleted(path="2", node="sums", output=3, task_id=task("2"), at=at(3)),
    e.TaskFailed(
        path="1",
        node="facts",
        error=ErrorInfo(code="model_error", message="The model is \x1b[31mdown"),
        task_id=task("1"),
        at=at(4),
    ),
    e.TaskSkipped(path="3", node="report", reason="facts failed", task_id=task("3"), at=at(4)),
    e.RunFailed(
        at=at(5),
        error=ErrorInfo(code="task_failed", message="facts failed"),
        usage=Usage(model_calls=2, tool_calls=1, input_tokens=300, output_tokens=60),
    ),
]


def stamped(events: list[e.EventBase]) -> list[e.EventBase]:
    """``events`` as the server says them: each names its run."""
    return [event.model_copy(update={"run_id": RUN}) for event in events]


def pictured(events: Iterable[e.EventBase]) -> RunView:
    return view_of(stamped(list(events)))


def drawn(picture: RenderableType, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(picture)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_tree_shows_plan_tasks_tool_calls_streaming_text_usage_and_cost() -> None:
    lines = drawn(render(pictured(RECORDED), now=at(3)))
    assert lines == [
        "◐ goal Write a report",
        "├── ✓ model demo  100→40 tokens  1.00 s",
        "├── ◐ facts  Collect the facts  clerk  2.00 s",
        "│   └── ◐ model demo  The facts are these",
        "├── ◐ sums  Add the figures  2.00 s",
        "│   └── ✓ add(a=1, b=x) = 3  0.50 s",
        "└── ○ report  Write the report  after facts, sums",
        "running  3.00 s  1 model call, 1 tool call, 100→40 tokens, $0.0020",
        RUN,
    ]


def test_the_end_shows_how_each_task_ended_and_what_the_server_counted() -> None:
    view = pictured([*RECORDED, *REST])
    assert view.status is RunStatus.FAILED
    lines = drawn(render(view))
    assert any("✗ facts  Collect the facts (The model is [31mdown)" in line for line in lines)
    assert any("– report" in line and "facts failed" in line for line in lines)
    assert "2 model calls, 1 tool call, 300→60 tokens, cost unknown" in lines[-2]


def test_where_there_is_little_room_the_running_parts_stay() -> None:
    started = [
        e.TaskStarted(path=f"{n}", node=f"t{n}", kind="agent", task_id=task(f"{n}"), at=at(1))
        for n in range(10, 60)
    ]
    done = [
        e.TaskCompleted(path=f"{n}", node=f"t{n}", task_id=task(f"{n}"), at=at(2))
        for n in range(10, 60)
    ]
    lines = drawn(render(pictured([*RECORDED, *started, *done]), now=at(3), height=12))
    assert len(lines) <= 12
    assert any("facts" in line for line in lines)
    assert any("and 51 more tasks" in line for line in lines)


def test_a_revised_plan_replaces_what_has_not_started() -> None:
    revised = Plan(
        tasks=(PLAN.tasks[0], PLAN.tasks[1], PlanTask(id="letter", description="Write a letter")),
        revision=2,
    )
    view = pictured([*RECORDED, e.PlanRevised(plan=revised, reason="no report wanted")])
    assert [t.node for t in view.tasks.values() if t.status == "pending" and t.path] == ["letter"]
    assert view.revision == 2


def test_a_delta_that_overtakes_the_start_of_its_task_and_step_finds_its_place() -> None:
    early = [
        e.MessageDelta(step="3/model/1", task_id=task("3"), text="Dear "),
        e.TaskStarted(path="3", node="report", kind="agent", task_id=task("3"), at=at(2)),
        e.StepStarted(step="3/tool/a", kind="tool", name="now", task_id=task("3"), at=at(2)),
        e.StepStarted(step="3/model/1", kind="model", name="demo", task_id=task("3"), at=at(2)),
        e.MessageDelta(step="3/model/1", task_id=task("3"), text="reader"),
    ]
    assert drawn(render(pictured([*RECORDED, *early]), now=at(3)))[-5:-2] == [
        "└── ◐ report  Write the report  1.00 s",
        "    ├── ◐ now()",
        "    └── ◐ model demo  Dear reader",
    ]


def test_a_step_in_doubt_is_marked() -> None:
    doubt = e.StepInDoubt(
        step="2/tool/c1", kind="tool", name="pay", detail="May have run", task_id=task("2")
    )
    lines = drawn(render(pictured([*RECORDED[:8], doubt]), now=at(3)))
    assert any("? add(a=1, b=x)  May have run" in line for line in lines)


def test_events_in_any_width_never_wrap_a_task_line() -> None:
    for width in (30, 60, 200):
        lines = drawn(render(pictured(RECORDED), now=at(3), width=width), width)
        assert all(len(line) <= width for line in lines)


def test_plain_lines_tell_the_same_story_without_the_stream() -> None:
    lines = [line for event in stamped([*RECORDED, *REST]) for line in lines_of(event)]
    assert lines[0] == f"run {RUN}: Write a report"
    assert lines[1] == "model demo: 100→40 tokens, 1.00 s"
    assert lines[2:6] == [
        "plan: 3 tasks",
        "  facts: Collect the facts",
        "  sums: Add the figures",
        "  report: Write the report (after facts, sums)",
    ]
    assert "task 2: tool add(a=1, b=x)" in lines
    assert "task 2: tool add = 3" in lines
    assert not any("are these" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


async def test_on_a_terminal_the_tree_is_drawn_in_place_and_left_standing_at_the_end() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=30)
    display = display_for(console, silent=False)
    assert isinstance(display, LiveTree)
    view = pictured([])
    for event in stamped(RECORDED):
        view.apply(event)
        await display.show(view, event)
    display.close(view)
    *_, last = out.getvalue().split("\x1b[?25h")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    assert "◐ goal Write a report" in plain and "The facts are these" in plain
    assert plain.rstrip().endswith(RUN)


def test_what_is_said_into_a_run_stands_in_the_tree_and_in_the_lines() -> None:
    parts = [{"type": "input_text", "text": "by"}, {"type": "input_text", "text": "Friday"}]
    items = [{"role": "user", "content": parts}, {"role": "user", "content": "please"}]
    said = [
        e.RunSteered(run_id=RUN, at=at(2), input=given, by="ann", sent_at=at(1))
        for given in ("In euros.", items)
    ]
    tree = "\n".join(drawn(render(pictured([*RECORDED, *said]))))
    assert "ann said: In euros." in tree and "ann said: by Friday please" in tree
    assert [line for one in said for line in lines_of(one)] == [
        "ann said into the run: In euros.",
        "ann said into the run: by Friday please",
    ]
