"""The tools by which any agent, plan or workflow remembers: ``remember``, ``recall``, ``forget``
and ``search_documents``.

Leans on the desk that the run carries, and on the run's place for tenant, subject and provenance:
a model cannot name those. Refuses to hand on what was remembered as anything but data: each
memory comes quoted, with who wrote it, under a note that says so.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

from agents import FunctionTool, RunContextWrapper, function_tool

from agent_server.domain.agents import ToolEffect
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError, NotFound, ToolError
from agent_server.domain.events import MemoryWritten
from agent_server.domain.ids import derived_id
from agent_server.domain.memories import (
    DEFAULT_NAMESPACE,
    Memory,
    MemoryFilter,
    MemoryKind,
    MemoryQuery,
    MemorySource,
    NewMemory,
    says_nothing_new,
)
from agent_server.execution.ports import TaskContext
from agent_server.inference.durable_run import PLACE, Place
from agent_server.memory.desk import MemoryDesk
from agent_server.memory.recalling import Recall
from agent_server.registry.slugs import slug

MAX_CONTENT: Final = 20_000
"""Characters of one thing remembered."""
MAX_FOUND: Final = 50


def explained(context: RunContextWrapper[Any], error: Exception) -> str:
    """What a model is told of a call that failed: the reason, and what to do."""
    if isinstance(error, AgentServerError):
        return f"{error.detail} {error.hint}" if error.hint else error.detail
    return f"The tool failed: {type(error).__name__}: {error}"


_tool = function_tool(failure_error_function=explained, strict_mode=False)
"""Not strict, so that what has a default may be left out."""


def desk_here() -> tuple[Place, MemoryDesk]:
    """Where the tool is called, and the desk of the server that runs it."""
    place = PLACE.get()
    desk = place.run.services.get(MemoryDesk) if place is not None else None
    if place is None or desk is None:
        raise ToolError(
            "This tool works in a run of Agent Server.",
            hint="Serve the agent with `agent-server serve`, or run it with `agent-server run`.",
        )
    if not place.run.journal.stores:
        raise ToolError(
            "This run is not stored, so it neither remembers nor recalls.",
            hint="Leave out `store: false`.",
        )
    return place, desk


def source_of(place: Place) -> MemorySource:
    """Who writes at ``place``: its run, task, step and agent, for the run's principal."""
    ctx = place.run.ctx
    step = place.run.journal.recorded(place.scope.prefix).get(place.scope.prefix)
    return MemorySource(
        run_id=ctx.run.id,
        task_id=place.run.journal.task_id,
        step_id=place.scope.prefix,
        agent=slug(step.agent) if step is not None and step.agent else None,
        principal=ctx.run.principal,
    )


@_tool
async def remember(
    content: str,
    key: str | None = None,
    kind: Literal["knowledge", "context", "interaction", "outcome", "result"] = "knowledge",
    importance: float | None = None,
    namespace: str = DEFAULT_NAMESPACE,
) -> JsonObject:
    """Keep something for later runs: a fact, a preference, a decision, a result.

    Args:
        content: What to keep, complete in itself: it is read without this conversation.
        key: Names the one thing it is about, such as "ada/favourite colour". What was kept
            under the same key before is superseded. Leave it out for something of its own.
        kind: knowledge for a fact; context, interaction, outcome or result for work in progress.
        importance: From 0 to 1, if it matters more or less than usual.
        namespace: The part of the memory to keep it in.
    """
    place, desk = desk_here()
    if len(content) > MAX_CONTENT:
        raise ToolError(
            f"{len(content):,} characters are too many to remember at once.",
            hint=f"Keep what matters of it in at most {MAX_CONTENT:,}.",
        )
    ctx, step = place.run.ctx, place.scope.prefix
    held: Sequence[Memory] = ()
    if key:
        there = MemoryFilter(key=key, namespace=namespace)
        held = (await desk.store.page(ctx.run.tenant, there, limit=1, cursor=None)).data
        if any(memory.subject not in (None, ctx.run.request.subject) for memory in held):
            raise ToolError(
                f"The key {key!r} names what is known about another person.",
                hint="Choose one that says whom it is about, such as 'ada/favourite colour'.",
            )
    memory = NewMemory(
        id=derived_id("mem", ctx.run.id, step),
        kind=kind,
        content=content,
        key=key or None,
        namespace=namespace,
        subject=ctx.run.request.subject,
        importance=importance,
        source=source_of(place),
        spares=frozenset({"others"}),  # Until now nobody else had the key.
    )
    for known in held:
        if says_nothing_new(dict(memory), dict(known)):
            return {"remembered": known.id}
    prepared = desk.store.prepare([memory])
    place.run.journal.along(
        step,
        lambda connection: desk.store.insert(connection, ctx.run.tenant, prepared),
        MemoryWritten(memory_ids=(memory.id or "",)),
    )
    return {"remembered": memory.id}


@_tool
async def recall(
    query: str,
    limit: int = 5,
    kinds: list[MemoryKind] | None = None,
    namespace: str | None = None,
) -> JsonObject:
    """Find what was kept before: facts, earlier conversations, results, how work went.

    Args:
        query: What is sought, in ordinary words; names and dates help.
        limit: How many memories at most, up to 50.
        kinds: Only these kinds.
        namespace: Only in this part of the memory.
    """
    asked = MemoryQuery(
        query=query,
        limit=max(1, min(limit, MAX_FOUND)),
        kinds=tuple(kinds) if kinds else None,
        namespace=namespace,
    )
    return await _recalled(asked)


@_tool
async def search_documents(query: str, limit: int = 5, namespace: str | None = None) -> JsonObject:
    """Find passages in the documents that were given to this server.

    Args:
        query: What is sought, in ordinary words.
        limit: How many passages at most, up to 50.
        namespace: Only in this part of the memory.
    """
    asked = MemoryQuery(
        query=query,
        limit=max(1, min(limit, MAX_FOUND)),
        kinds=("document",),
        namespace=namespace,
    )
    return await _recalled(asked)


@_tool
async def forget(memory_id: str | None = None, key: str | None = None) -> JsonObject:
    """Delete what an agent remembered, with every earlier version of it.

    Args:
        memory_id: The memory, as `recall` or `remember` named it.
        key: Or the key under which it was kept.
    """
    place, desk = desk_here()
    tenant = place.run.ctx.run.tenant
    if (memory_id is None) == (key is None):
        raise ToolError("Name either the memory_id or the key of what to forget.")
    if memory_id is not None:
        try:
            found = [await desk.store.get(tenant, memory_id)]
        except NotFound:
            found = []
    else:
        page = await desk.store.page(tenant, MemoryFilter(key=key), limit=100, cursor=None)
        found = list(page.data)
    held = [memory.id for memory in found if not _may_forget(place.run.ctx, memory)]
    if held:
        raise ToolError(
            f"{held[0]} was not written by an agent for this run's subject, so an agent may not "
            "delete it.",
            hint="A person can: DELETE /api/v1/memories/{id}.",
        )
    gone = [memory.id for memory in found]
    await desk.store.delete(tenant, gone)
    return {"forgotten": gone}


MEMORY_TOOLS: Final[tuple[FunctionTool, ...]] = (remember, recall, forget, search_documents)
WRITING: Final = {
    "keep_facts": ToolEffect.IDEMPOTENT,
    remember.name: ToolEffect.IDEMPOTENT,
    forget.name: ToolEffect.IDEMPOTENT,
}
"""A repeated call finds its own memory and changes nothing."""


def _may_forget(ctx: TaskContext, memory: Memory) -> bool:
    """An agent deletes what agents wrote, and of people's data only those of its run's subject."""
    return memory.source.run_id is not None and memory.subject in (None, ctx.run.request.subject)


async def _recalled(query: MemoryQuery) -> dict[str, Any]:
    place, desk = desk_here()
    return await Recall(desk.store).at_step(place.run.ctx, place.scope.prefix, query)
