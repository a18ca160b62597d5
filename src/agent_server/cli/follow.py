"""Follows a run on the terminal until it ends or the person leaves.

Leans on the client for the events, on the tree or the plain lines to show them, and on asking for
what the run asks meanwhile. Refuses to touch the run otherwise: leaving, by Ctrl-C, only stops the
looking.
"""

import json
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import anyio
from rich.console import Console
from rich.live import Live

from agent_server.cli.asking import Asking
from agent_server.cli.errors import print_error, printable
from agent_server.cli.plain import lines_of
from agent_server.cli.questions import Decision, Question
from agent_server.cli.tree import footer, render
from agent_server.cli.view import RunView
from agent_server.client import AgentServerClient
from agent_server.domain.base import json_text, utcnow
from agent_server.domain.events import EventBase
from agent_server.domain.runs import Run, RunStatus

T = TypeVar("T")
FRAME_S = 0.1


class Display(Protocol):
    """Where the events of a run are shown: ``LiveTree``, ``PlainLines`` or ``Silence``."""

    async def show(self, view: RunView, event: EventBase) -> None:
        """``event`` has just become part of ``view``."""

    async def keep_moving(self, view: RunView) -> None:
        """Redraw while nothing happens, until cancelled."""

    def silence(self) -> AbstractContextManager[None]:
        """Draw nothing while a question stands on the terminal."""

    def close(self, view: RunView) -> None:
        """Leave the last picture standing."""


class Silence:
    """Shows nothing."""

    async def show(self, view: RunView, event: EventBase) -> None:
        return None

    async def keep_moving(self, view: RunView) -> None:
        await anyio.sleep_forever()

    def silence(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self, view: RunView) -> None:
        return None


class PlainLines:
    """One line for each event worth telling."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def show(self, view: RunView, event: EventBase) -> None:
        for line in lines_of(event):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    async def keep_moving(self, view: RunView) -> None:
        await anyio.sleep_forever()

    def silence(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self, view: RunView) -> None:
        self._console.print(footer(view, utcnow()), soft_wrap=True)


class LiveTree:
    """The tree of tasks and steps, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._live.start()
        self._drawn = 0.0
        self._silent = False
        self._view: RunView | None = None

    async def show(self, view: RunView, event: EventBase) -> None:
        self._view = view
        if anyio.current_time() - self._drawn >= FRAME_S:
            self._draw(view)

    async def keep_moving(self, view: RunView) -> None:
        while True:
            await anyio.sleep(FRAME_S)
            self._draw(view)

    @contextmanager
    def silence(self) -> Iterator[None]:
        self._silent = True
        self._live.stop()
        if self._view is not None:  # what led to the question, above it
            width = self._console.size.width
            self._console.print(render(self._view, width=width, height=self._console.height // 2))
        try:
            yield
        finally:
            self._live.start()
            self._silent = False

    def _draw(self, view: RunView) -> None:
        if self._silent:
            return
        self._drawn = anyio.current_time()
        size = self._console.size
        picture = render(view, now=utcnow(), width=size.width, height=size.height - 1)
        self._live.update(picture, refresh=True)

    def close(self, view: RunView) -> None:
        self._live.stop()
        self._console.print(render(view, now=utcnow(), width=self._console.size.width))


def display_for(console: Console, *, silent: bool) -> Display:
    """What suits the terminal, or the lack of one."""
    if silent:
        return Silence()
    return LiveTree(console) if console.is_terminal else PlainLines(console)


@dataclass(frozen=True)
class Followed:
    """A run that is not followed any more: it has ended, or ``asks`` what nobody here answers."""

    run: Run
    asks: list[Question]


async def follow(
    client: AgentServerClient,
    run_id: str,
    display: Display,
    *,
    decision: Decision | None = None,
    person: Console | None = None,
    alone: bool = False,
) -> Followed | None:
    """Show the run until it ends or stands still for what is not answered here; None when Ctrl-C
    came first. ``decision``, ``person`` and ``alone`` are those of ``Asking``."""
    view = RunView(id=run_id)
    asking = Asking(
        client, run_id, decision=decision, person=person, alone=alone, silence=display.silence
    )
    asks: list[Question] = []

    async def answer() -> None:
        asks.extend(await asking.work())
        tasks.cancel_scope.cancel()

    async def work() -> Followed:
        try:
            async with tasks:
                tasks.start_soon(display.keep_moving, view)
                tasks.start_soon(answer)
                async for event in client.runs.events(run_id):
                    view.apply(event)
                    await display.show(view, event)
                    asking.hear(event)
                tasks.cancel_scope.cancel()
        finally:
            display.close(view)
        return Followed(await client.runs.get(run_id), asks)

    tasks = anyio.create_task_group()
    return await until_interrupted(work)


async def until_interrupted(work: Callable[[], Awaitable[T]]) -> T | None:
    """What ``work`` gives; None when Ctrl-C (or SIGTERM) came first, and it was cancelled."""
    answer: list[T] = []

    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    tasks.cancel_scope.cancel()

        tasks.start_soon(listen)
        answer.append(await work())
        tasks.cancel_scope.cancel()
    return answer[0] if answer else None


def print_answer(run: Run, *, plain: bool) -> None:
    """The run's output on stdout; why it has none on stderr."""
    if run.status is RunStatus.SUCCEEDED or run.output is not None:
        if not plain:
            sys.stdout.write("\nAnswer:\n")
        text = run.output if isinstance(run.output, str) else short_json(run.output)
        sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + "\n")
        sys.stdout.flush()
    if run.error is not None:
        print_error(run.error)
    elif run.status is RunStatus.CANCELLED:
        sys.stderr.write("The run was cancelled.\n")


def short_json(value: Any) -> str:
    """A JSON value for reading, on as many lines as it needs."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def print_run_json(run: Run) -> None:
    """The run as the API answers it, and nothing else, on stdout."""
    sys.stdout.write(json_text(run, indent=2) + "\n")
    sys.stdout.flush()
