"""``agent-server memory …``: the commands and their options, and nothing behind them.

Leans on Typer and on the options that all commands share. Refuses logic, as ``cli.app`` does.
"""

from pathlib import Path
from typing import Annotated

import typer

from agent_server.cli import work
from agent_server.cli.options import (
    ApiKeyOption,
    File,
    Fraction,
    JsonOption,
    Many,
    ServerOption,
    Text,
    do,
)

memory_app = typer.Typer(
    help="What is remembered: find, add, import, forget.", no_args_is_help=True
)

NamespaceOption = Annotated[Text, typer.Option("--namespace", "-n", help="Only in this one.")]
KindOption = Annotated[Text, typer.Option("--kind", "-k", help="Only of this kind.")]
SubjectOption = Annotated[Text, typer.Option("--subject", help="Only about this person.")]


@memory_app.command("search")
def search(
    query: str,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 10,
    namespace: NamespaceOption = None,
    kind: KindOption = None,
    session: Annotated[Text, typer.Option("--session", help="Only of this session.")] = None,
    subject: SubjectOption = None,
    for_subject: Annotated[
        Text, typer.Option("--for-subject", help="What a run about this person is given.")
    ] = None,
    having: Annotated[
        Many, typer.Option("--filter", "-f", help="Of the metadata: `key=value`, JSON or text.")
    ] = None,
    mode: Annotated[str, typer.Option(help="`hybrid`, `text` or `vector`.")] = "hybrid",
    as_of: Annotated[Text, typer.Option(help="As it was known at this moment (RFC 3339).")] = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Find memories, as an agent would, and say why each was found."""
    kinds = [kind] if kind else None
    fields = dict(
        namespace=namespace,
        kinds=kinds,
        session_id=session,
        subject=subject,
        for_subject=for_subject,
        filter=having,
        mode=mode,
        as_of=as_of,
        limit=limit,
    )
    do(work.memory.search, work.connect.target(server, api_key), query, fields, as_json=json)


@memory_app.command("show")
def show(
    memory_id: Annotated[
        Text, typer.Argument(help="One memory; else the newest are listed.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many to list.")] = 20,
    namespace: NamespaceOption = None,
    kind: KindOption = None,
    subject: SubjectOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Show one memory with its source, history and uses; or list the newest."""
    filters = {"namespace": namespace, "kind": kind, "subject": subject, "limit": limit}
    do(work.memory.show, work.connect.target(server, api_key), memory_id, filters, as_json=json)


@memory_app.command("add")
def add(
    content: Annotated[str, typer.Argument(help="What to keep; `-` reads stdin.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="What it is.")] = "knowledge",
    key: Annotated[Text, typer.Option(help="Supersedes what has this key.")] = None,
    namespace: Annotated[Text, typer.Option("--namespace", "-n", help="Where to keep it.")] = None,
    subject: Annotated[Text, typer.Option(help="The person it is about.")] = None,
    session: Annotated[Text, typer.Option("--session", help="Its conversation.")] = None,
    author: Annotated[Text, typer.Option(help="Who said or wrote it.")] = None,
    meta: Annotated[
        Many, typer.Option("--meta", "-m", help="Metadata: `key=value`, JSON or text.")
    ] = None,
    importance: Annotated[Fraction, typer.Option(help="From 0 to 1.")] = None,
    occurred_at: Annotated[Text, typer.Option(help="When it happened (RFC 3339).")] = None,
    expires_at: Annotated[Text, typer.Option(help="Until when it is kept (RFC 3339).")] = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Keep one memory and print its id."""
    fields = dict(
        kind=kind,
        key=key,
        namespace=namespace,
        subject=subject,
        session_id=session,
        author=author,
        metadata=meta,
        importance=importance,
        occurred_at=occurred_at,
        expires_at=expires_at,
    )
    do(work.memory.add, work.connect.target(server, api_key), content, fields)


@memory_app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="A folder of documents, a document, or .jsonl or .json memories.")
    ],
    namespace: Annotated[
        Text, typer.Option("--namespace", "-n", help="Where to keep them.")
    ] = None,
    subject: Annotated[Text, typer.Option(help="The person they are about.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Memories in one call.")] = 200,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Import documents or memories. Safe to repeat: what is there already is left as it is."""
    fields = {"namespace": namespace, "subject": subject}
    if not do(
        work.memory_import.run_import,
        work.connect.target(server, api_key),
        source,
        fields,
        batch=batch,
    ):
        raise typer.Exit(1)


@memory_app.command("export")
def export(
    file: Annotated[
        File,
        typer.Argument(
            help="`.json`: one readable file; else JSONL. Default, and `-`: JSONL to stdout."
        ),
    ] = None,
    namespace: NamespaceOption = None,
    kind: KindOption = None,
    subject: SubjectOption = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Export memories, oldest first, in a form that `import` reads."""
    filters = {"namespace": namespace, "kind": kind, "subject": subject}
    do(work.memory_import.run_export, work.connect.target(server, api_key), file, filters)


@memory_app.command("forget")
def forget(memory_id: str, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """Delete one memory with every version of it."""
    do(work.memory.forget, work.connect.target(server, api_key), memory_id)


@memory_app.command("erase")
def erase(
    subject: str,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Erase one person: memories, sessions and runs about them. Cannot be undone."""
    if not yes:
        typer.confirm(f"Erase everything about {subject!r}?", abort=True)
    do(work.memory.erase, work.connect.target(server, api_key), subject)


@memory_app.command("stats")
def stats(
    server: ServerOption = None, api_key: ApiKeyOption = None, json: JsonOption = False
) -> None:
    """Count what is remembered."""
    do(work.memory.stats, work.connect.target(server, api_key), as_json=json)


@memory_app.command("eval")
def evaluate(
    dataset: Annotated[Path, typer.Option(help="LoCoMo's JSON, or JSON lines.")],
    mode: Annotated[str, typer.Option(help="`hybrid`, `text`, `vector` or `words`.")] = "hybrid",
    against: Annotated[Text, typer.Option(help="Another of these, to compare.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure how well recall finds what is known to answer."""
    do(work.memory_eval.evaluate, dataset, mode, against, as_json=json)
