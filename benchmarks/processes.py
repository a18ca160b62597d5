"""The processes of a benchmark: servers, mock model and client, and what they used.

Leans on ``/proc`` (Linux) for CPU and memory of a whole process tree. Refuses to know what is
measured.
"""

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.loader import Job, Report
from tests.support.postgres import PostgresServer, die_with_parent

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
START_S = 120.0
FILES = 20_000


def tree(pid: int) -> list[int]:
    """``pid`` and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += children.get(one, ())
    return found


def cpu_s(pid: int) -> float:
    """User and system seconds of the tree, with children that have ended and were waited for."""
    total = 0
    for one in tree(pid):
        fields = _stat(one)
        total += sum(int(field) for field in fields[11:15]) if fields else 0
    return total / TICKS


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of the tree: now (``VmRSS``) or at its peak (``VmHWM``), in MB."""
    total = 0
    for one in tree(pid):
        try:
            text = Path(f"/proc/{one}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(field + ":"):
                total += int(line.split()[1])
    return total / 1024


def forget_peak(pid: int) -> None:
    """Let the peak begin anew at the present memory."""
    for one in tree(pid):
        Path(f"/proc/{one}/clear_refs").write_text("5", encoding="ascii")


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` behind the command's name; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


class Server:
    """A server on loopback, with its CPU at the moment it was first ready."""

    def __init__(
        self, name: str, process: "subprocess.Popen[bytes]", port: int, database: int | None = None
    ) -> None:
        self.name = name
        self.pid = process.pid
        self.port = port
        self.database = database
        """The first process of the PostgreSQL it uses."""
        self.ready_cpu_s = 0.0
        self.ready_wall_s = 0.0
        self._process = process

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def database_cpu_s(self) -> float:
        return cpu_s(self.database) if self.database is not None else 0.0

    def wait_ready(self, started: float) -> None:
        """Return at the first 200 of ``/readyz``. Raises ``RuntimeError`` if there is none."""
        url = f"http://127.0.0.1:{self.port}/readyz"
        while time.perf_counter() - started < START_S:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(url, timeout=5):
                    self.ready_cpu_s = self.cpu_s()
                    self.ready_wall_s = time.perf_counter() - started
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.01)
        raise RuntimeError(f"{self.name} did not become ready (exit {self._process.poll()})")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Field:
    """Where a benchmark takes place: a mock model, a client, a database, and any servers."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._postgres: PostgresServer | None = None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))

    def __enter__(self) -> "Field":
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        mock = self._python("-m", "benchmarks.mock_model", stdout=subprocess.PIPE)
        assert mock.stdout is not None
        self._model_url = f"http://127.0.0.1:{int(mock.stdout.readline())}/v1"
        self._client = self._python(
            "-m", "benchmarks.loader", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def send(self, server: Server, job: Job) -> Report:
        """Let the client carry out ``job``."""
        assert self._client.stdin is not None and self._client.stdout is not None
        job.port = server.port
        self._client.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._client.stdin.flush()
        return Report(**json.loads(self._client.stdout.readline()))

    @contextmanager
    def bare(self) -> Iterator[Server]:
        """The bare app."""
        port, folder = _free_port(), self._folder()
        options = ["--port", str(port), "--sessions", str(folder / "sessions.db")]
        with self._server("bare", port, ["-m", "benchmarks.bare_app", *options], {}) as server:
            yield server

    def database(self) -> str:
        """The URL of a new, empty database on the one PostgreSQL of this field."""
        if self._postgres is None:
            self._postgres = self._stack.enter_context(PostgresServer())
        return self._postgres.fresh_database()

    @contextmanager
    def ours(
        self, kind: str, *, database_url: str | None = None, **settings: object
    ) -> Iterator[Server]:
        """Agent Server on ``sqlite`` or ``postgres``; ``settings`` as ``AGENT_SERVER_<NAME>``.

        ``database_url`` is one of ``database()`` that several servers share.
        """
        port, folder = _free_port(), self._folder()
        database: int | None = None
        environment = {
            "AGENT_SERVER_DATA_DIR": str(folder / "data"),
            "AGENT_SERVER_AGENTS": str(ROOT / "benchmarks" / "served.py"),
            "AGENT_SERVER_ACCESS_LOG": "false",
            "AGENT_SERVER_LOG_LEVEL": "WARNING",
            "AGENT_SERVER_LOG_FORMAT": "json",
        }
        if kind == "postgres":
            environment["AGENT_SERVER_DATABASE_URL"] = database_url or self.database()
            assert self._postgres is not None
            database = self._postgres.pid
        for name, value in settings.items():
            environment[f"AGENT_SERVER_{name.upper()}"] = str(value)
        command = ["-m", "agent_server", "serve", "--port", str(port)]
        with self._server(kind, port, command, environment, database) as server:
            yield server

    @contextmanager
    def _server(
        self,
        name: str,
        port: int,
        command: list[str],
        environment: Mapping[str, str],
        database: int | None = None,
    ) -> Iterator[Server]:
        started = time.perf_counter()
        provider = {"OPENAI_BASE_URL": self._model_url, "OPENAI_API_KEY": "sk-bench"}
        process = self._python(*command, environment={**provider, **environment})
        server = Server(name, process, port, database)
        try:
            server.wait_ready(started)
            yield server
        finally:
            server.stop()

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _python(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.DEVNULL,
    ) -> "subprocess.Popen[bytes]":
        """A process that ends with this benchmark; it sees nothing of our own configuration."""
        kept = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH")
        inherited = {name: os.environ[name] for name in kept if name in os.environ}
        paths = [str(ROOT), inherited.get("PYTHONPATH", "")]
        inherited["PYTHONPATH"] = os.pathsep.join(path for path in reversed(paths) if path)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**inherited, **(environment or {})},
            stdin=stdin,
            stdout=stdout,
            preexec_fn=die_with_parent,
        )
        self._stack.callback(_end, process)
        return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
