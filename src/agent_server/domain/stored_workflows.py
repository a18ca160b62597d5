"""Workflows that a server keeps, as the API answers them: versions, reports, dry runs, graphs.

Leans on the domain's base and errors. Refuses to know how a definition is checked or drawn: those
live in ``workflow/``.
"""

from datetime import datetime
from typing import Any, Literal, NamedTuple

from pydantic import Field

from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.errors import ErrorInfo, FieldError


class WorkflowVersion(Frozen):
    """One version of a stored workflow. It never changes; a change is a new version."""

    name: str
    version: str
    """What the definition called it, else its number."""
    number: int
    """Counts up with each version of this name, also after the workflow was deleted."""
    latest: bool
    description: str = ""
    created_at: datetime
    created_by: str


class StoredWorkflow(WorkflowVersion):
    """A version with its definition, as it was sent."""

    definition: JsonObject
    etag: str
    """The same as the header's: send it back as ``If-Match`` with a change."""


SaveMode = Literal["create", "add", "put"]
"""``create``: there must be none of that name. ``add``: there must be one. ``put``: either."""


class Saved(NamedTuple):
    """What saving gave. Not ``made``: it was the newest version already."""

    workflow: StoredWorkflow
    made: bool
    replayed: bool = False


class WorkflowReport(Frozen):
    """What is wrong with a definition, all at once."""

    valid: bool
    errors: tuple[FieldError, ...] = ()


class DryRunRequest(Frozen):
    """Which way would a workflow go? Nothing is called; outputs are given, or made up."""

    workflow: str | JsonObject = Field(description="A stored name, or a definition.")
    variables: JsonObject | None = Field(default=None, description="The workflow's inputs.")
    outputs: JsonObject = Field(
        default_factory=dict,
        description="What nodes give, by node id, or by path (`4.2.1`) for one item or iteration. "
        "Others give what fits their `output_schema`, or a text that names them.",
    )
    errors: dict[str, str] = Field(
        default_factory=dict,
        description="Nodes that fail, by id or path, with the error's code, such as `tool_error`.",
    )


class DryRunNode(Frozen):
    """One node on the way that a dry run took, in the order in which they ended."""

    path: str
    node: str
    type: str
    status: Literal["succeeded", "failed", "skipped"]
    input: Any = None
    """What its task would have been told, with every template filled in."""
    output: Any = None
    made_up: bool = False
    """True when nobody said what it gives: ``output`` is a stand-in."""
    reason: str | None = None
    error: ErrorInfo | None = None


class DryRun(Frozen):
    """The way a workflow would go."""

    status: Literal["succeeded", "failed"]
    output: Any = None
    error: ErrorInfo | None = None
    nodes: tuple[DryRunNode, ...]


class GraphNode(Frozen):
    id: str
    type: str
    label: str
    """What it does, in a few words."""
    inside: str | None = None
    """The node it stands in."""
    lane: int = 0
    """The branch, case (``else`` is the last) or body of ``inside`` that it stands in."""
    status: str | None = None
    """In a run: how far it is. Of several items or iterations, the most telling one."""
    count: int = 0
    """In a run: how many times it was carried out or skipped."""


class GraphEdge(Frozen):
    source: str
    target: str
    kind: Literal["then", "error", "undo", "case", "again"] = "then"
    """``then``: waits for it. ``case``: from a branch to the way's first nodes. ``again``: a
    loop's way back. ``error``: where ``on_error`` goes. ``undo``: what its ``compensate`` runs."""
    label: str = ""


class WorkflowGraph(Frozen):
    """A definition as nodes and edges, and as Mermaid text."""

    name: str
    version: str | None = None
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]
    mermaid: str
