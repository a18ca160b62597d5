"""Runs, seen from a client: submit, read, wait, follow, cancel.

Leans on the domain and on one exchange at a time. Refuses to keep state: whatever it is told
about a run, another client may be told too.
"""

import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args
from urllib.parse import quote
from uuid import uuid4

import anyio
import httpx2
from pydantic import ValidationError

from agent_server.client.http import checked, exchange, failed, transport_error
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import Unavailable
from agent_server.domain.events import EVENT, Event
from agent_server.domain.history import Comparison, ForkedRun, Redact, RunExport
from agent_server.domain.plans import PlanDifference, PlanEdit, PlanState
from agent_server.domain.runs import (
    HaltedRuns,
    Reconcile,
    Run,
    RunRequest,
    SignalSent,
    Step,
    Task,
)
from agent_server.domain.stored_workflows import WorkflowGraph

T = TypeVar("T")

LONG_POLL_S = 60
"""The longest wait the server grants to one request, in seconds."""
SILENCE_S = 60.0
"""Seconds without a byte, pings included, after which a stream counts as cut."""
EVENT_TYPES = frozenset(
    member.model_fields["type"].default for member in get_args(get_args(Event)[0])
)


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; ``next_cursor`` asks for the next, None is the end."""

    data: Sequence[T]
    next_cursor: str | None = None


class RunsClient:
    """``/api/v1/runs``. Got as ``AgentServerClient.runs``."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def create(
        self,
        request: RunRequest | None = None,
        *,
        idempotency_key: str | None = None,
        wait_s: float | None = None,
        **fields: Any,
    ) -> Run:
        """Submit a run, given as a ``RunRequest`` or by its fields, and answer it as accepted.

        With ``wait_s`` (at most 60) the answer may be the ended run. Without a key of yours, one
        is made for this call, so that a request repeated by the network makes one run.
        """
        body = request if request is not None else checked(RunRequest, fields, "run")
        answer = await exchange(
            self._http,
            "POST",
            "/api/v1/runs",
            params={"wait": wait_s},
            json=body.model_dump(mode="json", exclude_unset=True),
            headers={"Idempotency-Key": idempotency_key or uuid4().hex},
            timeout_s=None if wait_s is None else wait_s + 30,
        )
        return Run.model_validate(answer)

    async def get(self, run_id: str, *, wait_s: float | None = None) -> Run:
        """The run as it is; with ``wait_s`` as it is when it ends, or after so many seconds."""
        answer = await exchange(
            self._http,
            "GET",
            f"/api/v1/runs/{run_id}",
            params={"wait": wait_s},
            timeout_s=None if wait_s is None else wait_s + 30,
        )
        return Run.model_validate(answer)

    async def wait(self, run_id: str, *, timeout_s: float | None = None) -> Run:
        """The run when it has ended. Raises ``TimeoutError`` when ``timeout_s`` passes first."""
        deadline = None if timeout_s is None else anyio.current_time() + timeout_s
        while True:
            left = LONG_POLL_S if deadline is None else deadline - anyio.current_time()
            if left <= 0:
                raise TimeoutError(f"Run {run_id!r} did not end within {timeout_s} s.")
            run = await self.get(run_id, wait_s=min(left, LONG_POLL_S))
            if run.status.ended:
                return run

    async def list(
        self, *, limit: int | None = None, cursor: str | None = None, **filters: Any
    ) -> Page[Run]:
        """One page of runs, the newest first; ``filters`` are those of the HTTP contract."""
        answer = await exchange(
            self._http,
            "GET",
            "/api/v1/runs",
            params={"limit": limit, "cursor": cursor, **filters},
        )
        return Page([Run.model_validate(r) for r in answer["data"]], answer.get("next_cursor"))

    async def cancel(self, run_id: str, reason: str = "") -> Run:
        """Ask the run to stop; what is in flight is stopped too. Answers the run as it is then."""
        answer = await exchange(
            self._http, "POST", f"{_place(run_id, None)}/cancel", json={"reason": reason}
        )
        return Run.model_validate(answer)

    async def pause(self, run_id: str, *, task: str | None = None) -> Run:
        """Let the run, or one task of it by its id, stand still until it is resumed."""
        return Run.model_validate(
            await exchange(self._http, "POST", f"{_place(run_id, task)}/pause")
        )

    async def resume(self, run_id: str, *, task: str | None = None) -> Run:
        """Let what is paused, or a plan that waits for review, go on."""
        return Run.model_validate(
            await exchange(self._http, "POST", f"{_place(run_id, task)}/resume")
        )

    async def cancel_task(self, run_id: str, task: str, *, reason: str = "") -> Task:
        """Stop one task and what it began; its node's policy decides what becomes of the run."""
        answer = await exchange(
            self._http, "POST", f"{_place(run_id, task)}/cancel", json={"reason": reason}
        )
        return Task.model_validate(answer)

    async def many(self, verb: Literal["cancel", "pause", "resume"], **filters: Any) -> HaltedRuns:
        """Do that to every run that fits the ``filters`` (those of ``list``) and has not ended."""
        answer = await exchange(self._http, "POST", f"/api/v1/runs/{verb}", json=filters)
        return HaltedRuns.model_validate(answer)

    async def signal(self, run_id: str, name: str, payload: Any = None) -> SignalSent:
        """Send the signal ``name`` with any JSON value: a wait for it takes the oldest, once."""
        answer = await exchange(
            self._http,
            "POST",
            f"{_place(run_id, None)}/signals/{quote(name, safe='')}",
            json=payload,
        )
        return SignalSent.model_validate(answer)

    async def reconcile(
        self,
        run_id: str,
        step: str,
        outcome: Literal["happened", "did_not_happen", "fail"],
        *,
        result: Any = None,
        reason: str = "",
    ) -> Run:
        """Say how the call ``step``, which is in doubt, went; ``result`` is what it gave, if it
        happened. Raises ``AlreadyDecided`` when somebody said so before."""
        said = Reconcile(step=step, outcome=outcome, result=result, reason=reason)
        body = said.model_dump(mode="json", exclude_defaults=True)
        answer = await exchange(self._http, "POST", f"{_place(run_id, None)}/reconcile", json=body)
        return Run.model_validate(answer)

    async def edit_plan(
        self, run_id: str, edit: PlanEdit, *, revision: int | None = None
    ) -> PlanDifference:
        """Put ``edit`` in place of a plan that waits for review: only if it is still at
        ``revision``, where that is given. Answers what changed."""
        answer = await exchange(
            self._http,
            "PUT",
            f"/api/v1/runs/{run_id}/plan",
            json=edit.model_dump(mode="json"),
            headers={} if revision is None else {"If-Match": f'"{revision}"'},
        )
        return PlanDifference.model_validate(answer)

    async def plan(self, run_id: str) -> PlanState:
        """The plan of a goal's run and how far each task is."""
        answer = await exchange(self._http, "GET", f"/api/v1/runs/{run_id}/plan")
        return PlanState.model_validate(answer)

    async def graph(self, run_id: str) -> WorkflowGraph:
        """The workflow or the plan of a run as a graph, with how far each node is."""
        answer = await exchange(self._http, "GET", f"/api/v1/runs/{run_id}/graph")
        return WorkflowGraph.model_validate(answer)

    async def tasks(self, run_id: str) -> Sequence[Task]:
        """The tasks of the run, in the order they were made."""
        return [Task.model_validate(t) for t in await self._all(f"/api/v1/runs/{run_id}/tasks")]

    async def steps(self, run_id: str) -> Sequence[Step]:
        """The ledger of the run: each model and tool call."""
        return [Step.model_validate(s) for s in await self._all(f"/api/v1/runs/{run_id}/steps")]

    async def _all(self, path: str) -> Sequence[JsonObject]:
        rows: tuple[JsonObject, ...] = ()
        cursor: str | None = None
        while True:
            answer = await exchange(
                self._http, "GET", path, params={"limit": 200, "cursor": cursor}
            )
            rows += tuple(answer["data"])
            cursor = answer.get("next_cursor")
            if cursor is None:
                return rows

    async def retry(self, run_id: str, *, budget: JsonObject | None = None) -> ForkedRun:
        """A new run that goes on where this one failed; the same one when asked again."""
        body = {} if budget is None else {"budget": budget}
        answer = await exchange(self._http, "POST", f"/api/v1/runs/{run_id}/retry", json=body)
        return ForkedRun.model_validate(answer)

    async def fork(
        self,
        run_id: str,
        start: str | None = None,
        *,
        idempotency_key: str | None = None,
        **changes: Any,
    ) -> ForkedRun:
        """A new run that shares what came before ``start`` (a task's id or path, a step's key;
        default: nothing). ``changes`` are those of ``ForkRequest``."""
        body = changes if start is None else {"from": start, **changes}
        answer = await exchange(
            self._http,
            "POST",
            f"/api/v1/runs/{run_id}/fork",
            json=body,
            headers={"Idempotency-Key": idempotency_key or uuid4().hex},
        )
        return ForkedRun.model_validate(answer)

    async def compare(self, run_id: str, other_id: str) -> Comparison:
        """The differences between two runs."""
        answer = await exchange(
            self._http, "GET", f"/api/v1/runs/{run_id}/compare", params={"with": other_id}
        )
        return Comparison.model_validate(answer)

    async def export(self, run_id: str, *, redact: Redact = "none") -> RunExport:
        """The whole run as one document."""
        answer = await exchange(
            self._http, "GET", f"/api/v1/runs/{run_id}/export", params={"redact": redact}
        )
        return RunExport.model_validate(answer)

    async def stored_events(self, run_id: str, *, after: int = 0) -> Sequence[Event]:
        """The facts stored so far after number ``after``, without waiting for more."""
        found: tuple[Event, ...] = ()
        while True:
            answer = await exchange(
                self._http,
                "GET",
                f"/api/v1/runs/{run_id}/events",
                params={"after": found[-1].seq if found else after, "limit": 200},
                headers={"Accept": "application/json"},
            )
            rows = [row for row in answer["data"] if row.get("type") in EVENT_TYPES]
            found += tuple(EVENT.validate_python(row) for row in rows)
            if not rows or answer.get("next_cursor") is None:
                return found

    async def events(
        self, run_id: str, *, after: int = 0, reconnect_s: float = 60.0
    ) -> AsyncIterator[Event]:
        """Each event of the run after number ``after``, and the live ones until it ends.

        Stored events come exactly once and in order; a connection that breaks is made anew where
        it broke. ``message.delta`` comes only while connected. Raises ``Unavailable`` when no
        connection could be made for ``reconnect_s`` seconds; the first one is not tried twice.
        """
        last, connected, pause_s = after, False, 0.2
        deadline = anyio.current_time() + reconnect_s
        while True:
            progress = False
            try:
                async with self._http.stream(
                    "GET",
                    f"/api/v1/runs/{run_id}/events",
                    headers={"Accept": "text/event-stream", "Last-Event-ID": str(last)},
                    timeout=httpx2.Timeout(30.0, read=SILENCE_S),
                ) as response:
                    if response.status_code >= 400:
                        problem = await failed(response)
                        if not (connected and isinstance(problem, Unavailable)):
                            raise problem
                        raise httpx2.ReadError(problem.detail)
                    if response.status_code == 204:
                        return
                    connected, pause_s = True, 0.2
                    deadline = anyio.current_time() + reconnect_s
                    async for sent in httpx2.EventSource(response, max_event_size=None):
                        if sent.retry is not None:
                            pause_s = sent.retry / 1000
                        if sent.event not in EVENT_TYPES:
                            continue
                        event = _event(sent.data)
                        if event.seq is not None:
                            if event.seq <= last:
                                continue
                            last = event.seq
                        progress = True
                        yield event
                        if event.ends_run:
                            return
                if not progress and (await self.get(run_id)).status.ended:
                    return
            except httpx2.HTTPError as error:
                if not connected or anyio.current_time() > deadline:
                    raise transport_error(self._http.base_url, error) from error
            await anyio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, 5.0)


def _event(data: str) -> Event:
    """The event in ``data``; the fast parser refuses half a character, which a model may say."""
    try:
        return EVENT.validate_json(data)
    except ValidationError:
        return EVENT.validate_python(json.loads(data))


def _place(run_id: str, task: str | None) -> str:
    place = f"/api/v1/runs/{run_id}"
    return place if task is None else f"{place}/tasks/{task}"
