"""What a run asks a person: consent to a call, how a call in doubt went, a look at its plan.

Leans on the client for what is asked and what is answered. Refuses to hide anything: arguments are
shown whole, with every character that does not print as its escape.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agent_server.cli.errors import print_error, printable
from agent_server.cli.terminal import ask_line, ask_one_of, edit_text
from agent_server.cli.tree import seconds
from agent_server.client import AgentServerClient
from agent_server.domain.approvals import Approval
from agent_server.domain.base import utcnow
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.runs import Run, Step

Decision = Literal["approve", "reject"]
WIDEST = 100
AT_EXPIRY = {
    "reject": "then it is rejected",
    "fail": "then the run fails",
    "approve": "then it is approved",
}


class Question(ABC):
    """One thing that a run stands still for. ``key`` tells it from the others of the run."""

    def __init__(self, client: AgentServerClient, key: str) -> None:
        self.client = client
        self.key = key
        self.answering = False
        """The person's answer is on its way: the question is not to be withdrawn any more."""

    @abstractmethod
    def shown(self) -> RenderableType:
        """The whole question, for reading."""

    @abstractmethod
    def commands(self) -> list[str]:
        """What answers it from another terminal, after ``agent-server``."""

    @abstractmethod
    async def ask(self, console: Console) -> bool:
        """Ask the person and pass the answer on; False when they leave it for later."""

    async def open(self) -> bool:
        """Whether it still waits for an answer."""
        return True

    async def decide(self, decision: Decision) -> bool:
        """Give the answer that a flag gave beforehand; False where it is no answer to this."""
        return False


class ApprovalQuestion(Question):
    """Consent to a call, or to going on at a workflow's node."""

    def __init__(self, client: AgentServerClient, approval: Approval) -> None:
        super().__init__(client, approval.id)
        self._approval = approval

    def shown(self) -> RenderableType:
        return approval_panel(self._approval)

    def commands(self) -> list[str]:
        return [f"approvals approve {self.key}", f"approvals reject {self.key} --reason …"]

    async def open(self) -> bool:
        return (await self.client.approvals.get(self.key)).status == "pending"

    async def decide(self, decision: Decision) -> bool:
        await self._say(decision)
        return True

    async def _say(self, decision: Decision, **more: Any) -> None:
        """Decide about exactly the arguments that were shown."""
        self.answering = True
        shown = self._approval.arguments_hash
        await self.client.approvals.decide(self.key, decision, arguments_hash=shown, **more)

    async def ask(self, console: Console) -> bool:
        editable = self._approval.arguments is not None
        edit = "([bold]e[/])dit  " if editable else ""
        prompt = f"Approve?  ([bold]y[/])es  ([bold]n[/])o  {edit}([bold]l[/])ater › "
        while True:
            said = await ask_one_of(console, prompt, "ynel" if editable else "ynl")
            if said in (None, "l"):
                return False
            try:
                if said == "y":
                    await self._say("approve")
                    console.print("Approved.", style="green")
                elif said == "n":
                    why = await ask_line(console, "Why, in words for the model? (Enter: none) › ")
                    await self._say("reject", **({"reason": why} if why else {}))
                    console.print("Rejected.", style="red")
                elif not await self._edited(console):
                    continue
            except InvalidRequest as error:  # other arguments may fit
                print_error(error.info())
                continue
            return True

    async def _edited(self, console: Console) -> bool:
        """Let the person change the arguments and consent to them; False when they do not."""
        before = exact_json(self._approval.arguments)
        text = await edit_text(before + "\n")
        if text is None:
            text = await ask_line(console, "The arguments, as JSON on one line › ") or ""
        try:
            arguments = json.loads(text)
        except ValueError as error:
            console.print(f"That is not JSON: {error}.", style="red", markup=False)
            return False
        if arguments == self._approval.arguments:
            console.print("Nothing was changed.")
            return False
        console.print(Padding(Text(exact_json(arguments)), (1, 4)))
        said = await ask_one_of(
            console, "Approve with these instead?  ([bold]y[/])es  ([bold]n[/])o › ", "yn"
        )
        if said != "y":
            return False
        await self._say("approve", arguments=arguments)
        console.print("Approved, with other arguments.", style="green")
        return True


class DoubtQuestion(Question):
    """How a call went that had begun when its process died."""

    def __init__(self, client: AgentServerClient, step: Step) -> None:
        super().__init__(client, step.key)
        self._step = step

    def shown(self) -> RenderableType:
        return doubt_panel(self._step)

    def commands(self) -> list[str]:
        where = f"{self._step.run_id} {self.key}"
        return [
            f"reconcile happened {where} --result …",
            f"reconcile did-not-happen {where}",
            f"reconcile fail {where}",
        ]

    async def open(self) -> bool:
        doubts = await doubts_of(self.client, self._step.run_id)
        return any(step.key == self.key for step in doubts)

    async def ask(self, console: Console) -> bool:
        prompt = (
            "Did it happen?  ([bold]y[/])es  ([bold]n[/])o, call it now  ([bold]f[/])ail  "
            "([bold]l[/])ater › "
        )
        said = await ask_one_of(console, prompt, "ynfl")
        if said in (None, "l"):
            return False
        result: Any = None
        if said == "y":
            text = await ask_line(console, "What did it give? JSON or a text › ")
            if text is None:
                return False
            result = json_or_text(text)
        self.answering = True
        outcomes: dict[str | None, Any] = {"y": "happened", "n": "did_not_happen", "f": "fail"}
        await self.client.runs.reconcile(self._step.run_id, self.key, outcomes[said], result=result)
        console.print("Noted.", style="green")
        return True


class ReviewQuestion(Question):
    """Whether a plan is carried out as it is."""

    def __init__(self, client: AgentServerClient, run: Run) -> None:
        super().__init__(client, "review")
        self._run = run

    def shown(self) -> RenderableType:
        return Text("The plan waits for you to look at it.", style="bold yellow")

    def commands(self) -> list[str]:
        run_id = self._run.id
        edit = f"plan edit {run_id} --file plan.json"
        return [f"plan show {run_id}", edit, f"runs resume {run_id}"]

    async def open(self) -> bool:
        run = await self.client.runs.get(self._run.id)
        return run.waiting_for is not None and run.waiting_for.kind == "review"

    async def ask(self, console: Console) -> bool:
        prompt = "Carry it out?  ([bold]y[/])es  ([bold]n[/])o, cancel the run  ([bold]l[/])ater › "
        said = await ask_one_of(console, prompt, "ynl")
        self.answering = True
        if said == "y":
            await self.client.runs.resume(self._run.id)
        elif said == "n":
            await self.client.runs.cancel(self._run.id, "The plan was not accepted.")
        return said in ("y", "n")


async def questions_of(client: AgentServerClient, run: Run) -> list[Question]:
    """What ``run`` asks for now, the oldest first."""
    asked: list[Question] = []
    page = await client.approvals.list(status="pending", run_id=run.id, limit=200)
    asked += [ApprovalQuestion(client, approval) for approval in reversed(page.data)]
    asked += [DoubtQuestion(client, step) for step in await doubts_of(client, run.id)]
    if run.waiting_for is not None and run.waiting_for.kind == "review":
        asked.append(ReviewQuestion(client, run))
    return asked


async def doubts_of(client: AgentServerClient, run_id: str) -> list[Step]:
    """The steps of the run that are in doubt, and nobody has said how they went."""
    steps = await client.runs.steps(run_id)
    said = {step.key for step in steps if step.kind == "value"}
    doubts = [step for step in steps if step.status == "in_doubt"]
    return [step for step in doubts if f"{step.key}/reconciled/{step.attempts}" not in said]


async def all_doubts(client: AgentServerClient) -> AsyncIterator[Step]:
    """The steps in doubt of every run that waits, the newest run first."""
    cursor: str | None = None
    while True:
        page = await client.runs.list(status="waiting", limit=200, cursor=cursor)
        for run in page.data:
            for step in await doubts_of(client, run.id):
                yield step
        cursor = page.next_cursor
        if cursor is None:
            return


def approval_panel(approval: Approval) -> RenderableType:
    """An approval as a person reads it, its arguments to the letter."""
    facts = [("asked by", _who(approval))]
    if approval.expires_at is not None and approval.status == "pending":
        left = (approval.expires_at - utcnow()).total_seconds()
        facts.append(("expires", f"in {seconds(left)}, {AT_EXPIRY[approval.on_expiry]}"))
    if approval.approvers is not None:
        facts.append(("may decide", ", ".join(approval.approvers) or "nobody"))
    if approval.status != "pending":
        by = f" by {approval.decided_by}" if approval.decided_by else ""
        why = f": {approval.reason}" if approval.reason else ""
        facts.append((approval.status, f"{_moment(approval.decided_at)}{by}{why}"))
    if approval.replaced_by or approval.replaces:
        word = "replaced by" if approval.replaced_by else "replaces"
        facts.append((word, approval.replaced_by or approval.replaces or ""))
    facts += [("run", approval.run_id), ("step", approval.step)]
    name = approval.subject
    title = f"{name} asks for consent" if approval.arguments is not None else f"{name} asks"
    return _panel(title, approval.id, approval.detail, facts, approval.arguments)


def doubt_panel(step: Step) -> RenderableType:
    """A call in doubt as a person reads it."""
    facts = [("begun", _moment(step.started_at)), ("run", step.run_id), ("step", step.key)]
    why = "It had begun when its process died: it may or may not have taken effect. Find out, and say."
    return _panel(f"{step.name} is in doubt", "", why, facts, step.input)


def _panel(
    title: str, label: str, words: str, facts: list[tuple[str, str]], arguments: Any
) -> RenderableType:
    parts: list[RenderableType] = [Text(printable(words))] if words else []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(printable(value)))
    if arguments is not None:
        grid.add_row("arguments", Text(exact_json(arguments), style="bold"))
    parts.append(grid)
    return Panel(
        Group(*parts),
        title=Text(printable(title), style="bold yellow"),
        title_align="left",
        subtitle=Text(label, style="dim"),
        subtitle_align="right",
        border_style="yellow",
        width=min(Console().width, WIDEST),
        padding=(0, 1),
    )


def exact_json(value: Any) -> str:
    """``value`` as JSON on lines of its own, each character that does not print as its escape: what
    only looks like other arguments is seen."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def json_or_text(text: str) -> Any:
    """The JSON value in ``text``; else ``text`` itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def tell_how_to_answer(questions: list[Question], flags: str, *, seen: bool) -> None:
    """Say on stderr what the run asks for, unless it was ``seen``, and how to answer later."""
    console = Console(stderr=True, highlight=False)
    for question in questions:
        if not seen:
            console.print(question.shown())
        console.print("Answer with one of:")
        for command in question.commands():
            console.print(f"  agent-server {command}{flags}", markup=False, soft_wrap=True)


def _who(approval: Approval) -> str:
    """The agent, else the workflow's node or the run's own code."""
    return approval.agent or "the workflow"


def _moment(moment: Any) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"
