"""Approvals, seen from a client: the inbox, and deciding.

Leans on the domain and on one exchange at a time. Refuses to decide twice: the server answers a
second decision with ``Conflict``.
"""

from typing import Any, Literal

import httpx2

from agent_server.client.http import exchange
from agent_server.client.runs import Page
from agent_server.domain.approvals import Approval, Decide

PATH = "/api/v1/approvals"


class ApprovalsClient:
    """``/api/v1/approvals``. Got as ``AgentServerClient.approvals``."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def list(
        self, *, limit: int | None = None, cursor: str | None = None, **filters: Any
    ) -> Page[Approval]:
        """One page of approvals, newest first; ``status="pending"`` is the inbox."""
        params = {"limit": limit, "cursor": cursor, **filters}
        answer = await exchange(self._http, "GET", PATH, params=params)
        found = [Approval.model_validate(row) for row in answer["data"]]
        return Page(found, answer.get("next_cursor"))

    async def get(self, approval_id: str) -> Approval:
        """One approval. Raises ``NotFound``."""
        return Approval.model_validate(await exchange(self._http, "GET", f"{PATH}/{approval_id}"))

    async def decide(
        self, approval_id: str, decision: Literal["approve", "reject"], **more: Any
    ) -> Approval:
        """Approve or reject, perhaps with a ``reason``, or with other ``arguments``."""
        asked = Decide(decision=decision, **more)
        body = asked.model_dump(mode="json", exclude_unset=True)
        return Approval.model_validate(
            await exchange(self._http, "POST", f"{PATH}/{approval_id}", json=body)
        )
