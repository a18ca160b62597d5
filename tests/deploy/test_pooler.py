"""A pooler before PostgreSQL is refused in words that say what to write instead."""

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from agent_server.cli.doctor import check_database
from agent_server.domain.errors import ConfigurationError
from agent_server.settings import Settings
from agent_server.storage.database import database_at
from tests.support.until import until

from .test_every_front import free_port


@pytest.fixture(params=["", "ignore_startup_parameters = idle_in_transaction_session_timeout"])
def pooled_url(
    request: pytest.FixtureRequest, upgraded_postgres_url: str, tmp_path: Path
) -> Iterator[str]:
    """Through pgbouncer in transaction mode: as it comes, and told to pass over what it refuses."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    parts, port = urlsplit(upgraded_postgres_url), free_port()
    password = f" password={parts.password}" if parts.password else ""
    (tmp_path / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={parts.hostname} port={parts.port} user={parts.username}{password}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = any\npool_mode = transaction\n{request.param}\n"
    )
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # It refuses root.
        nobody = pwd.getpwnam("nobody")
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with (tmp_path / "pgbouncer.ini").open() as given:
        process = subprocess.Popen(
            [program, f"/proc/self/fd/{given.fileno()}"],
            pass_fds=[given.fileno()],
            stderr=(tmp_path / "pgbouncer.log").open("w"),
            **account,
        )
    yield f"postgresql://postgres@127.0.0.1:{port}{parts.path}"
    process.terminate()
    process.wait(10)


async def test_a_pooler_is_named_by_start_and_doctor(pooled_url: str) -> None:
    await until(lambda: listens(urlsplit(pooled_url).port))
    database = database_at(pooled_url)
    try:
        with pytest.raises(ConfigurationError, match="pooler") as refused:
            await database.open()
    finally:
        await database.close()
    assert "AGENT_SERVER_DATABASE_URL" in refused.value.hint
    found = await asyncio.to_thread(check_database, Settings(database_url=pooled_url))
    assert found.state == "failed" and "pooler" in found.detail


def listens(port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port or 0)) == 0
