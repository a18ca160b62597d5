"""The worker class for Gunicorn: ``gunicorn -k agent_server.cli.gunicorn.Worker``.

Leans on ``uvicorn_worker`` and on the server of ``serve``, which tells the application of SIGTERM
before it waits for readers. Refuses what would be unsafe: an application loaded before the fork.
"""

import sys
from typing import Any

from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]  # ships no types
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]  # ships no types

from agent_server.cli.serve import Server, server_options
from agent_server.execution.threads import leave_working
from agent_server.settings import load_settings


class Worker(UvicornWorker):  # type: ignore[misc]  # for the same reason
    """Serves ``agent_server.cli.serve:application()`` and drains it on SIGTERM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.CONFIG_KWARGS = {"loop": "auto", **server_options(load_settings())}
        super().__init__(*args, **kwargs)

    def init_process(self) -> None:
        if self.cfg.preload_app:
            self.log.error("Agent Server cannot be loaded before the fork: leave out --preload.")
            sys.exit(Arbiter.APP_LOAD_ERROR)
        super().init_process()

    def run(self) -> None:
        super().run()
        leave_working()

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = Server(self.config)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
