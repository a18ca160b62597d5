"""Connections to the MCP servers that agents name, made at first use and kept.

A user's file says ``mcp_servers=[MCPServerStdio(...)]`` and connects nothing. Each server gets a
task of its own here that connects it, holds it and cleans it up, since what the MCP client
enters in one task it must leave in the same. A server that died is connected again at the next
use. Leans on the SDK's public ``MCPServer``; refuses to know runs and files.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from agents import Agent, FunctionTool, Handoff
from agents.mcp import MCPServer

from agent_server.domain.agents import ToolEffect, ToolInfo
from agent_server.domain.errors import ToolError
from agent_server.inference.tags import mcp_tags

log = structlog.get_logger("agent_server.registry")


def reachable_agents(agent: Agent[Any]) -> list[Agent[Any]]:
    """``agent`` and every agent it can hand over to or call as a tool, as far as can be seen."""
    found: list[Agent[Any]] = []
    todo: list[object] = [agent]
    while todo:
        one = todo.pop()
        if not isinstance(one, Agent) or any(one is other for other in found):
            continue
        found.append(one)
        for handoff in one.handoffs:
            # The SDK keeps the target of handoff() in a weak reference without a public name.
            reference = getattr(handoff, "_agent_ref", None)
            todo.append(handoff if not isinstance(handoff, Handoff) else reference and reference())
        for tool in one.tools:
            if isinstance(tool, FunctionTool):
                todo.append(getattr(tool, "_agent_instance", None))
    return found


def servers_of(agent: Agent[Any]) -> list[MCPServer]:
    """The MCP servers that a run of ``agent`` may use, each once."""
    found: dict[int, MCPServer] = {}
    for one in reachable_agents(agent):
        for server in one.mcp_servers:
            found.setdefault(id(server), server)
    return list(found.values())


class McpConnections:
    """All connections of this process. ``timeout_s`` bounds a connect, a probe and a clean-up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._links: dict[int, _Link] = {}
        self._closed = False

    async def ready(self, servers: Iterable[MCPServer]) -> None:
        """Return when every server is connected. Raises ``ToolError`` that names the one that
        is not, its command or address, and the reason."""
        if self._closed:
            raise ToolError("The server is shutting down and connects no MCP server any more.")
        links = [self._link(server) for server in servers]
        waiting = [link for link in links if not link.connected]
        results = await asyncio.gather(*(link.ensure() for link in waiting), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    @asynccontextmanager
    async def held(self, servers: list[MCPServer]) -> AsyncIterator[None]:
        """``ready``, and no reload closes them before the block ends."""
        links = [self._link(server) for server in servers]
        for link in links:
            link.holders += 1
        try:
            await self.ready(servers)
            yield
        finally:
            for link in links:
                link.holders -= 1
            await self._close([link for link in links if link.retired and not link.holders])

    async def retire(self, keep: Iterable[MCPServer]) -> None:
        """Close what no served agent names any more; a held one is closed when it is let go."""
        kept = {id(server) for server in keep}
        for key, link in self._links.items():
            link.retired = key not in kept
        await self._close([x for x in self._links.values() if x.retired and not x.holders])

    async def close(self) -> None:
        """Close every connection, in use or not. Bounded; never raises for a server's sake."""
        self._closed = True
        await self._close(list(self._links.values()))

    def tools(self) -> dict[str, ToolInfo]:
        """The tools of the servers that are connected now, by name."""
        found: dict[str, ToolInfo] = {}
        for link in self._links.values():
            if link.connected and not link.retired:
                for info in link.tools:
                    found.setdefault(info.name, info)
        return found

    def _link(self, server: MCPServer) -> "_Link":
        link = self._links.get(id(server))
        if link is None:
            link = self._links[id(server)] = _Link(server, self._timeout_s)
        return link

    async def _close(self, links: list["_Link"]) -> None:
        for link in links:
            self._links.pop(id(link.server), None)
        await asyncio.gather(*(link.stop() for link in links))


class _Link:
    """One server and the task that holds its connection."""

    def __init__(self, server: MCPServer, timeout_s: float) -> None:
        self.server = server
        self.tools: tuple[ToolInfo, ...] = ()
        self.holders = 0
        self.retired = False
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._leave = asyncio.Event()
        self._theirs = False

    @property
    def connected(self) -> bool:
        """Known to be usable without asking the server. Only a local process tells its death."""
        if self._theirs:
            return True
        return self._is_up() and _closed_flag(self.server) is False

    async def ensure(self) -> None:
        async with self._lock:
            if self._task is None and getattr(self.server, "session", None) is not None:
                self._theirs = True  # the user's own code connected it, and will clean it up
                return
            if self._is_up() and await self._answers():
                return
            if self._task is not None:
                log.warning("mcp_server.reconnecting", server=self.server.name)
                await self.stop()
            await self._start()

    async def stop(self) -> None:
        task, self._task, self._ready = self._task, None, None
        if task is None:
            return
        self._leave.set()
        _, late = await asyncio.wait({task}, timeout=min(self._timeout_s, 5.0))
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=1.0)

    def _is_up(self) -> bool:
        ready = self._ready
        if self._task is None or self._task.done():
            return False
        if ready is None or not ready.done() or ready.cancelled():
            return False
        return ready.exception() is None

    async def _start(self) -> None:
        if getattr(self.server, "client_session_timeout_seconds", 0) is None:
            # The user left it without a bound; nothing here waits for ever.
            self.server.client_session_timeout_seconds = self._timeout_s  # type: ignore[attr-defined]
        self._leave = asyncio.Event()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ready = ready
        task = asyncio.create_task(self._hold(ready, self._leave), name=f"mcp {self.server.name}")
        self._task = task
        try:
            done, _ = await asyncio.wait({ready}, timeout=self._timeout_s)
            if not done:
                raise self._error(f"no answer within {self._timeout_s:g} s")
            if ready.cancelled():
                raise self._error("the connection was cancelled")
            reason = ready.exception()
            if reason is not None:
                raise self._error(_reason(reason)) from reason
        except BaseException:
            task.cancel()
            await asyncio.wait({task}, timeout=5.0)
            self._task = self._ready = None
            raise

    async def _hold(self, ready: "asyncio.Future[None]", leave: asyncio.Event) -> None:
        try:
            await self.server.connect()  # type: ignore[no-untyped-call]
            self.tools = await _described_tools(self.server)
            if not ready.done():
                ready.set_result(None)
            log.info("mcp_server.connected", server=self.server.name, tools=len(self.tools))
            await leave.wait()
        except asyncio.CancelledError:
            ready.cancel()
            raise
        except Exception as error:
            if ready.done():
                log.warning("mcp_server.lost", server=self.server.name, reason=_reason(error))
            else:
                ready.set_exception(error)
        finally:
            try:
                await self.server.cleanup()  # type: ignore[no-untyped-call]
            except Exception as error:
                log.warning("mcp_server.cleanup", server=self.server.name, reason=_reason(error))

    async def _answers(self) -> bool:
        """Whether the connection still carries. A busy server that is slow counts as alive."""
        closed = _closed_flag(self.server)
        if closed is not None:
            return not closed
        session = getattr(self.server, "session", None)
        if session is None:
            return not hasattr(self.server, "session")
        try:
            await asyncio.wait_for(session.list_tools(), self._timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return True
        except Exception as error:
            return "timed out" in str(error).lower()
        return True

    def _error(self, reason: str) -> ToolError:
        params = getattr(self.server, "params", None)
        params = params if isinstance(params, dict) else getattr(params, "__dict__", {})
        command, url = params.get("command"), params.get("url")
        if command:
            hint = f"Start {command!r} by hand with the same arguments and read what it prints."
            how = f" (command {command!r})"
        elif url:
            address = str(url).partition("?")[0]
            hint = (
                f"Check that something answers at {address!r} and that the credentials are right."
            )
            how = f" (address {address!r})"
        else:
            hint, how = "Check the server that the agents file names.", ""
        return ToolError(
            f"The MCP server {self.server.name!r}{how} cannot be connected: {reason}.", hint=hint
        )


def _closed_flag(server: MCPServer) -> bool | None:
    """Whether a local process's connection is closed; None where only the server can tell.

    A process that died is known from the end of its output. Asking it instead would take a slow
    one for a dead one, and end a call of another run.
    """
    params = getattr(server, "params", None)
    if params is None or not hasattr(params, "command"):
        return None
    session = getattr(server, "session", None)
    if session is None:
        return True
    closed = getattr(getattr(session, "_dispatcher", None), "_closed", None)
    return closed if isinstance(closed, bool) else None


async def _described_tools(server: MCPServer) -> tuple[ToolInfo, ...]:
    if callable(getattr(server, "tool_filter", None)):
        return ()  # what such a filter lets through depends on the run
    return tuple(
        ToolInfo(
            name=tool.name,
            description=tool.description or "",
            parameters=_either(tool, "input_schema", "inputSchema") or {},
            effect=effect_of_annotations(tool.annotations) or ToolEffect.ONCE,
            source="mcp",
            tags=tuple(sorted(mcp_tags(tool.annotations, server.name))),
        )
        for tool in await server.list_tools()
    )


def effect_of_annotations(annotations: object) -> ToolEffect | None:
    """What an MCP tool says of itself; None when it says nothing that lets it be repeated."""
    if annotations is None:
        return None
    if _either(annotations, "read_only_hint", "readOnlyHint"):
        return ToolEffect.NONE
    if _either(annotations, "idempotent_hint", "idempotentHint"):
        return ToolEffect.IDEMPOTENT
    return None


def _either(value: object, *names: str) -> Any:
    """The first attribute that exists: the MCP packages 1 and 2 spell them differently."""
    return next((getattr(value, name) for name in names if hasattr(value, name)), None)


def _reason(error: BaseException) -> str:
    while isinstance(getattr(error, "exceptions", None), tuple):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    text = str(error).strip().rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
