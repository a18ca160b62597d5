"""What is served: agents, tools and the policy that the operator sets for them.

Leans on the domain's base. Refuses to know the Agents SDK: these are descriptions, not objects.
"""

from collections.abc import Collection
from enum import Enum
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, model_validator

from agent_server.domain.approvals import OnExpiry
from agent_server.domain.base import Frozen, JsonObject


class ToolEffect(str, Enum):
    """What calling a tool twice would do; decides what a crash in mid-call leads to."""

    NONE = "none"
    """Only reads: may be repeated freely."""
    IDEMPOTENT = "idempotent"
    """May be repeated with the same arguments."""
    ONCE = "once"
    """Must not be repeated silently: in doubt after a crash, the run waits for a decision."""

    @property
    def repeatable(self) -> bool:
        return self is not ToolEffect.ONCE


class ApprovalTerms(Frozen):
    """How a person's consent to a tool's calls is asked for."""

    expires_s: float | None = Field(default=None, gt=0, le=10 * 365 * 86_400)
    """Seconds until nobody can decide any more; None: no end."""
    on_expiry: OnExpiry = "reject"
    approvers: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The names of those who may decide; None: whoever may see the run."""


class ApprovalRule(ApprovalTerms):
    """One ``[[approvals]]`` of ``agent-server.toml``: whose calls of which tools are held."""

    tools: tuple[str, ...] = ()
    """Names of tools, with ``*`` and ``?``."""
    tags: tuple[str, ...] = ()
    """Any of these tags is enough."""
    agents: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Only calls by these agents; None: by anybody, plans and workflows included."""

    @model_validator(mode="after")
    def _of_something(self) -> "ApprovalRule":
        if not self.tools and not self.tags:
            raise ValueError("name 'tools' or 'tags'; for every tool write tools = [\"*\"]")
        return self

    def covers(self, tool: str, tags: Collection[str]) -> bool:
        """Whether it is about that tool."""
        named = any(fnmatchcase(tool, pattern) for pattern in self.tools)
        return named or not set(tags).isdisjoint(self.tags)


class ToolPolicy(Frozen):
    """One tool's entry in ``agent-server.toml``."""

    effect: ToolEffect | None = None
    approval: bool | ApprovalTerms | None = None
    timeout_s: float | None = Field(default=None, gt=0)
    reconcile: str | None = Field(default=None, min_length=1)
    """The name of a served tool that says how a call in doubt went."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Calls of it at once, over all nodes."""
    tags: tuple[str, ...] = ()


class AgentPolicy(Frozen):
    """One agent's entry in ``agent-server.toml``."""

    approach: str | None = None
    budget: JsonObject | None = None
    description: str | None = None
    max_concurrent: int | None = Field(default=None, ge=1)
    """Tasks that it carries out at once, over all nodes."""


class ToolInfo(Frozen):
    """A tool as the API lists it."""

    name: str
    description: str = ""
    parameters: JsonObject = Field(default_factory=dict)
    effect: ToolEffect = ToolEffect.ONCE
    approval: bool = False
    timeout_s: float | None = None
    source: Literal["builtin", "file", "mcp"] = "file"
    tags: tuple[str, ...] = ()
    """By which approval policies may name it."""


class AgentInfo(Frozen):
    """An agent as the API lists it."""

    name: str
    """The slug by which runs name it."""
    title: str
    """The SDK name, unchanged."""
    description: str = ""
    model: str | None = None
    tools: tuple[str, ...] = ()
    handoffs: tuple[str, ...] = ()
    mcp_servers: tuple[str, ...] = ()
    output_schema: JsonObject | None = None
    approach: str | None = None
    source: str = ""
    """``file:line``-less place: the path or module the agent came from."""


class LoadError(Frozen):
    """Why a file's agents are not served, or why an older version still is."""

    source: str
    line: int | None = None
    message: str
    serving_last_good: bool = False
