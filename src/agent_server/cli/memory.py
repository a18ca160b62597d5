"""``agent-server memory …``: look at what is remembered, add to it, forget.

Leans on the client; without a server, on an embedded one that carries out nothing. Refuses to
show less than an agent would be given.
"""

import sys
from typing import Any

from rich.text import Text

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import printable
from agent_server.cli.output import new_table, print_json, wide_console
from agent_server.cli.runs import LOOKING
from agent_server.cli.workflows import pairs
from agent_server.domain.memories import Memory

SHOWN = 300
"""Characters of a content in a list."""


async def search(where: Target, query: str, fields: dict[str, Any], *, as_json: bool) -> None:
    """Print what is found, with the parts of each score."""
    fields["filter"] = pairs(fields["filter"] or (), "--filter")
    async with connect(where, LOOKING) as client:
        found = await client.memories.search(query, **_given(fields))
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    for one in found:
        why = ", ".join(f"{name} {value:.3f}" for name, value in one.matched.items())
        _print(one.memory, f"score {one.score:.3f}: {why}")
    if not found:
        wide_console().print("Nothing is found.")


async def show(
    where: Target, memory_id: str | None, filters: dict[str, Any], *, as_json: bool
) -> None:
    """Print one memory and its life, or the newest."""
    async with connect(where, LOOKING) as client:
        if memory_id is None:
            page = await client.memories.list(**_given(filters))
            if as_json:
                print_json([memory.model_dump(mode="json") for memory in page.data])
            else:
                for memory in page.data:
                    _print(memory)
                if not page.data:
                    wide_console().print("No memories.")
            return
        memory = await client.memories.get(memory_id)
        history = await client.memories.history(memory_id)
        uses = await client.memories.uses(memory_id)
    if as_json:
        print_json(
            {
                "memory": memory.model_dump(mode="json"),
                "history": [version.model_dump(mode="json") for version in history],
                "uses": [use.model_dump(mode="json") for use in uses],
            }
        )
        return
    out = wide_console()
    out.print_json(memory.model_dump_json())
    for version in history[:-1]:
        out.print(Text(f"version {version.version}: {_text(version)}", style="dim"))
    for use in uses:
        out.print(Text(f"recalled by {use.run_id} for {printable(use.query)!r}", style="dim"))


async def add(where: Target, content: str, fields: dict[str, Any]) -> None:
    """Keep one memory and print its id."""
    fields["metadata"] = pairs(fields["metadata"] or (), "--meta")
    text = sys.stdin.read() if content == "-" else content
    async with connect(where, LOOKING) as client:
        memory = await client.memories.add(text, **_given(fields))
    sys.stdout.write(f"{memory.id}\n")


async def forget(where: Target, memory_id: str) -> None:
    """Delete one memory."""
    async with connect(where, LOOKING) as client:
        await client.memories.delete(memory_id)
    sys.stdout.write(f"{memory_id}: forgotten\n")


async def erase(where: Target, subject: str) -> None:
    """Erase a person and print the receipt."""
    async with connect(where, LOOKING) as client:
        receipt = await client.memories.erase(subject)
    print_json(receipt.model_dump(mode="json"))


async def stats(where: Target, *, as_json: bool) -> None:
    """Print how much is kept."""
    async with connect(where, LOOKING) as client:
        found = await client.memories.stats()
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    rows = new_table("what", "count")
    rows.add_row("memories", str(found.memories))
    for kind, count in sorted(found.by_kind.items()):
        rows.add_row(f"  {kind}", str(count))
    for name, count in sorted(found.by_namespace.items()):
        rows.add_row(f"  in {printable(name)}", str(count))
    if found.pieces:
        rows.add_row("  pieces of documents", str(found.pieces))
    rows.add_row("versions replaced", str(found.replaced))
    rows.add_row(f"vectors ({found.embedder or 'no embedder'})", str(found.vectors))
    rows.add_row("vectors to come", str(found.waiting))
    out = wide_console()
    out.print(rows)
    if found.waiting and found.trouble:
        out.print(Text(f"Why vectors are to come: {printable(found.trouble)}"), soft_wrap=True)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _print(memory: Memory, score: str = "") -> None:
    source = memory.source
    by = source.agent or source.principal or "somebody"
    run = f" in {source.run_id}" if source.run_id else ""
    head = f"{memory.id}  {memory.kind}  {memory.created_at:%Y-%m-%d %H:%M}  by {by}{run}"
    out = wide_console()
    out.print(Text(head, style="bold"), soft_wrap=True)
    told = {
        "key": memory.key,
        "title": memory.metadata.get("title"),
        "page": memory.metadata.get("page"),
        "about": memory.subject,
        "said by": memory.author if memory.author != by else None,
        "happened": memory.occurred_at and f"{memory.occurred_at:%Y-%m-%d %H:%M}",
    }
    details = [f"{n} {printable(str(v))}" for n, v in told.items() if v is not None]
    if details := [*details, score] if score else details:
        out.print(Text(f"  {', '.join(details)}", style="dim"), soft_wrap=True)
    out.print(Text(f"  {_text(memory)}"), soft_wrap=True)


def _text(memory: Memory) -> str:
    content = memory.content if isinstance(memory.content, str) else str(memory.content)
    line = " ".join(printable(content).split())
    return line if len(line) <= SHOWN else line[:SHOWN] + " …"
