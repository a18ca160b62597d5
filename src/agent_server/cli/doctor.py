"""``agent-server doctor``: looks at what a server here would stand on, and says what to mend.

Leans on the settings, and on the parts it examines only while it does. Refuses to change
anything: it opens, looks and closes.
"""

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio
import httpx2
from rich.console import Console
from rich.text import Text

from agent_server.cli import work
from agent_server.cli.errors import printable
from agent_server.domain.errors import AgentServerError, DataDirLocked
from agent_server.memory.embedders import embedder_for
from agent_server.observability import configure_logs
from agent_server.settings import Settings, load_settings, unknown_variables

try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None  # type: ignore[assignment]

DISK_LOW = 512 * 1024 * 1024
"""Bytes free below which the disk counts as nearly full."""
FILES_WANTED = 4096
"""Open files that a busy server may need: one for each stream and connection."""
LARGE_NAMESPACE = 250_000
"""Memories in one namespace above which SQLite searches slowly; PostgreSQL bears more."""
DATABASE_S = 10.0
"""Seconds until a database that does not answer counts as unreachable."""
CLOCK_S = 5.0
"""What two clocks may be apart by."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str | None = None


def examine(settings: Settings) -> Iterator[Finding]:
    """Each finding as soon as it is known."""
    checks: tuple[Callable[[Settings], Finding], ...] = (
        check_settings,
        check_database,
        check_memory,
        check_blobs,
        check_disk,
        check_agents,
        check_model,
        check_key,
        check_port,
        check_clock,
        check_files,
    )
    for check in checks:
        yield check(settings)


def check_settings(settings: Settings) -> Finding:
    unknown = unknown_variables(os.environ)
    if not unknown:
        return Finding("settings", "ok", f"{settings.env}, role {settings.role}")
    named = ", ".join(f"{n} (perhaps {near}?)" if near else n for n, near in unknown.items())
    return Finding(
        "settings", "warning", f"No setting is called {named}.", "`agent-server config` lists all."
    )


def check_database(settings: Settings) -> Finding:
    kind = settings.database.partition(":")[0]
    if kind == "sqlite" and not Path(settings.database.partition("///")[2]).exists():
        return _check_folder(settings)
    try:
        found = anyio.run(work.database.state, settings, DATABASE_S)
    except DataDirLocked as error:
        return Finding("database", "ok", f"In use by a running server: {error.detail}")
    except AgentServerError as error:
        return Finding("database", "failed", error.detail, error.hint)
    except TimeoutError:
        return Finding(
            "database",
            "failed",
            f"The database did not answer within {DATABASE_S:.0f} s.",
            "Check that it runs and that AGENT_SERVER_DATABASE_URL is right.",
        )
    if found.revision != found.newest:
        return Finding(
            "database",
            "warning",
            f"{kind}, at revision {found.revision or 'none'}; the newest is {found.newest}.",
            "`agent-server db upgrade`, or start the server, which does the same.",
        )
    if abs(found.off_s) > CLOCK_S:
        return Finding(
            "database",
            "failed",
            f"Its clock and this machine's are {abs(found.off_s):,.0f} s apart.",
            "Set both by NTP: runs for later, waits and expiries go by the clock of whoever looks.",
        )
    needs = settings.database_pool_size + 2
    if found.room is not None and found.room < needs:
        return Finding(
            "database",
            "warning",
            f"PostgreSQL has {found.room} connections left; a process takes up to {needs}.",
            "Raise max_connections, or lower AGENT_SERVER_DATABASE_POOL_SIZE.",
        )
    return Finding("database", "ok", f"{kind}, at the newest revision {found.newest}")


def _check_folder(settings: Settings) -> Finding:
    path = Path(settings.database.partition("///")[2]).absolute()
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Finding(
            "database",
            "failed",
            f"{str(path)!r} cannot be made: {str(folder)!r} is not writable.",
            "Set AGENT_SERVER_DATA_DIR to a folder of this user.",
        )
    return Finding("database", "ok", f"{str(path)!r} will be made at the first start")


def check_memory(settings: Settings) -> Finding:
    try:
        embedder_for(settings, settings.embedder, settings.embedder_model)
    except AgentServerError as error:
        return Finding("memory", "failed", error.detail, error.hint)
    kind = settings.database.partition(":")[0]
    found = work.database.MemorySizes(0, 0, "", None)
    fresh = kind == "sqlite" and not Path(settings.database.partition("///")[2]).exists()
    if not fresh:
        try:
            found = anyio.run(work.database.memory_sizes, settings, DATABASE_S)
        except DataDirLocked as error:
            return Finding("memory", "ok", f"In use by a running server: {error.detail}")
        except (AgentServerError, TimeoutError):
            return Finding("memory", "warning", "Not looked at: the database does not answer.")
    embeds = settings.embedder != "none"
    said = f"{found.rows:,} memories, " + (
        f"found by words and by vectors of {settings.embedder}"
        if embeds
        else "found by words (AGENT_SERVER_EMBEDDER adds vectors)"
    )
    if embeds and not fresh:
        if found.vectors is None:
            return Finding(
                "memory",
                "warning",
                f"{said}, but nothing here searches vectors.",
                "Install numpy, or a Python whose sqlite3 loads extensions; on PostgreSQL, pgvector.",
            )
        said += f", searched by {found.vectors}"
    if kind == "sqlite" and found.largest > LARGE_NAMESPACE:
        return Finding(
            "memory",
            "warning",
            f"{said}; {found.largest:,} of them in the namespace {found.name!r}, which is slow here.",
            "Spread them over namespaces, or move to PostgreSQL with `agent-server db copy`.",
        )
    return Finding("memory", "ok", said)


def check_blobs(settings: Settings) -> Finding:
    if settings.blobs == "database":
        return Finding("large values", "ok", "in the database")
    try:
        return Finding(
            "large values",
            "ok",
            f"{anyio.run(work.database.try_blobs, settings)}: writes and reads",
        )
    except AgentServerError as error:
        return Finding("large values", "failed", error.detail, error.hint)


def check_disk(settings: Settings) -> Finding:
    folder = next(p for p in (settings.data_dir.absolute() / "x").parents if p.exists())
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free at {str(folder)!r}"
    if free < DISK_LOW:
        return Finding("disk", "failed", said, "Free some space, or move AGENT_SERVER_DATA_DIR.")
    return Finding("disk", "ok", said)


def check_agents(settings: Settings) -> Finding:
    # The SDK is loaded after all that is found without it.
    from agent_server.registry.registry import Registry  # noqa: PLC0415

    catalog = anyio.run(Registry(settings).load)
    names = sorted(catalog.agents)
    if not catalog.errors:
        listed = ", ".join(names) or "none yet: write agents.py, or set AGENT_SERVER_AGENTS"
        return Finding("agents", "ok", listed)
    told = "; ".join(
        f"{e.source}{f', line {e.line}' if e.line else ''}: {e.message}" for e in catalog.errors
    )
    return Finding("agents", "failed", told, "Correct the file; the other agents are served.")


def check_model(settings: Settings) -> Finding:
    model = settings.effective_model
    if settings.openai_api_key is None and settings.openai_base_url is None:
        if model == "demo":
            return Finding(
                "model",
                "ok",
                "The built-in demo model, which needs no key and is no language model. "
                "Set OPENAI_API_KEY or OPENAI_BASE_URL for a real one.",
            )
        return Finding(
            "model",
            "warning",
            f"{model!r} is asked for, but neither OPENAI_API_KEY nor OPENAI_BASE_URL is set.",
            "Set the key, or unset AGENT_SERVER_MODEL for the demo model.",
        )
    if settings.openai_base_url is None:
        return Finding("model", "ok", f"{model!r} with OPENAI_API_KEY (not tried: it may cost)")
    try:
        httpx2.get(settings.openai_base_url, timeout=5.0)
    except httpx2.HTTPError as error:
        return Finding(
            "model",
            "failed",
            f"OPENAI_BASE_URL {settings.openai_base_url!r} does not answer: {error}.",
            "Start the model server, or correct the address.",
        )
    return Finding("model", "ok", f"{model!r} at {settings.openai_base_url!r}, which answers")


def check_key(settings: Settings) -> Finding:
    if settings.has_key:
        return Finding("key", "ok", "A key closes every call but the probes")
    if settings.env == "production":
        return Finding(
            "key",
            "failed",
            "Production refuses to start without AGENT_SERVER_API_KEY.",
            "Set it to a random text of 32 characters or more.",
        )
    return Finding("key", "ok", "No key: development answers callers on this machine only")


def check_port(settings: Settings) -> Finding:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    where = f"{settings.host}:{settings.port}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            return Finding(
                "port",
                "failed",
                f"{where} cannot be listened on: {error.strerror}.",
                "If a server of yours runs there, all is well; else set AGENT_SERVER_PORT.",
            )
    return Finding("port", "ok", f"{where} is free")


def check_clock(settings: Settings) -> Finding:
    now = time.time()
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < Path(__file__).stat().st_mtime - 86_400:
        return Finding(
            "clock",
            "failed",
            f"The clock says {said}, which is before this program was installed.",
            "Set it, best by NTP: ids, leases and time limits rest on it.",
        )
    return Finding("clock", "ok", said)


def check_files(settings: Settings) -> Finding:
    if resource is None:
        return Finding("open files", "ok", "no limit that this system tells")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES_WANTED:
        return Finding("open files", "ok", f"limit {soft}")
    return Finding(
        "open files",
        "warning",
        f"The limit is {soft}; each stream takes one.",
        f"`ulimit -n {FILES_WANTED}` before the start, or LimitNOFILE= in its service file.",
    )


def doctor() -> bool:
    """Print each finding; False when one failed."""
    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}
    well = True
    settings = load_settings()
    configure_logs(settings.model_copy(update={"log_level": "ERROR"}))
    for finding in examine(settings):
        well = well and finding.state != "failed"
        mark, style = marks[finding.state]
        console.print(Text.assemble((mark, style), f" {finding.name}: ", printable(finding.detail)))
        if finding.remedy and finding.state != "ok":
            console.print(Text(f"    {printable(finding.remedy)}", style="bold"))
    sys.stdout.flush()
    return well
