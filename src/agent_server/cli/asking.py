"""What a followed run asks for, answered here: by a flag, by the person at the terminal, or not.

Leans on the questions and on the server for which of them are open. Refuses to wait for ever: when
the run stands still for what nobody here answers, its work is over.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import anyio
from rich.console import Console

from agent_server.cli.errors import print_error
from agent_server.cli.questions import Decision, Question, questions_of
from agent_server.client import AgentServerClient
from agent_server.domain import events as e
from agent_server.domain.errors import AgentServerError, Unavailable
from agent_server.domain.runs import RunStatus

LOOK_AGAIN_S = 1.0
"""A run that stands still is looked at so often, in case somebody else answered."""


class Asking:
    """One run's questions. ``hear`` takes its events, ``work`` answers meanwhile."""

    def __init__(
        self,
        client: AgentServerClient,
        run_id: str,
        *,
        decision: Decision | None,
        person: Console | None,
        alone: bool,
        silence: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """``person`` is where somebody can be asked; ``alone``: no signal reaches the run from
        elsewhere. ``silence`` keeps the display still while a question stands there."""
        self._client, self._run_id = client, run_id
        self._decision, self._person, self._alone = decision, person, alone
        self._silence = silence
        self._stood_still = False
        self._news = anyio.Event()
        self._left: set[str] = set()
        """Keys of what was left for later, or refused."""

    def hear(self, event: e.EventBase) -> None:
        if isinstance(event, e.ApprovalRequested | e.StepInDoubt | e.RunWaiting):
            self._stood_still = True
        if self._stood_still and event.seq is not None:
            self._news.set()

    async def work(self) -> list[Question]:
        """Answer until the run stands still for what is not answered here: what that is."""
        while True:
            with anyio.move_on_after(LOOK_AGAIN_S if self._stood_still else None):
                await self._news.wait()
            self._news = anyio.Event()
            try:
                left = await self._round()
            except Unavailable:  # The server restarts; whoever reads the events knows how long.
                continue
            if left is not None:
                return left

    async def _round(self) -> list[Question] | None:
        """Answer what is asked now; what is left, once the run stands still for that alone."""
        run = await self._client.runs.get(self._run_id)
        asked = await questions_of(self._client, run)
        for question in asked:
            if question.key not in self._left and not await self._answer(question):
                self._left.add(question.key)
        left = [question for question in asked if question.key in self._left]
        if run.status is not RunStatus.WAITING or len(left) < len(asked):
            return None
        waits = run.waiting_for
        unheard = self._alone and waits is not None and waits.kind == "signal"
        if not left and not (unheard and waits is not None and waits.until is None):
            return None
        return None if await self._busy() else left

    async def _busy(self) -> bool:
        """Whether other tasks of the run go on meanwhile."""
        tasks = await self._client.runs.tasks(self._run_id)
        return any(task.status in ("running", "queued") for task in tasks)

    async def _answer(self, question: Question) -> bool:
        try:
            if self._decision is not None and await question.decide(self._decision):
                return True
            return self._person is not None and await self._asked(question, self._person)
        except AgentServerError as error:
            # Somebody else was quicker: no word of it is needed where a flag decided.
            if await _open(question):
                print_error(error.info())
                return False
            if self._person is not None:
                self._person.print("Somebody else decided meanwhile.", style="dim")
            return True

    async def _asked(self, question: Question, person: Console) -> bool:
        """Ask ``person``, for as long as nobody else has answered."""
        answered = True
        failure: AgentServerError | None = None
        with self._silence():
            person.print(question.shown())
            async with anyio.create_task_group() as tasks:

                async def withdraw() -> None:
                    while await _open(question):
                        with anyio.move_on_after(LOOK_AGAIN_S):
                            await self._news.wait()
                        self._news = anyio.Event()
                    if question.answering:
                        return
                    person.print("\nThis was decided meanwhile.", style="dim")
                    tasks.cancel_scope.cancel()

                tasks.start_soon(withdraw)
                try:
                    answered = await question.ask(person)
                except AgentServerError as error:  # raised below: a group would wrap it
                    failure = error
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return answered


async def _open(question: Question) -> bool:
    """Whether it still waits for an answer, as far as can be told."""
    try:
        return await question.open()
    except Unavailable:
        return True
