"""Tags of tools: the words by which a policy names many tools at once.

Leans on the SDK's tools and on what an MCP server says of its own. Refuses to know the policy.
"""

from collections.abc import Callable

from agents import FunctionTool, Tool

_TAGS = "__agent_server_tags__"


def tagged(*tags: str) -> Callable[[FunctionTool], FunctionTool]:
    """A decorator above ``@function_tool`` that gives the tool ``tags`` for ``agent-server.toml``."""

    def mark(tool: FunctionTool) -> FunctionTool:
        setattr(tool, _TAGS, frozenset(tags) | getattr(tool, _TAGS, frozenset()))
        return tool

    return mark


def tags_of(tool: Tool | None) -> frozenset[str]:
    """What ``tool`` was tagged with, and of an MCP tool what its server says of it."""
    marked: frozenset[str] = getattr(tool, _TAGS, frozenset())
    origin = getattr(tool, "_tool_origin", None)
    server = getattr(origin, "mcp_server_name", None)
    if server is None:
        return marked
    return marked | mcp_tags(getattr(tool, "_mcp_annotations", None), server)


def mcp_tags(annotations: object, server: str) -> frozenset[str]:
    """``mcp``, ``mcp:SERVER``, and by the hints ``read_only``, ``idempotent``, ``open_world`` and
    ``destructive``.

    As the MCP specification (2025-06-18, ToolAnnotations) has it, a tool that says nothing of itself
    may be destructive and reach the open world.
    """
    found = {"mcp", f"mcp:{server}"}
    read_only = hint(annotations, "read_only_hint", "readOnlyHint")
    if read_only:
        found.add("read_only")
    elif hint(annotations, "destructive_hint", "destructiveHint") is not False:
        found.add("destructive")
    if hint(annotations, "idempotent_hint", "idempotentHint"):
        found.add("idempotent")
    if hint(annotations, "open_world_hint", "openWorldHint") is not False:
        found.add("open_world")
    return frozenset(found)


def hint(annotations: object, *names: str) -> bool | None:
    """The first hint that is given: the MCP packages 1 and 2 spell them differently."""
    for name in names:
        value = getattr(annotations, name, None)
        if value is not None:
            return bool(value)
    return None
