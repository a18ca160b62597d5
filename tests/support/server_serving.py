"""What a forked process does: the real application on a socket it is given, or a command."""

import os
import socket
import sys
import time
import traceback

import time_machine
import uvicorn
from gunicorn.app.wsgiapp import run as run_gunicorn

from agent_server.cli import main
from agent_server.cli.serve import server_options
from agent_server.execution import crash
from agent_server.observability import configure_logs
from agent_server.server import create_app
from agent_server.settings import load_settings


def serve_on(listener: socket.socket, crash_at: str) -> int:
    """Serve until told to stop, or until the crash point is reached."""
    crash.arm(crash_at)
    if shift_s := os.environ.get("TEST_CLOCK_SHIFT_S"):
        time_machine.travel(time.time() + float(shift_s), tick=True).start()
    settings = load_settings(env_file=None)
    configure_logs(settings)
    http = server_options(settings)["http"]
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, http=http))
    server.run(sockets=[listener])
    return 0 if server.started else 1


def command(argv: list[str]) -> int:
    """The command line, as far as its exit code; ``gunicorn …`` is Gunicorn's own."""
    try:
        if argv[0] == "gunicorn":
            sys.argv = argv
            run_gunicorn()
        else:
            main(argv)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
