"""What is done with runs that have been: retry, fork, compare, export.

Leans on the door of runs, through which each new run goes, and on ``forking`` and ``comparing``,
which decide. Refuses to touch the origin: a retry and a fork are new runs, which say where they
come from, and hold copies of what they share. Copies are not paid for twice: their usage is nil.
"""

import json
from collections.abc import Callable
from datetime import datetime
from hashlib import sha256
from typing import Any, Protocol

from pydantic import ValidationError
from sqlalchemy import Connection, Row

from agent_server.domain.agents import ToolEffect
from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    Conflict,
    FieldError,
    IdempotencyMismatch,
    InvalidRequest,
)
from agent_server.domain.history import (
    Comparison,
    ForkedRun,
    ForkRequest,
    Repeat,
    RetryRequest,
    RunExport,
)
from agent_server.domain.ids import Tenant
from agent_server.domain.runs import Budget, RunRequest, RunStatus
from agent_server.execution import store
from agent_server.execution.comparing import compared
from agent_server.execution.forking import (
    Share,
    fork_share,
    retry_share,
    shared_events,
    with_arguments,
)
from agent_server.execution.runs import Idempotency, Runs, Submitted
from agent_server.execution.store import Whole
from agent_server.execution.submitting import Origin


class BranchSession(Protocol):
    """Makes the session ``new_id`` begin as ``session_id`` did before the run ``before_run``."""

    def __call__(
        self,
        connection: Connection,
        tenant: Tenant,
        session_id: str,
        new_id: str,
        *,
        before_run: str | None,
        now: datetime,
    ) -> object: ...


SessionBefore = Callable[[Connection, Tenant, str, str], list[JsonObject]]
"""The items of the session that were there before the run."""


class History:
    """Built once. ``effect_of`` says what calling a tool twice does, by the operator's policies."""

    def __init__(
        self,
        runs: Runs,
        *,
        effect_of: Callable[[str], ToolEffect],
        branch_session: BranchSession,
        session_before: SessionBefore,
        version: str = "",
    ) -> None:
        self._runs = runs
        self._effect_of = effect_of
        self._branch_session = branch_session
        self._session_before = session_before
        self._version = version

    async def retry(
        self, tenant: Tenant, run_id: str, asked: RetryRequest, *, principal: str
    ) -> tuple[ForkedRun, bool]:
        """A new run that goes on where this one failed; True with the one that is already there.

        A run is retried once, by whoever comes first: what failed must not be done twice because
        somebody asks twice. Raises ``Conflict`` for a run that has not ended, that succeeded, or
        that was retried with another budget.
        """
        origin = await self._whole(tenant, run_id)
        status = RunStatus(origin.run.status)
        if not status.ended or status is RunStatus.SUCCEEDED:
            raise Conflict(
                f"The run {run_id!r} is {status.value}: there is nothing to retry.",
                hint="Fork it to do a part of it again, or wait until it has ended.",
            )
        request = RunRequest.model_validate(origin.run.request)
        changes: dict[str, Any] = {"start_after": None, "stream": False}
        if asked.budget is not None:
            changes["budget"] = _merged(request.budget, asked.budget)
        request = request.model_copy(update=changes)
        share = retry_share(origin)
        fingerprint = sha256(asked.model_dump_json().encode()).hexdigest()
        try:
            made = await self._runs.submit(
                request,
                tenant=tenant,
                principal=principal,
                # No header can hold this key: headers are ASCII.
                idempotency=Idempotency(f"\N{CLOCKWISE OPEN CIRCLE ARROW} {run_id}", fingerprint),
                origin=self._origin(origin, share, {}, {}, None),
            )
        except IdempotencyMismatch:
            raise Conflict(
                f"The run {run_id!r} was already retried with another budget.",
                hint="Retry that run, which GET /api/v1/runs shows, or fork this one.",
            ) from None
        return self._answer(made, origin, share), made.replayed

    async def fork(
        self,
        tenant: Tenant,
        run_id: str,
        asked: ForkRequest,
        *,
        principal: str,
        idempotency: Idempotency | None = None,
    ) -> tuple[ForkedRun, bool]:
        """A new run that shares what came before ``asked.start``; True for a repeated request.

        Raises ``InvalidRequest`` for a place that does not exist and for a change that makes no
        sense there.
        """
        origin = await self._whole(tenant, run_id)
        share = fork_share(origin, asked.start)
        request, payload, restart, outputs = _changed(origin, share, asked)
        branch = None
        if asked.session_id is not None:
            request = request.model_copy(update={"session_id": asked.session_id})
        elif request.session_id is not None:
            branch = request.session_id
            digest = sha256(f"{run_id}{asked.model_dump_json()}{utcnow()}".encode()).hexdigest()
            new_id = f"{branch[:180]}~{digest[:12]}"
            request = request.model_copy(update={"session_id": new_id})
        if asked.budget is not None:
            merged = _merged(request.budget, asked.budget)
            request = request.model_copy(update={"budget": merged})
        if asked.metadata is not None:
            request = request.model_copy(update={"metadata": asked.metadata})
        made = await self._runs.submit(
            request,
            tenant=tenant,
            principal=principal,
            idempotency=idempotency,
            origin=self._origin(
                origin, share, payload, outputs, branch, restart, request.session_id
            ),
        )
        return self._answer(made, origin, share), made.replayed

    async def compare(self, tenant: Tenant, run_id: str, other_id: str) -> Comparison:
        """The differences between two runs. Raises ``NotFound``."""
        return compared(await self._whole(tenant, run_id), await self._whole(tenant, other_id))

    async def export(self, tenant: Tenant, run_id: str) -> RunExport:
        """Everything of the run. Raises ``NotFound``."""
        origin = await self._whole(tenant, run_id)
        row = origin.run
        before: list[JsonObject] = []
        if row.session_id is not None:
            before = await self._runs.database.read(
                lambda c: self._session_before(c, tenant, row.session_id, run_id)
            )
        return RunExport(
            server=self._version,
            exported_at=utcnow(),
            run=store.run_of(row),
            request=row.request,
            session=tuple(before),
            tasks=tuple(_exported(one) for one in origin.tasks),
            steps=tuple(
                {**_exported(one), "usage": store.usage_of(one).model_dump(mode="json")}
                for one in origin.steps
            ),
            events=tuple(origin.events),
        )

    async def _whole(self, tenant: Tenant, run_id: str) -> Whole:
        def fetch(connection: Connection) -> Whole:
            found = store.whole(connection, store.known_run_row(connection, tenant, run_id))
            # Looked at behind the rest, which may have gone meanwhile.
            if store.known_run_row(connection, tenant, run_id).trimmed:
                raise Conflict(
                    f"The events and steps of the run {run_id!r} were deleted: it is too old.",
                    hint="AGENT_SERVER_RETENTION_DETAIL_DAYS says how long they are kept.",
                )
            return found

        return await self._runs.database.read(fetch)

    def _origin(
        self,
        origin: Whole,
        share: Share,
        payload: JsonObject,
        outputs: dict[str, Any],
        branch: str | None,
        restart: JsonObject | None = None,
        session_id: str | None = None,
    ) -> Origin:
        tenant = Tenant(origin.run.tenant)

        def write(connection: Connection, run_id: str) -> None:
            now = utcnow()
            store.copy_tasks(connection, run_id, share.tasks)
            store.copy_steps(connection, run_id, share.steps, outputs)
            if restart is not None:
                store.insert_task(connection, {**restart, "run_id": run_id, "created_at": now})
            if branch is not None and session_id is not None:
                self._branch_session(
                    connection, tenant, branch, session_id, before_run=origin.run.id, now=now
                )

        return Origin(
            run_id=origin.run.id,
            payload=payload,
            events=lambda run_id: shared_events(origin, share, run_id),
            write=write,
        )

    def _answer(self, made: Submitted, origin: Whole, share: Share) -> ForkedRun:
        repeats = []
        for row in share.repeated(origin):
            effect = self._effect_of(row.name)
            calls = (one.key for one in origin.steps if one.kind != "value")
            inside = any(key.startswith(f"{row.key}/") for key in calls)
            if effect is not ToolEffect.NONE and not inside:
                repeats.append(
                    Repeat(step=row.key, name=row.name, effect=effect.value, arguments=row.input)
                )
        for row in share.actions(origin):
            name = str(row.payload.get("action", row.node))
            arguments = row.payload.get("parameters")
            repeats.append(Repeat(step=row.path, name=name, effect="once", arguments=arguments))
        return ForkedRun(
            **made.run.model_dump(),
            shared_tasks=sum(not row.hidden for row in share.tasks),
            shared_steps=sum(row.kind != "value" for row in share.steps),
            will_repeat=tuple(repeats),
        )


def _exported(row: Row[Any]) -> JsonObject:
    """A stored task or step without what only its server needs."""
    left_out = {"run_id", "tenant", "owner", "epoch", "lane", "wake_at", *store.NO_USAGE}
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in row._mapping.items()
        if name not in left_out
    }


def _merged(own: Budget | None, asked: Budget) -> Budget:
    before = own.model_dump(exclude_none=True) if own is not None else {}
    return Budget(**(before | asked.model_dump(exclude_none=True)))


def _changed(
    origin: Whole, share: Share, asked: ForkRequest
) -> tuple[RunRequest, JsonObject, JsonObject | None, dict[str, Any]]:
    """What the changes of a fork come to: its request, its root's payload, the task at which it
    starts where that is told something else, and recorded outputs that are changed."""
    fields = dict(origin.run.request)
    for gone in ("start_after", "stream"):
        fields.pop(gone, None)
    task, step = share.point, share.step
    assert task is not None
    if asked.approach is not None and step is not None:
        raise _refused("approach", "can only be changed for a whole task or run, not at a step")
    if step is not None and step.kind == "tool" and asked.input is not None:
        if not isinstance(asked.input, dict):
            raise _refused("input", "must be the tool's arguments, a JSON object")
        if task.kind != "tool":
            outputs = with_arguments(origin, step, asked.input)
            rest = asked.model_copy(update={"input": None})
            request, payload, restart, _ = _changed(origin, share, rest)
            return request, payload, restart, outputs
    if task.path == "":
        return _request(fields, asked), _root_payload(origin, asked), None, {}
    payload = _task_payload(task, asked)
    if payload == task.payload:
        return RunRequest.model_validate(fields), {}, None, {}
    names = ("path", "tenant", "node", "kind", "description", "agent", "hidden")
    restart = {name: getattr(task, name) for name in names}
    restart |= {"payload": payload, "status": "queued", "epoch": 0, "attempts": 0}
    return RunRequest.model_validate(fields), {}, restart, {}


def _request(fields: JsonObject, asked: ForkRequest) -> RunRequest:
    """The run's own request, changed."""
    kinds = {"goal": "goal", "agent": "input", "workflow": "variables"}
    if asked.input is not None:
        fields[next(field for kind, field in kinds.items() if kind in fields)] = asked.input
    for name in ("model", "approach"):
        if getattr(asked, name) is not None:
            fields[name] = getattr(asked, name)
    try:
        return RunRequest.model_validate(fields)
    except ValidationError as error:
        raise _refused("input", f"does not fit: {error.errors()[0]['msg']}") from error


def _root_payload(origin: Whole, asked: ForkRequest) -> JsonObject:
    if asked.instructions is None:
        return {}
    if "agent" not in origin.run.request:
        raise _refused("instructions", "go with an agent: fork from one of the run's agent tasks")
    return {"instructions": asked.instructions}


def _task_payload(task: Row[Any], asked: ForkRequest) -> JsonObject:
    """What the task is told, changed."""
    payload = dict(task.payload)
    fields = {"agent": "input", "tool": "arguments", "action_node": "parameters"}
    if asked.input is not None:
        name = fields.get(task.kind)
        if name is None or (name != "input" and not isinstance(asked.input, dict)):
            raise _refused("input", f"does not fit a task of kind {task.kind!r}")
        payload[name] = asked.input
    for name in ("instructions", "model", "approach"):
        if getattr(asked, name) is not None:
            if task.kind != "agent":
                raise _refused(name, f"cannot be changed for a task of kind {task.kind!r}")
            payload[name] = getattr(asked, name)
    return payload


def _refused(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field!r} {why}.", errors=[FieldError(path=f"/{field}", message=why)])


def dumped(export: RunExport) -> str:
    """The file of an export."""
    return json.dumps(export.model_dump(mode="json"), indent=1, ensure_ascii=True) + "\n"
