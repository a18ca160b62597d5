"""Runs that store nothing: carried out at once, in the caller's own task, and then forgotten.

Leans on the ephemeral journal. Refuses to survive its caller: when the caller goes, the run is
cancelled, since nobody could come back to it.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from agent_server.domain.base import json_text, utcnow
from agent_server.domain.errors import (
    ApprovalUnsupported,
    BudgetExceeded,
    FieldError,
    InvalidRequest,
    error_info,
)
from agent_server.domain.events import (
    EventBase,
    RunBudgetExceeded,
    RunCreated,
    RunFailed,
    RunStarted,
    RunSucceeded,
)
from agent_server.domain.ids import Tenant, new_run_id
from agent_server.domain.runs import Run, RunRequest, RunStatus
from agent_server.execution.ephemeral import EphemeralContext, EphemeralJournal
from agent_server.execution.events import StoredEvent
from agent_server.execution.ports import (
    FinalOutput,
    Handler,
    RunSnapshot,
    SignalReceived,
    Suspend,
)

OnEvent = Callable[[StoredEvent], None]


async def run_unstored(
    request: RunRequest,
    *,
    handlers: Mapping[str, Handler],
    tenant: Tenant,
    principal: str,
    on_event: OnEvent | None,
    deltas: bool = True,
    steers: list[SignalReceived] | None = None,
) -> Run:
    """Carry ``request`` out and return the run at its end. Without ``deltas``, ``on_event`` is
    told of facts alone. ``steers`` is where others put what they say into it.

    Raises ``InvalidRequest`` for what needs a store: a goal, a workflow or a session.
    """
    if request.agent is None or request.session_id is not None or request.start_after is not None:
        raise InvalidRequest(
            "Only a run of an agent, without session_id and start_after, can go unstored.",
            hint="Leave out 'store': false.",
        )
    now = utcnow()
    snapshot = RunSnapshot(
        id=new_run_id(),
        tenant=tenant,
        request=request,
        created_at=now,
        budget=request.budget,
        principal=principal,
    )

    def tell(event: EventBase) -> None:
        if on_event is not None:
            kind: str = event.type  # type: ignore[attr-defined]  # every member has one
            on_event(StoredEvent(event.seq, kind, json_text(event).encode()))

    journal = EphemeralJournal(
        snapshot.id,
        on_event=tell if on_event is not None else None,
        budget=request.budget,
        deltas=deltas,
    )
    journal.emit(RunCreated(kind="agent", name=request.agent))
    journal.emit(RunStarted())
    context = EphemeralContext(snapshot, handlers=handlers, journal=journal, steers=steers)
    status, output, error = RunStatus.SUCCEEDED, None, None
    deadline_s = request.budget.deadline_s if request.budget is not None else None
    try:
        output = await asyncio.wait_for(handlers["run.agent"](context), deadline_s)
    except asyncio.TimeoutError:
        status = RunStatus.BUDGET_EXCEEDED
        error = BudgetExceeded(
            f"The run's deadline of {deadline_s:g} s has passed.",
            hint="Submit the run again with a larger deadline_s.",
            errors=[FieldError(path="/budget/deadline_s", message="passed")],
        ).info()
    except BudgetExceeded as exceeded:
        status, error = RunStatus.BUDGET_EXCEEDED, exceeded.info()
    except Suspend as pause:
        status = RunStatus.FAILED
        error = ApprovalUnsupported(
            f"The run would have to wait ({pause.waiting_for.kind}), and nothing of it is stored.",
            hint="Leave out 'store': false for agents whose tools need approval.",
        ).info()
    except Exception as failure:
        status, error = RunStatus.FAILED, error_info(failure)
    if isinstance(output, FinalOutput):
        output = output.value
    journal.emit(_end(status, output, error, journal))
    return Run(
        id=snapshot.id,
        kind="agent",
        status=status,
        agent=request.agent,
        input=request.input,
        output=output,
        error=error,
        usage=journal.usage,
        budget=request.budget,
        approach=request.approach,
        model=request.model,
        created_at=now,
        started_at=now,
        ended_at=utcnow(),
        metadata=request.metadata,
    )


def _end(status: RunStatus, output: Any, error: Any, journal: EphemeralJournal) -> EventBase:
    if status is RunStatus.SUCCEEDED:
        return RunSucceeded(output=output, usage=journal.usage)
    if status is RunStatus.BUDGET_EXCEEDED:
        return RunBudgetExceeded(error=error, usage=journal.usage)
    return RunFailed(error=error, usage=journal.usage)
