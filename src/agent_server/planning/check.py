"""Whether a plan can be carried out: every fault at once, each with its place and a way out.

Leans on the expressions' parser and on the names that the run may use. Refuses to change a plan:
who wrote it repairs it.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from agent_server.actions.firing import trigger_fault
from agent_server.actions.handler import Actions
from agent_server.domain.agents import AgentInfo, ToolInfo
from agent_server.domain.errors import AgentServerError, ExpressionError, FieldError
from agent_server.domain.json_schema import schema_fault
from agent_server.domain.plans import Plan, PlanTask
from agent_server.workflow.expressions import expression, template, templates_in

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class Offer:
    """What a plan may use."""

    agents: tuple[AgentInfo, ...]
    tools: tuple[ToolInfo, ...]
    actions: Actions

    @property
    def agent_names(self) -> tuple[str, ...]:
        return tuple(agent.name for agent in self.agents)

    @property
    def tool_names(self) -> tuple[str, ...]:
        return tuple(tool.name for tool in self.tools)

    def tools_of(self, agent: str | None) -> tuple[str, ...]:
        """The tools that a task of ``agent`` may name: those on offer and the agent's own."""
        own = next((info.tools for info in self.agents if info.name == agent), ())
        return (*self.tool_names, *(name for name in own if name not in self.tool_names))


def plan_faults(
    plan: Plan, offer: Offer, *, max_tasks: int, finished: Collection[str] = ()
) -> list[FieldError]:
    """Everything that is wrong with ``plan``. ``finished`` are ids of tasks of an earlier
    revision that need not be in it, may be depended on, and may not be used again."""
    tasks = plan.tasks
    faults: list[FieldError] = []
    if not tasks and not finished:
        faults.append(FieldError(path="tasks", message="the plan has no tasks"))
    if len(tasks) > max_tasks:
        faults.append(
            FieldError(path="tasks", message=f"{len(tasks)} tasks; at most {max_tasks} are allowed")
        )
    known = {task.id for task in tasks} | set(finished)
    faults.extend(_id_faults(tasks, finished))
    above = _ancestors(tasks)
    for number, task in enumerate(tasks):
        faults.extend(
            _task_faults(f"tasks.{number}", task, known, above.get(task.id, set()), offer)
        )
    for members in cycles(tasks):
        faults.append(
            FieldError(
                path="tasks",
                message="these tasks wait for each other: " + " → ".join([*members, members[0]]),
                hint="Take one of these dependencies away.",
            )
        )
    for number, action in enumerate(plan.actions):
        path = f"actions.{number}"
        fault = trigger_fault(action.trigger, sorted(known))
        if fault is not None:
            faults.append(FieldError(path=f"{path}.trigger", message=fault))
        try:
            found = offer.actions.faults(action.action, action.parameters, rendered=False)
            faults.extend(f.model_copy(update={"path": f"{path}.{f.path}"}) for f in found)
            for _, source in templates_in(action.parameters):
                template(source)
        except AgentServerError as error:
            faults.append(FieldError(path=f"{path}.action", message=error.detail, hint=error.hint))
    return faults


def _id_faults(tasks: Sequence[PlanTask], finished: Collection[str]) -> Iterator[FieldError]:
    seen: set[str] = set()
    for number, task in enumerate(tasks):
        path = f"tasks.{number}.id"
        if not task.id.strip():
            yield FieldError(path=path, message="the task has no id")
        elif not _ID.fullmatch(task.id):
            yield FieldError(
                path=path,
                message=f"the id {task.id!r} is not a letter followed by letters, digits, _ or -",
                hint="Use t1, t2, …",
            )
        if task.id in seen:
            yield FieldError(path=path, message=f"two tasks have the id {task.id!r}")
        if task.id in finished:
            yield FieldError(
                path=path,
                message=f"the task {task.id!r} is finished already",
                hint="Leave it out, or give a new task another id.",
            )
        seen.add(task.id)


def _task_faults(
    path: str, task: PlanTask, known: Collection[str], above: Collection[str], offer: Offer
) -> Iterator[FieldError]:
    if not task.description.strip():
        yield FieldError(path=f"{path}.description", message="the task has no description")
    if task.agent is not None and task.agent not in offer.agent_names:
        yield _unknown(f"{path}.agent", "agent", task.agent, offer.agent_names)
    tools = offer.tools_of(task.agent)
    for name in task.tools:
        if name not in tools:
            yield _unknown(f"{path}.tools", "tool", name, tools)
    for name in task.depends_on:
        if name not in known:
            yield _unknown(f"{path}.depends_on", "task", name, sorted(known))
    if isinstance(task.expected_output, dict):
        fault = schema_fault(task.expected_output)
        if fault is not None:
            yield FieldError(path=f"{path}.expected_output", message=fault)
    if task.when is not None:
        yield from _condition_faults(f"{path}.when", task.when, known, above)


def _condition_faults(
    path: str, when: str, known: Collection[str], above: Collection[str]
) -> Iterator[FieldError]:
    try:
        references = expression(when).references
    except ExpressionError as error:
        yield FieldError(path=path, message=error.detail, hint=error.hint)
        return
    for reference in references:
        if reference.root != "nodes" or not reference.keys:
            yield FieldError(
                path=path,
                message=f"{reference.root!r} is not known here",
                hint="Use nodes.<task id>.output or nodes.<task id>.status.",
            )
            continue
        name = str(reference.keys[0])
        if name not in known:
            yield _unknown(path, "task", name, sorted(known))
        elif name not in above:
            yield FieldError(
                path=path,
                message=f"the condition uses the task {name!r}, which it does not depend on",
                hint=f"Add {name!r} to depends_on.",
            )


def _unknown(path: str, noun: str, name: str, known: Collection[str]) -> FieldError:
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = None
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    elif known:
        hint = f"There are: {', '.join(list(known)[:30])}."
    return FieldError(path=path, message=f"there is no {noun} {name!r}", hint=hint)


def _direct(tasks: Sequence[PlanTask]) -> dict[str, list[str]]:
    """What each task names; two of one id, a fault of its own, count as one."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(task.id, []).extend(task.depends_on)
    return found


def _ancestors(tasks: Sequence[PlanTask]) -> dict[str, set[str]]:
    """For each task, everything that it waits for, directly or not."""
    direct = _direct(tasks)
    found: dict[str, set[str]] = {}
    for start in direct:
        seen: set[str] = set()
        todo = list(direct[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(direct.get(name, ()))
        found[start] = seen
    return found


def cycles(tasks: Sequence[PlanTask]) -> list[list[str]]:
    """Each ring of tasks that wait for each other, once, in the order in which they wait."""
    direct = _direct(tasks)
    above = _ancestors(tasks)
    found: list[list[str]] = []
    placed: set[str] = set()
    for start in direct:
        if start in placed or start not in above[start]:
            continue
        # Breadth first from start back to itself gives its shortest ring.
        came_from: dict[str, str] = {}
        todo = [start]
        while todo and start not in came_from:
            name = todo.pop(0)
            for following in direct.get(name, ()):
                if following not in came_from:
                    came_from[following] = name
                    todo.append(following)
        ring = [start]
        while came_from[ring[-1]] != start:
            ring.append(came_from[ring[-1]])
        ring = [ring[0], *reversed(ring[1:])]
        found.append(ring)
        placed |= set(ring) | {n for n in direct if n in above[start] and start in above.get(n, ())}
    return found
