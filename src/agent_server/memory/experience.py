"""Past experience: what a goal's run leaves behind, and what a later one is shown of it.

Leans on the journal, so that a replay is shown the same and writes once, and on recall. Refuses to
judge: what is shown is data beside the task, with its source.
"""

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ErrorInfo, NotFound
from agent_server.domain.events import MemoryWritten
from agent_server.domain.ids import derived_id
from agent_server.domain.memories import Found, MemoryKind, MemoryQuery, MemorySource, NewMemory
from agent_server.domain.plans import PlanState
from agent_server.domain.runs import Usage
from agent_server.execution import store as execution
from agent_server.execution.ports import TaskContext
from agent_server.execution.runs import Runs
from agent_server.memory.ports import Memories
from agent_server.memory.recalling import NOTE, Recall, shown

SHOWN: Final = 3
"""Memories that a planner or a task is shown at most."""
LIKE: Final = 0.5
"""Share of the shorter text's words that must be in both for one to be like the other."""
MAX_TEXT: Final = 4_000
"""Characters of an output that are remembered."""
_RECORD = "memory/experience"
_ASKED = 2_000
_CANDIDATES = 12
_WORD = re.compile(r"\w{3,}")
_COMMON = frozenset(
    "the and for with that this from are was were has have had not but you your our their them into "
    "use using make write find get give all any each one two new result results task goal please".split()
)


@dataclass(frozen=True)
class Story:
    """How a goal was worked off, as it is stored."""

    plan: PlanState
    lessons: tuple[str, ...]
    """Why the plan had to be revised, and what failed."""
    usage: Usage


async def story_of(runs: Runs, ctx: TaskContext) -> Story:
    """The story of the run that ``ctx`` is about to end."""
    tenant, run_id = ctx.run.tenant, ctx.run.id
    await ctx.journal.flush()
    run = await runs.get(tenant, run_id)
    try:
        plan = await runs.plan(tenant, run_id)
    except NotFound:
        plan = PlanState(tasks=())
    revised = await runs.database.read(
        lambda c: execution.events_of(c, tenant, run_id, ("plan.revised",))
    )
    return Story(plan, tuple(event["reason"] for event in revised), run.usage)


StoryOf = Callable[[TaskContext], Awaitable[Story]]


class Experience:
    """Remembers how goals went, and recalls it for goals and tasks that are like them."""

    def __init__(self, store: Memories, story_of: StoryOf) -> None:
        self._store = store
        self._recall = Recall(store)
        self._story_of = story_of

    async def of_goal(self, ctx: TaskContext, goal: str) -> str:
        """How earlier goals like this one went, for the planner; empty when there is none."""
        return await self._shown(ctx, "memory/goal", goal, ("execution",))

    async def of_task(self, ctx: TaskContext, text: str) -> str:
        """Facts and results that the task ``text`` may need; empty when there are none."""
        return await self._shown(ctx, "memory/task", text, ("knowledge", "result"))

    async def record(
        self, ctx: TaskContext, *, output: Any = None, error: ErrorInfo | None = None
    ) -> None:
        """Keep how the run's goal went: an ``execution``; each task's output, as ``result`` where
        nothing followed it and as ``outcome`` on the way there; the run's ``context``. Written
        once in the life of the run.
        """
        key = ctx.journal.key(_RECORD)

        async def make() -> JsonObject:
            story = await self._story_of(ctx)
            memories = _left_behind(ctx, key, story, output, error)
            prepared = self._store.prepare(memories)
            ids = tuple(memory.id or "" for memory in memories)
            ctx.journal.along(
                key,
                lambda connection: self._store.insert(connection, ctx.run.tenant, prepared),
                MemoryWritten(memory_ids=ids),
            )
            return {"memories": list(ids)}

        if ctx.journal.stores:
            await ctx.value(_RECORD, make)

    async def _shown(
        self, ctx: TaskContext, name: str, text: str, kinds: tuple[MemoryKind, ...]
    ) -> str:
        key, recorded = ctx.journal.key(name), ctx.journal.recorded()
        text = text[:_ASKED]
        found: list[Found] = []
        if key not in recorded:
            if recorded or not ctx.journal.stores:
                return ""  # An earlier attempt went on without.
            query = MemoryQuery(query=text, kinds=kinds, limit=_CANDIDATES)
            like = [
                one
                for one in await self._recall.find(ctx, query)
                if alike(text, _about(one.memory.content))
            ][:SHOWN]
            found = await self._recall.note(ctx, key, text, like) if like else []
            if not found:
                return ""

        async def make() -> JsonObject:
            return shown(found)

        value = await ctx.value(name, make)
        lines = [json.dumps(memory, ensure_ascii=False) for memory in value["memories"]]
        return "\n".join([NOTE, *lines])


def alike(one: str, other: str) -> bool:
    """Whether two texts are about the same, as far as their words tell."""
    first, second = _words(one), _words(other)
    least, shared = min(len(first), len(second)), len(first & second)
    # One word in common says little, unless there is no other in either.
    return shared > 0 and shared / least >= LIKE and (shared > 1 or first == second)


def _words(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if word not in _COMMON}


def _about(content: Any) -> str:
    """What a memory says it is about: a goal or a task, else its words."""
    if isinstance(content, dict):
        about = content.get("goal") or content.get("task")
        if isinstance(about, str):
            return about
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _left_behind(
    ctx: TaskContext, key: str, story: Story, output: Any, error: ErrorInfo | None
) -> list[NewMemory]:
    request, tasks = ctx.run.request, story.plan.tasks
    source = MemorySource(run_id=ctx.run.id, step_id=key, principal=ctx.run.principal)

    def memory(kind: MemoryKind, name: str, content: Any, agent: str | None = None) -> NewMemory:
        return NewMemory(
            id=derived_id("mem", ctx.run.id, f"{key}/{name}"),
            kind=kind,
            content=content,
            subject=request.subject,
            source=source.model_copy(update={"agent": agent}),
        )

    planned = [task.model_dump(include={"id", "description", "agent", "status"}) for task in tasks]
    went: JsonObject = {
        "goal": request.goal,
        "status": "succeeded" if error is None else "failed",
        "outcome": _short(output if error is None else error.message),
        "plan": [
            one | {"tools": list(task.tools)} for one, task in zip(planned, tasks, strict=True)
        ],
        "lessons": list(story.lessons),
        "usage": story.usage.model_dump(mode="json"),
    }
    found = [memory("execution", "execution", went)]
    needed = {name for task in tasks for name in task.depends_on}
    for task in tasks:
        if task.status == "succeeded" and task.output is not None:
            content = {"task": task.description, "result": _short(task.output)}
            kind: MemoryKind = "outcome" if task.id in needed else "result"
            found.append(memory(kind, f"task/{task.id}", content, task.agent))
    if request.context:
        found.append(memory("context", "context", request.context))
    return found


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return value if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
