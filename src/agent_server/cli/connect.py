"""The server that a command speaks to: one on the network, or one inside this process.

Leans on the client; the embedded server is imported only when it is needed. Refuses to choose
silently: an address that was given is used, whether or not a server answers there.
"""

import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from agent_server.cli.loading import loading
from agent_server.client import AgentServerClient, in_process
from agent_server.settings import Settings, load_settings, unknown_variables

EMBEDDED_URL = "http://localhost"


@dataclass(frozen=True)
class Target:
    """Where to go. ``url`` None is a server inside this process."""

    url: str | None
    api_key: str | None = None

    @property
    def flags(self) -> str:
        """What a person adds to a command to reach the same server; empty when embedded."""
        return (
            f" --server {self.url}" if self.url and not os.environ.get("AGENT_SERVER_URL") else ""
        )


def target(server: str | None, api_key: str | None = None) -> Target:
    """``--server``, else AGENT_SERVER_URL, else embedded; the key from the settings."""
    url = server or os.environ.get("AGENT_SERVER_URL") or None
    if url and "://" not in url:
        url = f"http://{url}"
    if url and api_key is None:
        configured = load_settings().api_key
        api_key = configured.get_secret_value() if configured else None
    return Target(url, api_key)


@asynccontextmanager
async def connect(
    where: Target, overrides: Mapping[str, Any] | None = None
) -> AsyncIterator[AgentServerClient]:
    """A client of the server at ``where``. An embedded one is started, and stopped at the end."""
    if where.url:
        async with AgentServerClient(where.url, api_key=where.api_key) as client:
            yield client
        return
    settings = embedded_settings(overrides)
    with loading():
        # Half a second that commands to a server on the network do not pay.
        from agent_server.observability import configure_logs  # noqa: PLC0415
        from agent_server.server import create_app  # noqa: PLC0415

    configure_logs(settings, CurrentStderr())  # type: ignore[arg-type]  # writes as a stream does
    key = settings.api_key.get_secret_value() if settings.api_key else None
    async with in_process(create_app(settings)) as transport:
        async with AgentServerClient(EMBEDDED_URL, api_key=key, transport=transport) as client:
            yield client


def embedded_settings(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a server inside this process: quiet, and with a key that only we know."""
    settings = load_settings(dict(overrides or {}))
    changes: dict[str, Any] = {"reload": False}
    if settings.api_key is None:
        changes["api_key"] = SecretStr(secrets.token_urlsafe(32))
    if "log_level" not in settings.model_fields_set:
        changes["log_level"] = "ERROR"
    return settings.model_copy(update=changes)


def warn_of_unknown_variables() -> None:
    """Say on stderr which AGENT_SERVER_ variables nobody reads, and what was perhaps meant."""
    for name, nearest in unknown_variables(os.environ).items():
        meant = f" Did you mean {nearest}?" if nearest else ""
        sys.stderr.write(f"Warning: {name} is set, but no setting has this name.{meant}\n")


class CurrentStderr:
    """Writes to whatever stderr is at the moment: the live tree puts its own there."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()
