"""A tiny MCP server over stdio, for tests: each tool appends a line to the file in ``CALLS``.

Leans on the MCP SDK. Refuses to know who calls it.
"""

import os

from mcp.server import MCPServer
from mcp.types import ToolAnnotations

server = MCPServer("probe", log_level="ERROR")


def _called(name: str) -> None:
    with open(os.environ["CALLS"], "a", encoding="utf-8") as calls:
        calls.write(f"{name}\n")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def look(what: str) -> str:
    """Look at something."""
    _called("look")
    return f"seen {what}"


@server.tool()
def press(button: str) -> str:
    """Press a button, which cannot be undone."""
    _called("press")
    return f"pressed {button}"


@server.tool()
def broken() -> str:
    """Always fails."""
    _called("broken")
    raise ValueError("out of order")


if __name__ == "__main__":
    server.run("stdio")
