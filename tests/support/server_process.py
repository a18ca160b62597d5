"""Real server processes that start in a moment, so that tests can kill them by the dozen.

One process (the nursery) imports the server once; each server is forked from it, listens on a
port of its own and can be killed like any other. Leans on fork, so on Unix. Refuses to share
anything between two servers but what they find on disk.
"""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """Starts servers: ``with Nursery() as nursery: server = nursery.start({...})``."""

    def __init__(self) -> None:
        self._started: list[int] = []
        self._talking = threading.Lock()
        self._numbers = count()

    def __enter__(self) -> "Nursery":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.server_process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    @contextmanager
    def brood(self) -> Iterator["Nursery"]:
        """Starts from the same process, but kills at the end what was started meanwhile."""
        brood = Nursery()
        brood._process, brood._talking = self._process, self._talking
        brood._numbers = self._numbers
        try:
            yield brood
        finally:
            for pid in brood._started:
                brood.kill(pid, signal.SIGKILL)
            assert all([brood.ended(pid, 10) for pid in brood._started])

    def start(
        self, env: dict[str, str], *, folder: Path, crash_at: str = "", port: int = 0
    ) -> "Server":
        """A server in ``folder`` with ``env``; it may not answer yet."""
        order = {"env": env, "folder": str(folder), "crash_at": crash_at, "port": port}
        answer = self._begin(order)
        return Server(self, answer["pid"], answer["port"], folder / "server.log")

    def run(self, *argv: str, env: dict[str, str], folder: Path, log: str = "cli.log") -> "Command":
        """``agent-server argv…`` in ``folder``, as a process of its own; its output in ``log``."""
        order = {"env": env, "folder": str(folder), "argv": argv, "log": log}
        return Command(self, self._begin(order)["pid"], folder / log)

    def kill(self, pid: int, sig: int) -> None:
        self._ask({"kill": pid, "signal": sig})

    def ended(self, pid: int, timeout_s: float) -> bool:
        """Whether the server has ended, waiting up to ``timeout_s`` for it."""
        return self.exit_code(pid, timeout_s) is not None

    def exit_code(self, pid: int, timeout_s: float) -> int | None:
        """What the process ended with, waiting up to ``timeout_s`` for it; None: it goes on."""
        code: int | None = self._ask({"wait": pid, "timeout_s": timeout_s})["code"]
        return code

    def _begin(self, order: dict[str, Any]) -> dict[str, Any]:
        answer = self._ask(order)
        self._started.append(answer["pid"])
        return answer

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``order``. Threads ask one after another; an answer that nobody waits for
        any more, since a test was cut off, is passed over."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with self._talking:
            number = next(self._numbers)
            stdin.write(json.dumps({**order, "number": number}) + "\n")
            stdin.flush()
            while True:
                line = stdout.readline()
                assert line, "the nursery has died"
                answer: dict[str, Any] = json.loads(line)
                if answer["number"] == number:
                    return answer


class Server:
    """One forked server process."""

    def __init__(self, nursery: Nursery, pid: int, port: int, log: Path) -> None:
        self._nursery = nursery
        self.pid = pid
        self.port = port
        self.log = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def kill(self) -> None:
        """SIGKILL, and return when the process is gone."""
        self._nursery.kill(self.pid, signal.SIGKILL)
        assert await self.ended(10)

    def stop(self) -> None:
        """SIGTERM."""
        self._nursery.kill(self.pid, signal.SIGTERM)

    def signal(self, sig: int) -> None:
        """Any other signal, such as SIGSTOP and SIGCONT."""
        self._nursery.kill(self.pid, sig)

    async def ended(self, timeout_s: float) -> bool:
        """Whether the server has ended, waiting up to ``timeout_s`` for it."""
        return await asyncio.to_thread(self._nursery.ended, self.pid, timeout_s)


class Command:
    """One forked command."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery = nursery
        self.pid = pid
        self._log = log

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def signal(self, sig: int) -> None:
        self._nursery.kill(self.pid, sig)

    def exit_code(self, timeout_s: float = 30) -> int:
        """Its exit code, once it has ended."""
        code = self._nursery.exit_code(self.pid, timeout_s)
        assert code is not None, f"it goes on:\n{self.output[-4000:]}"
        return code


def _nursery() -> None:
    # Imported before any fork, and before any thread or loop exists.
    from tests.support.server_serving import command, serve_on

    living: dict[int, int] = {}
    codes: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "kill" in order:
            if order["kill"] in living:
                os.kill(order["kill"], order["signal"])
            answer: dict[str, Any] = {}
        elif "wait" in order:
            answer = {"code": _wait(living, codes, order["wait"], order["timeout_s"])}
        elif "argv" in order:
            answer = {"pid": _fork(living, order, order["log"], partial(command, order["argv"]))}
        else:
            answer = _start(living, order, serve_on)
        sys.stdout.write(json.dumps({**answer, "number": order["number"]}) + "\n")
        sys.stdout.flush()
    for pid in list(living):
        os.kill(pid, signal.SIGKILL)
        _wait(living, codes, pid, 10)


def _start(living: dict[int, int], order: dict[str, Any], serve_on: Any) -> dict[str, Any]:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", order["port"]))
    listener.listen(1024)
    port = listener.getsockname()[1]
    pid = _fork(living, order, "server.log", partial(serve_on, listener, order["crash_at"]))
    listener.close()
    return {"pid": pid, "port": port}


def _fork(
    living: dict[int, int], order: dict[str, Any], log_name: str, work: Callable[[], int]
) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        log = os.open(
            Path(order["folder"]) / log_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["env"])
        os.chdir(order["folder"])
        status = 1
        try:
            status = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    living[pid] = os.pidfd_open(pid)
    return pid


def _wait(living: dict[int, int], codes: dict[int, int], pid: int, timeout_s: float) -> int | None:
    if pid not in living:
        return codes.get(pid, 0)
    ready, _, _ = select.select([living[pid]], [], [], timeout_s)
    if not ready:
        return None
    codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(living.pop(pid))
    return codes[pid]


if __name__ == "__main__":
    _nursery()
