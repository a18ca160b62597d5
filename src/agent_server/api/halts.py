"""The routes that make runs stand still or stop: pause, resume, one task, many runs, plan review.

Leans on ``HaltsPort`` for all that happens. Refuses to know how a run is reached.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump
from agent_server.api.door import CALL, Call
from agent_server.api.openapi import Route
from agent_server.api.runs import PREFIX, run_target
from agent_server.domain.base import Frozen
from agent_server.domain.ids import Tenant
from agent_server.domain.plans import PlanDifference, PlanEdit
from agent_server.domain.runs import HaltedRuns, Run, Task
from agent_server.execution.runs import RunFilters
from agent_server.settings import Settings

ERRORS = (400, 404, 409, 413, 415, 422)


class HaltsPort(Protocol):
    """What ``execution.halts.Halts`` does. Unknown ids raise ``NotFound``."""

    async def pause(
        self, tenant: Tenant, run_id: str, *, by: str, task: str | None = None
    ) -> Run: ...

    async def resume(
        self, tenant: Tenant, run_id: str, *, by: str, task: str | None = None
    ) -> Run: ...

    async def cancel_task(
        self, tenant: Tenant, run_id: str, task: str, *, by: str, reason: str = ""
    ) -> Task: ...

    async def edit_plan(
        self,
        tenant: Tenant,
        run_id: str,
        edit: PlanEdit,
        *,
        by: str,
        if_match: Collection[str] | None = None,
    ) -> PlanDifference: ...

    async def many(
        self, verb: Any, tenant: Tenant, filters: RunFilters, *, by: str, reason: str = ""
    ) -> HaltedRuns: ...


class TaskReason(Frozen):
    reason: str = Field(default="", max_length=2_000, description="Said in the task's error.")


class Chosen(inputs.RunChoice):
    """Which runs: at least one of the filters; only runs that have not ended are touched."""

    reason: str = Field(default="", max_length=2_000, description="With `cancel`: why.")


class HaltRoutes:
    """The handlers, bound to the part they call."""

    def __init__(self, halts: HaltsPort, settings: Settings) -> None:
        self._halts = halts
        self._max_depth = settings.max_json_depth

    def routes(self) -> Sequence[Route]:
        one, task = PREFIX + "/{run_id}", PREFIX + "/{run_id}/tasks/{task_id}"

        def route(method: str, path: str, handler: Any, **described: Any) -> Route:
            return Route(method, path, handler, tag="runs", **described)

        return (
            route(
                "POST",
                one + "/pause",
                self.pause,
                summary="Pause a run",
                description="The run stands still (`waiting`) until it is resumed, over restarts. "
                "A model call in flight is broken off and made again later; a running tool that "
                "must not be repeated has a grace time to finish.",
                name="pause_run",
                answers={200: Run},
                errors=ERRORS,
            ),
            route(
                "POST",
                one + "/resume",
                self.resume,
                summary="Resume a run",
                description="Lets a paused run go on, or one whose plan waits for review.",
                name="resume_run",
                answers={200: Run},
                errors=ERRORS,
            ),
            route(
                "POST",
                task + "/pause",
                self.pause,
                summary="Pause one task",
                description="The task and all that it began stand still; the rest goes on.",
                name="pause_task",
                answers={200: Run},
                errors=ERRORS,
            ),
            route(
                "POST",
                task + "/resume",
                self.resume,
                summary="Resume one task",
                name="resume_task",
                answers={200: Run},
                errors=ERRORS,
            ),
            route(
                "POST",
                task + "/cancel",
                self.cancel_task,
                summary="Cancel one task",
                description="The task and all that it began stop. It fails with `task_cancelled`; "
                "its node's policy decides what becomes of the run.",
                name="cancel_task",
                body=TaskReason,
                body_optional=True,
                answers={200: Task},
                errors=ERRORS,
            ),
            *(
                route(
                    "POST",
                    f"{PREFIX}/{verb}",
                    handler,
                    summary=f"{verb.capitalize()} many runs",
                    description="Those that fit all the filters and have not ended, the newest "
                    "first, at most 1,000 in one call.",
                    name=f"{verb}_runs",
                    body=Chosen,
                    answers={200: HaltedRuns},
                    errors=(400, 413, 415, 422),
                )
                for verb, handler in (
                    ("cancel", self.cancel_many),
                    ("pause", self.pause_many),
                    ("resume", self.resume_many),
                )
            ),
            route(
                "PUT",
                one + "/plan",
                self.edit_plan,
                summary="Edit a plan that waits for review",
                description="Put in place of the plan, validated; answers what it changed. The run "
                "goes on when it is resumed.",
                name="edit_run_plan",
                body=PlanEdit,
                answers={200: PlanDifference},
                errors=(*ERRORS, 412),
                headers={"If-Match": "Only when the plan still has this `ETag`; else 412."},
                etag=True,
            ),
        )

    async def pause(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        task = request.path_params.get("task_id")
        run = await self._halts.pause(*run_target(request), by=_name(request), task=task)
        return Json(dump(run))

    async def resume(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        task = request.path_params.get("task_id")
        run = await self._halts.resume(*run_target(request), by=_name(request), task=task)
        return Json(dump(run))

    async def cancel_task(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        asked = inputs.parse(raw, TaskReason, max_depth=self._max_depth) if raw else TaskReason()
        inputs.refuse_nul(asked, raw)
        task = await self._halts.cancel_task(
            *run_target(request),
            request.path_params["task_id"],
            by=_name(request),
            reason=asked.reason,
        )
        return Json(dump(task))

    async def cancel_many(self, request: Request) -> Response:
        return await self._many("cancel", request)

    async def pause_many(self, request: Request) -> Response:
        return await self._many("pause", request)

    async def resume_many(self, request: Request) -> Response:
        return await self._many("resume", request)

    async def _many(self, verb: str, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        asked = inputs.parse(raw, Chosen, max_depth=self._max_depth)
        inputs.refuse_nul(asked, raw)
        call: Call = request.scope[CALL]
        done = await self._halts.many(
            verb,
            call.principal.tenant,
            RunFilters(**asked.model_dump(exclude={"reason"})),
            by=call.principal.name,
            reason=asked.reason,
        )
        return Json(dump(done))

    async def edit_plan(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        edit = inputs.parse(raw, PlanEdit, max_depth=self._max_depth)
        inputs.refuse_nul(edit, raw)
        tags = inputs.entity_tags(request, "if-match")
        if tags is not None:
            tags = frozenset(tag.strip('"') for tag in tags)
        changed = await self._halts.edit_plan(
            *run_target(request), edit, by=_name(request), if_match=tags
        )
        return Json(dump(changed), headers={"ETag": f'"{changed.revision}"'})


def _name(request: Request) -> str:
    call: Call = request.scope[CALL]
    return call.principal.name
