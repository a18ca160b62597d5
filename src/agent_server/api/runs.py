"""The routes of runs: submit, list, read, wait, follow, look inside, cancel.

Leans on ``RunsPort`` for all that happens and on ``inputs`` for all that is refused. Refuses to
know how a run works: it turns requests into calls and results into bytes.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fastapi import Request
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump, dump_page
from agent_server.api.deps import ApiDeps
from agent_server.api.door import CALL, Call
from agent_server.api.ephemeral import EphemeralFollow
from agent_server.api.openapi import Route
from agent_server.api.sse import EventStream
from agent_server.domain.base import Frozen
from agent_server.domain.errors import InvalidRequest, NotFound, TimedOut
from agent_server.domain.events import Event
from agent_server.domain.ids import RunId, Tenant
from agent_server.domain.plans import PlanState
from agent_server.domain.runs import Run, RunRequest, Step, Task
from agent_server.execution.runs import RunFilters

PREFIX = "/api/v1/runs"
RUN_ID = re.compile("run_[0-9a-f]{32}")


class RunPage(Frozen):
    data: tuple[Run, ...]
    next_cursor: str | None = None


class TaskPage(Frozen):
    data: tuple[Task, ...]
    next_cursor: str | None = None


class StepPage(Frozen):
    data: tuple[Step, ...]
    next_cursor: str | None = None


class EventPage(Frozen):
    data: tuple[Event, ...]
    next_cursor: str | None = None


class CancelRequest(Frozen):
    reason: str = ""


class Target(NamedTuple):
    """Whose run a call is about."""

    tenant: Tenant
    run_id: RunId


def run_target(request: Request) -> Target:
    """The run in the path, of the caller's tenant. Raises ``NotFound`` for what is no id."""
    call: Call = request.scope[CALL]
    run_id = request.path_params["run_id"]
    if not RUN_ID.fullmatch(run_id):
        raise NotFound(
            f"There is no run {run_id[:60]!r}.",
            hint="A run's id is `run_` and 32 hexadecimal digits.",
        )
    return Target(call.principal.tenant, RunId(run_id))


class RunRoutes:
    """The handlers, bound to the parts they call."""

    def __init__(self, deps: ApiDeps) -> None:
        self._runs = deps.runs
        self._settings = deps.settings
        self._streams = deps.streams

    def routes(self) -> Sequence[Route]:
        one = PREFIX + "/{run_id}"
        return (
            Route(
                "POST",
                PREFIX,
                self.create,
                summary="Start a run",
                description="Gives a goal, an agent or a workflow to the server: exactly one of "
                "`goal`, `agent` and `workflow`. Answers at once with 202, or with 200 when "
                "`wait` sees the end, or with the event stream when `stream` is true.",
                tag="runs",
                name="create_run",
                query=inputs.WaitQuery,
                body=RunRequest,
                answers={200: Run, 202: Run},
                stream=True,
                errors=(400, 408, 409, 413, 415, 422, 429),
                idempotent=True,
            ),
            Route(
                "GET",
                one,
                self.read,
                summary="Read a run",
                description="With `wait`, answers when the run ends or the time is over.",
                tag="runs",
                name="get_run",
                query=inputs.WaitQuery,
                answers={200: Run},
                errors=(404, 422),
            ),
            Route(
                "GET",
                one + "/events",
                self.events,
                summary="Follow a run's events",
                description="Server-Sent Events: stored events first, then live ones, until the "
                "run's end. Resume with `Last-Event-ID` or `after`. A JSON list for "
                "`Accept: application/json`. A browser that reconnects to a run that has ended "
                "and has nothing more to say gets 204, which ends its attempts.",
                tag="runs",
                name="follow_run",
                query=inputs.EventsQuery,
                answers={200: EventPage},
                stream=True,
                errors=(404, 422, 429),
                headers={"Last-Event-ID": "The last event's `id`; goes before `after`."},
            ),
            Route(
                "GET",
                PREFIX,
                self.list,
                summary="List runs",
                description="Newest first.",
                tag="runs",
                name="list_runs",
                query=inputs.RunsQuery,
                answers={200: RunPage},
                errors=(422,),
            ),
            Route(
                "GET",
                one + "/plan",
                self.plan,
                summary="Read a run's plan",
                tag="runs",
                name="get_run_plan",
                answers={200: PlanState},
                etag=True,
                errors=(404, 422),
            ),
            Route(
                "GET",
                one + "/tasks",
                self.tasks,
                summary="List a run's tasks",
                description="In the order they were begun.",
                tag="runs",
                name="list_run_tasks",
                query=inputs.ListQuery,
                answers={200: TaskPage},
                errors=(404, 422),
            ),
            Route(
                "GET",
                one + "/steps",
                self.steps,
                summary="List a run's steps",
                description="Model and tool calls with what went in and came out, oldest first.",
                tag="runs",
                name="list_run_steps",
                query=inputs.ListQuery,
                answers={200: StepPage},
                errors=(404, 422),
            ),
            Route(
                "POST",
                one + "/cancel",
                self.cancel,
                summary="Cancel a run",
                description="Stops the run and the call it is in at once.",
                tag="runs",
                name="cancel_run",
                body=CancelRequest,
                body_optional=True,
                answers={200: Run},
                errors=(400, 404, 409, 413, 415, 422),
            ),
        )

    async def create(self, request: Request) -> Response:
        raw = await request.body()
        wanted = inputs.query(request, inputs.WaitQuery)
        asked = inputs.parse(raw, RunRequest, max_depth=self._settings.max_json_depth)
        inputs.refuse_nul(asked, raw)
        call: Call = request.scope[CALL]
        tenant, principal = call.principal.tenant, call.principal.name
        idempotency = inputs.idempotency(request.headers, "POST", PREFIX, raw)
        if not asked.store:
            if idempotency is not None:
                raise InvalidRequest(
                    "An Idempotency-Key needs a run that is stored.",
                    hint="Leave out the header or `store: false`.",
                )
            return await self._ephemeral(asked, call, wanted.wait)
        follow = None
        if asked.stream:
            self._streams.check_room(principal)
            made, follow = await self._runs.submit_followed(
                asked, tenant=tenant, principal=principal, idempotency=idempotency
            )
        else:
            made = await self._runs.submit(
                asked, tenant=tenant, principal=principal, idempotency=idempotency
            )
        run, replayed, steered = made
        headers = {"Location": f"{PREFIX}/{run.id}"}
        if replayed:
            headers["Idempotency-Replayed"] = "true"
        if steered is not None:
            headers["Run-Steered"] = "true"
        if follow is not None:
            return EventStream(self._streams, principal, follow, headers=headers)
        if wanted.wait and not run.status.ended:
            run = await self._wait(Target(tenant, RunId(run.id)), wanted.wait)
        ended = wanted.wait is not None and run.status.ended
        return Json(dump(run), 200 if ended else 202, headers)

    async def _ephemeral(self, asked: RunRequest, call: Call, wait: float | None) -> Response:
        """A run of which nothing is stored: it lives as long as the call that waits for it."""
        tenant, principal = call.principal.tenant, call.principal.name
        if asked.kind != "agent":
            raise InvalidRequest(
                f"Only an agent can run with 'store': false, not a {asked.kind}.",
                hint="Leave out `store`.",
            )
        if asked.stream:
            follow = EphemeralFollow(self._runs, asked, tenant, principal)
            return EventStream(self._streams, principal, follow)
        if not wait:
            raise InvalidRequest(
                "A run with 'store': false needs 'stream': true or '?wait=': there is nothing "
                "to come back to.",
                hint=f"Add `?wait={inputs.MAX_WAIT_S}`, or leave out `store`.",
            )
        with self._streams.poll(wait):
            run = await self._runs.run_ephemeral(asked, tenant=tenant, principal=principal)
            return Json(dump(run))
        raise TimedOut(
            f"The run did not end within {wait:g} s and was given up, since it is not stored.",
            hint="Leave out `store: false`, so that a run may outlive the call.",
        )

    async def _wait(self, target: Target, seconds: float) -> Run:
        with self._streams.poll():
            return await self._runs.wait(target.tenant, target.run_id, seconds)
        return await self._runs.get(target.tenant, target.run_id)

    async def read(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.WaitQuery)
        target = run_target(request)
        if wanted.wait:
            return Json(dump(await self._wait(target, wanted.wait)))
        return Json(dump(await self._runs.get(*target)))

    async def list(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.RunsQuery)
        filters = RunFilters(**wanted.model_dump(exclude={"limit", "cursor"}))
        call: Call = request.scope[CALL]
        page = await self._runs.list(
            call.principal.tenant, filters=filters, limit=wanted.limit, cursor=wanted.cursor
        )
        return Json(dump_page(map(dump, page.data), page.next_cursor))

    async def events(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.EventsQuery)
        target = run_target(request)
        resumed = inputs.last_event_id(request.headers)
        after = wanted.after if resumed is None else resumed
        if not _wants_stream(request.headers.get("accept", "")):
            await self._runs.get(*target)
            if wanted.cursor is not None:
                after = inputs.decode_cursor(wanted.cursor)
            events = await self._runs.events(*target, after, wanted.limit)
            last = events[-1].seq if len(events) == wanted.limit else None
            cursor = None if last is None else inputs.encode_cursor(last)
            return Json(dump_page((event.data for event in events), cursor))
        if resumed:
            run = await self._runs.get(*target)
            if run.status.ended and not await self._runs.events(*target, after, 1):
                return Response(status_code=204)
        call: Call = request.scope[CALL]
        return EventStream(self._streams, call.principal.name, self._runs.follow(*target, after))

    async def plan(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        plan = await self._runs.plan(*run_target(request))
        return Json(dump(plan), headers={"ETag": f'"{plan.revision}"'})

    async def tasks(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.ListQuery)
        first = 0 if wanted.cursor is None else inputs.decode_cursor(wanted.cursor)
        found = await self._runs.tasks(*run_target(request))
        last = first + wanted.limit
        cursor = inputs.encode_cursor(last) if len(found) > last else None
        return Json(dump_page(map(dump, found[first:last]), cursor))

    async def steps(self, request: Request) -> Response:
        wanted = inputs.query(request, inputs.ListQuery)
        page = await self._runs.steps(
            *run_target(request), limit=wanted.limit, cursor=wanted.cursor
        )
        return Json(dump_page(map(dump, page.data), page.next_cursor))

    async def cancel(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        asked = (
            inputs.parse(raw, CancelRequest, max_depth=self._settings.max_json_depth)
            if raw
            else CancelRequest()
        )
        inputs.refuse_nul(asked, raw)
        return Json(dump(await self._runs.cancel(*run_target(request), asked.reason)))


def _wants_stream(accept: str) -> bool:
    """True unless the caller asks for JSON and not for an event stream."""
    return "application/json" not in accept or "text/event-stream" in accept
