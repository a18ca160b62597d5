"""The registry: loads the user's agents and tools, and loads them again when a file changes.

Publishes one immutable ``Catalog`` after another; a run keeps the agents of the one it started
with. Leans on the importer, the sources and the policies, watches files with watchfiles, and
keeps the agents' MCP connections. Refuses to know what the agents are used for.
"""

import asyncio
import importlib
import linecache
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio
import structlog
from agents import Agent, FunctionTool
from agents.mcp import MCPServer
from watchfiles import Change, awatch

from agent_server.domain.agents import AgentInfo, ApprovalTerms, LoadError, ToolEffect, ToolInfo
from agent_server.domain.errors import AgentsFileError, FieldError
from agent_server.registry.catalog import SERVED_TOOLS, Catalog, foreign_names
from agent_server.registry.importer import FINDER, module_files, take_modules
from agent_server.registry.mcp_servers import McpConnections, servers_of
from agent_server.registry.naming import Loaded, Names, collected, unknown_names
from agent_server.registry.policies import FILE_NAME, Policies, merged, read_policy_file
from agent_server.registry.sources import (
    DEFAULTS,
    Failure,
    Group,
    Sources,
    find_sources,
    import_unit,
    in_library,
)
from agent_server.settings import Settings

log = structlog.get_logger("agent_server.registry")

_IMPORTING = threading.Lock()
"""``sys.modules`` is the process's, so one registry loads at a time."""
_BUILTIN_NAMES = frozenset(tool.name for tool in SERVED_TOOLS)
_DEBOUNCE_MS = 500
_STEP_MS = 100
_NOTHING = Sources((), (), (), ())
_Print = tuple[int, int] | None


class Registry:
    """Finds, loads and keeps the user's agents and tools.

    ``await load()`` once, ``await start()`` to follow edits (with ``settings.reload``), and
    ``await close()`` at the end. ``cwd`` is where relative paths begin; default: the process's.
    """

    def __init__(self, settings: Settings, cwd: Path | None = None) -> None:
        self._settings = settings
        self._cwd = (cwd or Path.cwd()).resolve()
        self._catalog = Catalog()
        self._sources = _NOTHING
        self._units: dict[str, Loaded] = {}
        self._files: dict[str, set[Path]] = {}
        self._prints: dict[Path, _Print] = {}
        self._policies: dict[Path, Policies] = {}
        self._changed = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._callbacks: list[Callable[[Catalog], None]] = []
        self._connections = McpConnections(settings.mcp_timeout_s)
        self._watcher: asyncio.Task[None] | None = None
        self._stop = anyio.Event()

    @property
    def snapshot(self) -> Catalog:
        """What is served now. Keep it for as long as one picture is needed."""
        return self._catalog

    async def load(self) -> Catalog:
        """Load every source. What fails is in the catalog's ``errors`` and stops nothing else.

        Raises ``AgentsFileError`` when a policy file is not valid: a policy that does not hold
        is worse than a server that does not start. (A reload keeps the last good one instead.)
        """
        return await self.reload()

    async def reload(self, changed: Iterable[Path] | None = None) -> Catalog:
        """Load again what the ``changed`` files belong to (default: everything), and publish."""
        async with self._reloading:
            paths = None if changed is None else set(changed)
            catalog = await asyncio.to_thread(self._load, paths)
            self._publish(catalog)
            await self._connections.retire(self._servers())
            return catalog

    async def start(self) -> None:
        """With ``settings.reload``: follow edits until ``close``. Returns once every edit counts."""
        if not self._settings.reload or self._watcher is not None:
            return
        watching: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self.watch(watching), name="agents watcher")
        await asyncio.wait({watching, self._watcher}, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Stop following edits and close the MCP connections."""
        self._stop.set()
        if self._watcher is not None:
            _, late = await asyncio.wait({self._watcher}, timeout=5.0)
            if late:
                self._watcher.cancel()
                await asyncio.wait({self._watcher}, timeout=1.0)
            self._watcher = None
        await self._connections.close()

    async def wait_version(self, version: int) -> Catalog:
        """Return the first catalog of at least this ``version``."""
        while self._catalog.version < version:
            await self._changed.wait()
        return self._catalog

    def on_change(self, callback: Callable[[Catalog], None]) -> None:
        """Call ``callback`` on the event loop with each catalog that is published."""
        self._callbacks.append(callback)

    async def ready(self, agent: Agent[Any]) -> None:
        """Return when the MCP servers of ``agent``, of its handoff targets and of its agents as
        tools are connected. Raises ``ToolError`` that names the server and the reason."""
        servers = servers_of(agent)
        if servers:
            await self._connections.ready(servers)

    @asynccontextmanager
    async def connected(self, agent: Agent[Any]) -> AsyncIterator[None]:
        """``ready`` for the length of a run: a reload meanwhile does not close its servers."""
        servers = servers_of(agent)
        if not servers:
            yield
            return
        async with self._connections.held(servers):
            yield

    def describe_agents(self) -> list[AgentInfo]:
        return self._catalog.describe_agents()

    def describe_tools(self) -> list[ToolInfo]:
        """The catalog's tools, and those of the MCP servers that are connected now."""
        catalog = self._catalog
        listed = catalog.describe_tools()
        names = {info.name for info in listed}
        for name, info in sorted(self._connections.tools().items()):
            if name not in names:
                policy = catalog.tool_policy(name)
                tags = frozenset(info.tags)
                held = catalog.approval(name, tags, "*") is not None
                listed.append(
                    info.model_copy(
                        update={
                            "effect": policy.effect or info.effect,
                            "timeout_s": policy.timeout_s,
                            "approval": info.approval or held,
                            "tags": tuple(sorted(tags.union(policy.tags))),
                        }
                    )
                )
        return listed

    # What inference asks of the operator's policies, answered by the newest catalog.

    def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
        if annotations is None and tool in _BUILTIN_NAMES and tool in self._connections.tools():
            annotations = {}  # an MCP tool that says nothing of itself, not a built-in of its name
        return self._catalog.effect(tool, annotations)

    def timeout_s(self, tool: str) -> float | None:
        return self._catalog.timeout_s(tool)

    def max_concurrent(self, tool: str | None = None, agent: str | None = None) -> int | None:
        return self._catalog.max_concurrent(tool, agent)

    def reconciler(self, tool: str) -> FunctionTool | None:
        return self._catalog.reconciler(tool)

    def approval(
        self, tool: str, tags: frozenset[str] = frozenset(), agent: str | None = None
    ) -> ApprovalTerms | None:
        return self._catalog.approval(tool, tags, agent)

    async def watch(self, watching: "asyncio.Future[None] | None" = None) -> None:
        """Reload on edits until ``close``. ``watching`` is resolved once no edit can be missed."""
        while not self._stop.is_set():
            folders = self._watched()
            turn = anyio.Event()
            changes = awatch(
                *folders,
                watch_filter=self._matters,
                debounce=_DEBOUNCE_MS,
                step=_STEP_MS,
                recursive=False,
                stop_event=turn,
            )
            pending = asyncio.ensure_future(_next_of(changes))
            stopped = asyncio.ensure_future(self._stop.wait())
            try:
                await asyncio.sleep(0)  # the watch is set now; look for edits that came before it
                if await asyncio.to_thread(self._is_stale):
                    await self._follow(await asyncio.to_thread(self._stale_files))
                if watching is not None and not watching.done():
                    watching.set_result(None)
                while folders == self._watched():
                    await asyncio.wait({pending, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    found = pending.result() if pending.done() else None
                    if found is None:
                        break
                    await self._follow({Path(path) for _, path in found})
                    pending = asyncio.ensure_future(_next_of(changes))
            except (
                OSError,
                RuntimeError,
            ) as error:  # watchfiles raises both, as for inotify limits
                log.warning("agents.not_watched", reason=str(error))
                return
            finally:
                turn.set()
                stopped.cancel()
                await asyncio.wait({pending, stopped}, timeout=2.0)
                if pending.done():
                    await changes.aclose()

    async def _follow(self, changed: set[Path]) -> None:
        try:
            await self.reload(changed)
        except Exception:
            log.exception("agents.reload_failed", files=sorted(map(str, changed)))

    def _publish(self, catalog: Catalog) -> None:
        known, self._catalog = self._catalog.errors, catalog
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        log.info(
            "agents.loaded",
            version=catalog.version,
            agents=list(catalog.agents),
            tools=list(catalog.tools),
            errors=len(catalog.errors),
        )
        for error in catalog.errors:
            if error in known:
                continue
            where = error.source if error.line is None else f"{error.source}:{error.line}"
            log.error(
                "agents.load_error",
                source=where,
                reason=error.message,
                serving_last_good=error.serving_last_good,
            )
        for callback in self._callbacks:
            callback(catalog)

    def _servers(self) -> list[MCPServer]:
        agents = self._catalog.agents.values()
        return [server for agent in agents for server in servers_of(agent)]

    # What follows runs in a thread.

    def _load(self, changed: set[Path] | None) -> Catalog:
        with _IMPORTING:
            FINDER.install()
            sources = find_sources(self._settings.agents, self._cwd)
            before = {group.key: group for group in self._sources.groups}
            self._sources = sources
            for group in sources.groups:
                known = before.pop(group.key, None)
                if changed is None or known != group or self._touches(changed, group):
                    self._load_group(group)
            for gone in before.values():
                take_modules(gone.prefixes)
                self._files.pop(gone.key, None)
            served = {unit.module for group in sources.groups for unit in group.units}
            self._units = {name: one for name, one in self._units.items() if name in served}
            policies, policy_errors = self._load_policies()
            files = {file for group in self._files.values() for file in group}
            self._prints = {file: _print_of(file) for file in files}
            linecache.checkcache()
        return self._catalog_of(sources, policies, policy_errors)

    def _load_group(self, group: Group) -> None:
        importlib.invalidate_caches()
        old = take_modules(group.prefixes)
        FINDER.drop_aliases()
        files = {unit.file for unit in group.units if unit.file is not None}
        failed = False
        for unit in group.units:
            result = import_unit(unit, self._cwd)
            if isinstance(result, Failure):
                failed = True
                good = self._units.get(unit.module)
                last_good = good is not None and bool(good.agents or good.tools)
                error = result.error.model_copy(update={"serving_last_good": last_good})
                self._units[unit.module] = replace(good or Loaded(unit), error=error)
                files.update(file for file in result.files if not in_library(file))
            else:
                self._units[unit.module] = collected(unit, result)
        FINDER.drop_aliases()
        files |= module_files(group.prefixes)
        if failed:
            # What an older version imports while it runs is still the module that it came with.
            for name, module in old.items():
                sys.modules.setdefault(name, module)
        self._files[group.key] = files

    def _touches(self, changed: set[Path], group: Group) -> bool:
        files = self._files.get(group.key, set())
        folders = set(group.folders)
        if any(one.error for one in self._units.values() if one.unit in group.units):
            folders |= {file.parent for file in files}  # the missing file may have come
        return any(path in files or path.parent in folders for path in changed)

    def _load_policies(self) -> tuple[Policies, list[LoadError]]:
        errors: list[LoadError] = []
        found: dict[Path, Policies] = {}
        for folder in self._sources.policy_folders:
            path = folder / FILE_NAME
            if not path.is_file():
                continue
            result = read_policy_file(path, self._cwd)
            if isinstance(result, Policies):
                found[path] = result
                continue
            last = self._policies.get(path)
            if last is not None:
                found[path] = last
            elif self._catalog.version == 0:
                raise _policy_error(result)
            kept = {"serving_last_good": last is not None}
            errors += [error.model_copy(update=kept) for error in result]
        self._policies = found
        policies, conflicts = merged(found.values())
        return policies, [*errors, *conflicts]

    def _catalog_of(
        self, sources: Sources, policies: Policies, policy_errors: list[LoadError]
    ) -> Catalog:
        units = [unit for group in sources.groups for unit in group.units]
        loaded = [self._units[unit.module] for unit in units if unit.module in self._units]
        errors = [*sources.errors, *(one.error for one in loaded if one.error is not None)]
        names = Names(errors)
        for one in sorted(loaded, key=lambda one: one.error is not None):
            names.take(one)
        catalog = Catalog(
            agents=MappingProxyType(names.agents),
            tools=MappingProxyType({**{t.name: t for t in SERVED_TOOLS}, **names.tools}),
            places=MappingProxyType({key: at.unit.place for key, at in names.agent_units.items()}),
            foreign=foreign_names(names.agents.values()),
            policies=policies,
            version=self._catalog.version + 1,
        )
        return replace(catalog, errors=(*errors, *policy_errors, *unknown_names(catalog)))

    def _watched(self) -> frozenset[Path]:
        folders = set(self._sources.watched)
        for files in self._files.values():
            folders |= {file.parent for file in files if not in_library(file)}
        return frozenset(folder for folder in folders if folder.is_dir())

    def _matters(self, change: Change, path: str) -> bool:
        file = Path(path)
        return file.suffix == ".py" or file.name in (FILE_NAME, *DEFAULTS) or file in self._prints

    def _stale_files(self) -> set[Path]:
        return {file for file, known in self._prints.items() if _print_of(file) != known}

    def _is_stale(self) -> bool:
        return bool(self._stale_files()) or self._sources != find_sources(
            self._settings.agents, self._cwd
        )


def _policy_error(errors: Iterable[LoadError]) -> AgentsFileError:
    found = list(errors)
    places = [e.source if e.line is None else f"{e.source}:{e.line}" for e in found]
    return AgentsFileError(
        " ".join(f"{at}: {error.message}" for at, error in zip(places, found, strict=True)),
        hint="Correct the file; nothing is served under a policy that cannot be read.",
        errors=[
            FieldError(path=error.source, message=error.message, line=error.line) for error in found
        ],
    )


def _print_of(file: Path) -> _Print:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


async def _next_of(changes: Any) -> set[tuple[Change, str]] | None:
    async for found in changes:
        return found  # type: ignore[no-any-return]
    return None
