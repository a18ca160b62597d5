"""A new run as it is stored: its row, its hidden root task and its first events, in one place.

Leans on the store. Runs inside the caller's transaction; refuses to decide whether the run may
begin and who carries it out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from agent_server.domain.base import JsonObject
from agent_server.domain.events import RunCreated, RunStarted
from agent_server.domain.ids import RunId, Tenant
from agent_server.domain.runs import Run, RunRequest, RunStatus
from agent_server.execution import store
from agent_server.execution.attempts import root_kind
from agent_server.execution.events import StoredEvent, splice_seq
from agent_server.storage.references import belonging


@dataclass(frozen=True)
class Origin:
    """What a new run brings along from the run ``run_id`` that it is made from."""

    run_id: str
    payload: JsonObject
    """Of its root task."""
    events: Callable[[str], list[tuple[str, str]]]
    """For the new run's id: type and JSON of what is said of the shared part."""
    write: Callable[[Connection, str], None]
    """Stores the shared part under the new run's id."""


@dataclass(frozen=True)
class NewRun:
    """A run that was submitted at ``now`` and is not stored yet."""

    id: RunId
    tenant: Tenant
    principal: str
    request: RunRequest
    now: datetime
    origin: Origin | None = None
    continues: str | None = None
    """The run whose words it is given."""

    @property
    def forked_from(self) -> RunId | None:
        return RunId(self.origin.run_id) if self.origin is not None else None

    @property
    def payload(self) -> JsonObject:
        return self.origin.payload if self.origin is not None else {}

    @property
    def later(self) -> bool:
        """It is not to begin yet."""
        return self.request.start_after is not None and self.request.start_after > self.now

    @property
    def lane(self) -> str | None:
        """What only one run at a time works on."""
        return store.lane_of(self.tenant, self.request.session_id)

    @property
    def workflow(self) -> str | None:
        """The name of the workflow that it is of."""
        given = self.request.workflow
        if isinstance(given, dict):
            return str(given.get("name", "inline"))[:200]
        return given

    def shown(self, started: bool) -> Run:
        """The run as its submitter is answered."""
        request = self.request
        return Run(
            id=self.id,
            kind=request.kind,
            status=RunStatus.RUNNING if started else RunStatus.QUEUED,
            goal=request.goal,
            agent=request.agent,
            workflow=self.workflow,
            workflow_version=request.workflow_version,
            input=request.input if request.agent is not None else request.variables,
            budget=request.budget,
            session_id=request.session_id,
            approach=request.approach,
            model=request.model,
            priority=request.priority,
            forked_from=self.forked_from,
            created_at=self.now,
            started_at=self.now if started else None,
            metadata=request.metadata,
        )

    def insert(
        self, connection: Connection, owner: str | None, *, behind: bool
    ) -> list[StoredEvent]:
        """Store it, queued or, with ``owner``, as carried out there (epoch 1), and answer its
        first events. ``behind``: another run goes before it on its lane; one that is to begin
        later enters the lane then.
        """
        with belonging(self.id):
            encoded = self._insert(connection, owner, behind)
        return [
            StoredEvent(seq, kind, splice_seq(seq, data))
            for seq, (kind, data) in enumerate(encoded, 1)
        ]

    def _insert(
        self, connection: Connection, owner: str | None, behind: bool
    ) -> list[tuple[str, str]]:
        request, now, started = self.request, self.now, owner is not None
        name = request.goal or request.agent or self.workflow or ""
        created = RunCreated(kind=request.kind, name=name, at=now)
        encoded = [store.encode_event(store.stamped(created, self.id, None))]
        if self.origin is not None:
            encoded += self.origin.events(self.id)
        if started:
            began = RunStarted(attempt=1, at=now)
            encoded.append(store.encode_event(store.stamped(began, self.id, None)))
        status = "running" if started else "queued"
        both: dict[str, Any] = {
            "tenant": self.tenant,
            "status": status,
            "created_at": now,
            "started_at": now if started else None,
        }
        store.insert_run(
            connection,
            {
                **both,
                "id": self.id,
                "kind": request.kind,
                "name": name,
                "request": request.model_dump(mode="json", exclude_defaults=True),
                "agent": request.agent,
                "workflow": self.workflow,
                "session_id": request.session_id,
                "principal": self.principal,
                "forked_from": self.forked_from,
                "continues": self.continues,
                "last_seq": len(encoded),
            },
        )
        store.insert_task(
            connection,
            {
                **both,
                "run_id": self.id,
                "path": "",
                "node": "",
                "kind": root_kind(request),
                "payload": self.payload,
                "hidden": True,
                "owner": owner,
                "epoch": 1 if started else 0,
                "attempts": 1 if started else 0,
                "wake_at": request.start_after if self.later else None,
                "lane": self.lane,
                "behind": behind or (self.later and self.lane is not None),
                "rank": -request.priority,
            },
        )
        if self.origin is not None:
            self.origin.write(connection, self.id)
        store.insert_events(connection, self.tenant, self.id, 1, encoded)
        return encoded
