"""The development server: ``python main.py``.

Serves on 0.0.0.0:8000 with reload, unless the environment or ``.env`` says otherwise. Leans on
the command line's ``serve``; production starts with ``agent-server serve``.
"""

import sys

from agent_server.cli.errors import report
from agent_server.cli.serve import serve
from agent_server.domain.errors import AgentServerError

if __name__ == "__main__":
    try:
        serve({}, defaults={"host": "0.0.0.0", "port": 8000, "reload": True})
    except AgentServerError as error:
        report(error)
        sys.exit(1)
