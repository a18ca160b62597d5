"""Approvals: what a person is asked to consent to, and what was decided.

Leans on the domain's base. Refuses to know who asks, and what happens after.
"""

from __future__ import annotations

import json
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal

from pydantic import Field

from agent_server.domain.base import Frozen

ApprovalStatus = Literal["pending", "approved", "rejected", "expired", "replaced", "withdrawn"]
OnExpiry = Literal["reject", "fail", "approve"]


def arguments_hash(arguments: Any) -> str:
    """SHA-256, in hexadecimal, of the JSON value ``arguments``: keys sorted, no spaces, ASCII."""
    text = json.dumps(arguments, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


class Approval(Frozen):
    """One question to a person, decided at most once."""

    id: str
    run_id: str
    task_id: str | None = None
    step: str
    """The key of the call, or of the workflow's node, that waits."""
    status: ApprovalStatus
    """``replaced``: somebody approved other arguments, see ``replaced_by``. ``withdrawn``: its
    run ended first."""
    subject: str
    """The tool's name, or the node's id."""
    agent: str | None = None
    arguments: Any = None
    arguments_hash: str
    """SHA-256 of exactly the arguments that are consented to."""
    detail: str = ""
    approvers: tuple[str, ...] | None = None
    """Who may decide, by name; null: whoever may see the run."""
    on_expiry: OnExpiry = "reject"
    requested_at: datetime
    expires_at: datetime | None = None
    decided_at: datetime | None = None
    decided_by: str | None = None
    reason: str | None = None
    replaces: str | None = None
    replaced_by: str | None = None


class Decide(Frozen):
    """The body of ``POST /api/v1/approvals/{id}``."""

    decision: Literal["approve", "reject"]
    reason: str = Field(default="", max_length=10_000, description="Told to the model.")
    arguments: Any = Field(
        default=None,
        description="With `approve`: the arguments to call with instead. They make a new approval.",
    )
    arguments_hash: str | None = Field(
        default=None,
        max_length=64,
        description="What you were shown: refused with 409 where it is not what is asked about.",
    )
