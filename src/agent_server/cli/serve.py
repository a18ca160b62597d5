"""``agent-server serve``: the server process, with uvicorn.

Leans on ``server.create_app`` for everything that is served. Refuses to start half: a port in
use, a database that cannot be opened or a missing key end it with one clear message.

The application takes part in an orderly end by ``app.state.drain``, a function without
arguments that is called on the loop as soon as SIGTERM or SIGINT arrives, while uvicorn still
waits for open connections.
"""

import asyncio
import errno
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, MutableMapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from uvicorn.supervisors import ChangeReload

from agent_server.auth.gate import require_safe
from agent_server.cli.connect import warn_of_unknown_variables
from agent_server.cli.connection import Connection
from agent_server.cli.loading import loading
from agent_server.domain.errors import AgentServerError, ConfigurationError
from agent_server.execution.threads import leave_working
from agent_server.observability import configure_logs
from agent_server.settings import PREFIX, Settings, load_settings

FACTORY = "agent_server.cli.serve:application"
SOURCES = Path(__file__).resolve().parent.parent


def serve(
    options: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    generate_key: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT.

    ``options`` win over the environment, which wins over ``defaults``. Both are handed to the
    application by the environment, so that a reloaded process reads the same. Raises
    ``ConfigurationError`` when it cannot start.
    """
    _export(options)
    settings = load_settings()
    _export({k: v for k, v in (defaults or {}).items() if k not in settings.model_fields_set})
    settings = load_settings()
    if settings.reload and settings.env == "production":
        raise ConfigurationError(
            "Reloading is for development: AGENT_SERVER_ENV is 'production'.",
            hint="Unset AGENT_SERVER_RELOAD, and leave out --reload.",
        )
    if not generate_key:
        # Before anything is loaded; the application asks once more.
        require_safe(settings)
    listener = bind(settings.host, settings.port)
    port = listener.getsockname()[1]
    if generate_key and not settings.has_key:
        _export({"api_key": f"as-{secrets.token_urlsafe(32)}"})
        settings = load_settings()
        assert settings.api_key is not None
        print_key(settings.api_key.get_secret_value(), port)
    configure_logs(settings)
    warn_of_unknown_variables()
    structlog.get_logger("agent_server").info(
        "Agent Server listens.",
        url=f"http://{_host_in_url(settings.host)}:{port}",
        env=settings.env,
        role=settings.role,
        model=settings.effective_model,
    )
    config = uvicorn.Config(
        FACTORY,
        factory=True,
        reload=settings.reload,
        reload_dirs=[str(SOURCES)] if settings.reload else None,
        log_config=None,
        **server_options(settings),
    )
    server = Server(config)
    if settings.reload:
        ChangeReload(config, target=server.run, sockets=[listener]).run()
        return
    try:
        server.run(sockets=[listener])
    except SystemExit:
        # uvicorn's way to say that the start failed; the reason is what a person needs.
        if server.failure is None:
            raise
    except OSError as error:
        # Another process began to listen there while the application was loading.
        if error.errno != errno.EADDRINUSE:
            raise
        raise _cannot_listen(settings.host, port, error) from error
    except KeyboardInterrupt:
        pass
    if server.failure is not None:
        raise server.failure


def server_options(settings: Settings) -> dict[str, Any]:
    """Uvicorn's options that are the same under every process manager."""
    return {
        "lifespan": "on",
        "http": partial(Connection, header_timeout_s=settings.header_timeout_s),
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": max(1, round(settings.shutdown_grace_s)),
    }


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port``; it listens once the application is ready.

    Raises ``ConfigurationError`` when something else listens there, or nothing may.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    listener.set_inheritable(True)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigurationError:
    where = f"port {port} of {host!r}"
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"Something listens already on {where}.",
            hint="Stop it, or choose another with --port or AGENT_SERVER_PORT.",
        )
    if error.errno == errno.EACCES:
        return ConfigurationError(
            f"This user may not listen on {where}.", hint="Choose a port from 1024 on."
        )
    return ConfigurationError(
        f"The server cannot listen on {where}: {error.strerror or error}.",
        hint="AGENT_SERVER_HOST must be an address of this machine, or 0.0.0.0 for all of them.",
    )


def print_key(key: str, port: int) -> None:
    """Tell the key that was made for this start, once, with a call that uses it."""
    sys.stdout.write(
        "No AGENT_SERVER_API_KEY is set, so this start has a key of its own:\n\n"
        f"    {key}\n\n"
        "Try it:\n\n"
        f'    curl -H "Authorization: Bearer {key}" http://localhost:{port}/api/v1/agents\n\n'
        "Set AGENT_SERVER_API_KEY to keep one key from start to start.\n"
    )
    sys.stdout.flush()


def application() -> "Application":
    """What uvicorn serves; called in the serving process, also after each reload."""
    settings = load_settings()
    configure_logs(settings)
    return Application(settings)


class Application:
    """The app and what its start failed with, which uvicorn would only print as a traceback."""

    def __init__(self, settings: Settings) -> None:
        # Here, so that a port in use is found out before the SDK is loaded.
        with loading():
            from agent_server.server import create_app  # noqa: PLC0415

            self.app = create_app(settings)
        self.drain_delay_s = settings.drain_delay_s
        self.failure: AgentServerError | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return

        async def without_traceback(message: MutableMapping[str, Any]) -> None:
            if not message["type"].endswith(".failed"):
                await send(message)

        try:
            await self.app(scope, receive, without_traceback)
        except AgentServerError as error:
            self.failure = error
            structlog.get_logger("agent_server").error(error.detail, hint=error.hint)
            await send({"type": "lifespan.startup.failed", "message": ""})
        except Exception as error:
            structlog.get_logger("agent_server").exception("The start or the end failed.")
            await send({"type": "lifespan.startup.failed", "message": str(error)})

    def drain(self) -> None:
        """Let the app know that the end has begun."""
        drain = getattr(self.app.state, "drain", None)
        if drain is not None:
            drain()


class Server(uvicorn.Server):
    """Uvicorn's server, which tells the application of a signal before it waits for readers.

    For ``drain_delay_s`` it goes on answering, not ready, so that a load balancer notices; a
    second signal cuts that short.
    """

    _loop: asyncio.AbstractEventLoop | None = None
    _told = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets)
        if self.failure is None:
            leave_working()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            self._loop = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        application, delay_s = self._application, 0.0
        if self._loop is not None and application is not None:
            self._loop.call_soon_threadsafe(application.drain)
            delay_s = application.drain_delay_s if self.started else 0.0
        if self._loop is None or delay_s == 0 or self._told:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._loop.call_later, delay_s, self._exit)
        self._told = True
        # uvicorn ends by raising what it caught once more; for an orderly end that is no failure.
        self._captured_signals = [s for s in self._captured_signals if s != signal.SIGTERM]

    def _exit(self) -> None:
        self.should_exit = True

    @property
    def failure(self) -> AgentServerError | None:
        """Why the application did not start, if it did not."""
        return self._application.failure if self._application else None

    @property
    def _application(self) -> Application | None:
        found = getattr(self.config, "loaded_app", None)
        while found is not None and not isinstance(found, Application):
            found = getattr(found, "app", None)
        return found


def _export(options: Mapping[str, Any]) -> None:
    """Hand ``options`` on by the environment; None is not given."""
    for name, value in options.items():
        if value is not None:
            os.environ[f"{PREFIX}{name.upper()}"] = (
                str(value).lower() if isinstance(value, bool) else str(value)
            )


def _host_in_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host
