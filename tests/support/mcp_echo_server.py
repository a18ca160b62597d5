"""A real MCP server over stdio: echoes, adds, counts its starts, and can be told to die.

Leans on the ``mcp`` package's own server. Run as a script; ``ECHO_STARTS`` names a file that gets
one line, its process id, per start.
"""

import os
from pathlib import Path

from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations

server = MCPServer("echo")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def echo(text: str) -> str:
    """Say the text again."""
    return f"echo: {text}"


@server.tool(annotations=ToolAnnotations(idempotent_hint=True))
def put(key: str, value: str) -> str:
    """Set a key."""
    return f"{key}={value}"


@server.tool()
def send(message: str) -> str:
    """Send a message, once."""
    return f"sent {message}"


@server.tool()
def die() -> str:
    """End this process at once."""
    os._exit(3)


if __name__ == "__main__":
    starts = os.environ.get("ECHO_STARTS")
    if starts:
        with Path(starts).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    server.run("stdio")
