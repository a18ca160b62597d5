"""The routes of those who steer runs under way: signals, and the inbox of approvals.

Leans on ``ControlPort`` for all that happens. Refuses to know what a run does with what it is told.
"""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import Request
from pydantic import JsonValue, RootModel
from starlette.responses import Response

from agent_server.api import inputs
from agent_server.api.answers import Json, dump, dump_page
from agent_server.api.door import CALL, Call
from agent_server.api.openapi import Route
from agent_server.api.runs import PREFIX as RUNS
from agent_server.api.runs import run_target
from agent_server.domain.approvals import Approval, ApprovalStatus, Decide
from agent_server.domain.base import Frozen
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.ids import Tenant
from agent_server.domain.runs import Reconcile, Run, SignalSent
from agent_server.execution.keys import Keyed
from agent_server.execution.paging import Page
from agent_server.settings import Settings

PREFIX = "/api/v1/approvals"
SIGNAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class ControlPort(Protocol):
    """What happens to runs under way. Unknown ids raise ``NotFound``."""

    async def signal(
        self,
        tenant: Tenant,
        run_id: str,
        name: str,
        payload: Any,
        *,
        by: str,
        keyed: Keyed | None = None,
    ) -> SignalSent: ...

    async def reconcile(
        self, tenant: Tenant, run_id: str, said: Reconcile, *, by: str, keyed: Keyed | None = None
    ) -> Run: ...

    async def approvals(
        self,
        tenant: Tenant,
        *,
        status: ApprovalStatus | None = None,
        run_id: str | None = None,
        subject: str | None = None,
        limit: int,
        cursor: str | None = None,
    ) -> Page[Approval]: ...

    async def approval(self, tenant: Tenant, identity: str) -> Approval: ...

    async def decide(
        self,
        tenant: Tenant,
        identity: str,
        decide: Decide,
        *,
        by: str,
        keyed: Keyed | None = None,
    ) -> Approval: ...


class Payload(RootModel[JsonValue]):
    """Any JSON value; null where there is no body."""


class ApprovalPage(Frozen):
    data: tuple[Approval, ...]
    next_cursor: str | None = None


class ApprovalsQuery(inputs.ListQuery):
    status: ApprovalStatus | None = None
    run_id: str | None = None
    subject: str | None = None


class ControlRoutes:
    """The handlers, bound to the part they call."""

    def __init__(self, control: ControlPort, settings: Settings) -> None:
        self._control = control
        self._settings = settings

    def routes(self) -> Sequence[Route]:
        return (
            Route(
                "POST",
                RUNS + "/{run_id}/signals/{name}",
                self.signal,
                summary="Send a signal to a run",
                description="Any JSON value. A wait for that name takes the oldest, once; one that "
                "nobody waits for yet is kept.",
                tag="runs",
                name="signal_run",
                body=Payload,
                body_optional=True,
                answers={202: SignalSent},
                errors=(400, 404, 409, 413, 415, 422),
                idempotent=True,
            ),
            Route(
                "POST",
                RUNS + "/{run_id}/reconcile",
                self.reconcile,
                summary="Say how a call in doubt went",
                description="For a run that waits for `reconciliation`: the call happened, with its "
                "`result`; it did not, and is made now; or what needed it fails. Once.",
                tag="runs",
                name="reconcile_run",
                body=Reconcile,
                answers={200: Run},
                errors=(400, 404, 409, 413, 415, 422),
                idempotent=True,
            ),
            Route(
                "GET",
                PREFIX,
                self.list,
                summary="List approvals",
                description="Newest first. `status=pending` is the inbox.",
                tag="approvals",
                name="list_approvals",
                query=ApprovalsQuery,
                answers={200: ApprovalPage},
                errors=(422,),
            ),
            Route(
                "GET",
                PREFIX + "/{approval_id}",
                self.read,
                summary="Read an approval",
                tag="approvals",
                name="get_approval",
                answers={200: Approval},
                errors=(404, 422),
            ),
            Route(
                "POST",
                PREFIX + "/{approval_id}",
                self.decide,
                summary="Decide about an approval",
                description="Once: a second decision, and one after expiry, is a 409. With "
                "`arguments` the call is made with those instead; the answer is then a new "
                "approval that replaces the one asked for.",
                tag="approvals",
                name="decide_approval",
                body=Decide,
                answers={200: Approval},
                errors=(400, 403, 404, 409, 413, 415, 422),
                idempotent=True,
            ),
        )

    async def signal(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        tenant, run_id = run_target(request)
        name = request.path_params["name"]
        if not SIGNAL_NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name[:100]!r} is not the name of a signal.",
                hint="Letters, digits, `_`, `.` and `-`, at most 100.",
            )
        raw = await request.body()
        payload = None
        if raw:
            asked = inputs.parse(raw, Payload, max_depth=self._settings.max_json_depth)
            inputs.refuse_nul(asked, raw)
            payload = asked.root
        keyed = _keyed(request, raw or b"null")
        sent = await self._control.signal(
            tenant, run_id, name, payload, by=_name(request), keyed=keyed
        )
        return Json(dump(sent), 202, _replayed(keyed))

    async def reconcile(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        said = inputs.parse(raw, Reconcile, max_depth=self._settings.max_json_depth)
        inputs.refuse_nul(said, raw)
        keyed = _keyed(request, raw)
        target = run_target(request)
        run = await self._control.reconcile(*target, said, by=_name(request), keyed=keyed)
        return Json(dump(run), headers=_replayed(keyed))

    async def list(self, request: Request) -> Response:
        wanted = inputs.query(request, ApprovalsQuery)
        call: Call = request.scope[CALL]
        page = await self._control.approvals(call.principal.tenant, **wanted.model_dump())
        return Json(dump_page(map(dump, page.data), page.next_cursor))

    async def read(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        return Json(dump(await self._control.approval(*_target(request))))

    async def decide(self, request: Request) -> Response:
        inputs.query(request, inputs.NoQuery)
        raw = await request.body()
        asked = inputs.parse(raw, Decide, max_depth=self._settings.max_json_depth)
        inputs.refuse_nul(asked, raw)
        keyed = _keyed(request, raw)
        target = _target(request)
        decided = await self._control.decide(*target, asked, by=_name(request), keyed=keyed)
        return Json(dump(decided), headers=_replayed(keyed))


def _keyed(request: Request, raw: bytes) -> Keyed:
    return Keyed(inputs.idempotency(request.headers, "POST", request.url.path, raw))


def _replayed(keyed: Keyed) -> dict[str, str]:
    return {"Idempotency-Replayed": "true"} if keyed.replayed else {}


def _name(request: Request) -> str:
    call: Call = request.scope[CALL]
    return call.principal.name


def _target(request: Request) -> tuple[Tenant, str]:
    call: Call = request.scope[CALL]
    return call.principal.tenant, request.path_params["approval_id"]
