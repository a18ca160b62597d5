"""A real MCP server over stdio that moves money: a line in the file ``COUNT_FILE`` for each call.

Leans on the MCP SDK. ``BANK`` set to ``v2`` is the bank after a deploy: ``transfer`` wants an account,
and ``deposit`` is gone. Refuses to know who calls it.
"""

import os

from mcp.server import MCPServer
from mcp.types import ToolAnnotations

server = MCPServer("bank", log_level="ERROR")


def _count(call: str) -> str:
    with open(os.environ["COUNT_FILE"], "a", encoding="utf-8") as file:
        file.write(f"{call}\n")
    return call


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def balance() -> str:
    """What there is."""
    return _count("balance")


if os.environ.get("BANK") == "v2":

    @server.tool()
    def transfer(eur: int, account: str) -> str:
        """Send money, for good."""
        return _count(f"transfer {eur} {account}")

else:

    @server.tool()
    def transfer(eur: int) -> str:
        """Send money, for good."""
        return _count(f"transfer {eur}")

    @server.tool()
    def deposit(eur: int) -> str:
        """Take money in."""
        return _count(f"deposit {eur}")


if __name__ == "__main__":
    server.run("stdio")
