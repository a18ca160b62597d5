"""The two tools between which a model looks through a conversation: read it, and keep its facts.

Leans on ``memory.consolidation``. Served to the server's own workflow alone: no agent and no plan
is offered them.
"""

from typing import Any, Final

from agents import FunctionTool, function_tool
from pydantic import ValidationError

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import ToolError
from agent_server.domain.events import MemoryWritten
from agent_server.memory import consolidation
from agent_server.memory.recalling import Recall
from agent_server.registry.memory_tools import desk_here, source_of


@function_tool
async def read_conversation(run_id: str) -> JsonObject:
    """What was said in a run, as a question for facts in it."""
    place, desk = desk_here()
    ctx = place.run.ctx
    said = await desk.database.read(lambda c: consolidation.said_in(c, ctx.run.tenant, run_id))
    return await consolidation.question(Recall(desk.store), ctx, place.scope.prefix, said)


@function_tool(strict_mode=False)
async def keep_facts(run_id: str, facts: list[dict[str, Any]], known: list[str]) -> JsonObject:
    """Keep the facts that were found in a run."""
    place, desk = desk_here()
    ctx, step = place.run.ctx, place.scope.prefix
    try:
        found = [consolidation.Fact.model_validate(fact) for fact in facts]
    except ValidationError as error:
        raise ToolError(f"The facts cannot be read: {error}") from error
    memories = await consolidation.apply(
        desk.store,
        ctx.run.tenant,
        found,
        known=known,
        run_id=run_id,
        subject=ctx.run.request.subject,
        source=source_of(place),
        fence=await place.run.journal.fence(),
    )
    ids = tuple(memory.id or "" for memory in memories)
    if memories:
        prepared = desk.store.prepare(memories)
        place.run.journal.along(
            step,
            lambda connection: desk.store.insert(connection, ctx.run.tenant, prepared),
            MemoryWritten(memory_ids=ids),
        )
    return {"kept": list(ids)}


CONSOLIDATION_TOOLS: Final[tuple[FunctionTool, ...]] = (read_conversation, keep_facts)
