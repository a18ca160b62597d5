"""The graph that people write and planners make: a workflow's definition and its nodes.

Leans on the domain's base and on plans (for their triggers). Refuses to know how a graph is
checked, what an expression means and how nodes are carried out: those live in ``workflow/``,
and ``docs/workflows.md`` tells users what each node does.

Nodes of a list run one after another. When any node of the list names ``depends_on`` (an empty
list counts), the list is a graph: each node waits for what it names, and one that names nothing
waits only for the nodes whose results it uses. Strings may hold ``{{ … }}`` templates where a
field says *template*; ``when``, ``while``, ``until`` and ``over`` are expressions themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.plans import PlanAction

MAX_DEPTH = 12
"""How deep nodes may stand inside nodes."""
MAX_NODES = 5_000
"""How many nodes one definition may hold, inner ones included."""
MAX_ITERATIONS = 10_000
"""The highest bound a loop may name."""
MAX_JSON_DEPTH = 64
MAX_WAIT_S = 366 * 86_400
"""The longest time that a node may be given or may wait."""

NodeId = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=100)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=100)]
Text = Annotated[str, Field(max_length=200)]


class Retry(Frozen):
    """How often a node that failed is tried, and how long to wait in between."""

    max_attempts: int = Field(default=3, ge=1, le=20)
    """The first attempt included."""
    backoff_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds before the second attempt."""
    factor: float = Field(default=2.0, ge=1, le=10)
    """Each further wait is this many times the one before."""
    max_backoff_s: float = Field(default=300.0, ge=0, le=3600)
    on: tuple[Text, ...] = ()
    """Error codes worth another attempt; none named means every code that a repeat may mend."""

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait before ``attempt`` (the second is 2)."""
        return float(min(self.backoff_s * self.factor ** max(attempt - 2, 0), self.max_backoff_s))


class NodeFields(Frozen):
    """What every node has."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True
    )

    id: NodeId
    description: str = Field(default="", max_length=10_000)
    depends_on: tuple[str, ...] | None = None
    """Ids of nodes of the same list; None follows the list's rule."""
    when: str | None = None
    """Expression; false skips the node. Nodes that depend on it run nevertheless."""
    output: Name | None = None
    """The variable that takes the node's output when it has succeeded."""
    retry: Retry | None = None
    timeout_s: float | None = Field(default=None, gt=0, le=MAX_WAIT_S)
    """Seconds one attempt may take, from the moment it begins to be carried out."""
    on_error: str = Field(default="fail", max_length=100)
    """``fail``; ``continue``: the node counts as ended, with ``.status == "failed"`` and output
    null; or the id of a later node of the same list: what depends on this node and is not behind
    that one is skipped. A node that some ``on_error`` names runs only when it is gone to."""
    compensate: tuple[Node, ...] = ()
    """What undoes the node, one after another: carried out when the run, or the part of it that the
    node stands in, fails, is cancelled or loses, if the node has succeeded, or may have (its time was
    up, or it was broken off: its ``.status`` is ``unknown`` then), the last node's first. It sees
    what the node saw, and its own result."""


class AgentNode(NodeFields):
    """One agent works on ``input``."""

    type: Literal["agent"] = "agent"
    agent: str
    input: Any
    """Template: a text, a list of input items, or any JSON, which becomes text."""
    output_schema: JsonObject | None = None
    """JSON Schema that the result must satisfy; it is then JSON, not text."""
    approach: str | None = None
    model: str | None = None
    tools: tuple[str, ...] | None = None
    """Names of further tools for this task; None adds nothing."""
    context: JsonObject = Field(default_factory=dict)
    """Template: what the agent should know besides its input."""


class ApproachNode(NodeFields):
    """A reasoning approach works on ``input``, with no agent of the user's, or with one."""

    type: Literal["approach"] = "approach"
    approach: str
    input: Any
    agent: str | None = None
    output_schema: JsonObject | None = None
    model: str | None = None
    tools: tuple[str, ...] | None = None
    context: JsonObject = Field(default_factory=dict)


class PlanNode(NodeFields):
    """The planner makes the rest from a goal, and it is carried out. Output: the answer."""

    type: Literal["plan"] = "plan"
    goal: str = Field(min_length=1, max_length=100_000)
    """Template."""
    role: str | None = Field(default=None, max_length=10_000)
    input: Any = None
    """Template: what the plan may work with besides its goal."""
    output_schema: JsonObject | None = None
    """JSON Schema that the answer must satisfy."""
    agents: tuple[str, ...] | None = None
    """The only agents that the plan may use; None offers all."""
    tools: tuple[str, ...] | None = None
    """The only tools that the plan may use; None offers all."""
    approach: str | None = None
    model: str | None = None


class ToolNode(NodeFields):
    """One call of a tool."""

    type: Literal["tool"] = "tool"
    tool: str
    arguments: JsonObject = Field(default_factory=dict)
    """Template."""


class ActionNode(NodeFields):
    """One action touches the world."""

    type: Literal["action"] = "action"
    action: str
    parameters: JsonObject = Field(default_factory=dict)
    """Template."""


class WorkflowNode(NodeFields):
    """Another workflow, as a task of its own. Output: what that workflow gives."""

    type: Literal["workflow"] = "workflow"
    workflow: str | JsonObject
    """A stored workflow's name (``name`` or ``name@version``), or a definition inline."""
    version: str | int | None = None
    """The version of the stored workflow; None takes the newest there is when the node begins."""
    input: JsonObject = Field(default_factory=dict)
    """Template: the other workflow's inputs."""


class WaitNode(NodeFields):
    """Stands still, and takes no worker meanwhile. Exactly one of the first three fields.

    Output: a signal's payload; else the moment (RFC 3339) until which it waited.
    """

    type: Literal["wait"] = "wait"
    duration_s: float | str | None = None
    """Seconds, at least 0; or an expression that gives them."""
    until: str | None = None
    """Template: an RFC 3339 moment; one that has passed does not wait."""
    signal: str | None = Field(default=None, min_length=1, max_length=200)
    """Template: the name under which ``POST /runs/{id}/signals/{name}`` wakes it. After
    ``timeout_s`` without one the node fails with ``task_timeout``."""

    @model_validator(mode="after")
    def _one_wait(self) -> WaitNode:
        given = [self.duration_s, self.until, self.signal]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of 'duration_s', 'until' and 'signal'")
        if isinstance(self.duration_s, float) and not 0 <= self.duration_s <= MAX_WAIT_S:
            raise ValueError(f"'duration_s' must be from 0 to {MAX_WAIT_S}")
        return self


class ApprovalNode(NodeFields):
    """A person decides. Output: ``{approved, decision, reason, by, input}``."""

    type: Literal["approval"] = "approval"
    subject: str = Field(min_length=1, max_length=2_000)
    """Template: what is asked."""
    input: Any = None
    """Template: what the decision is about; whoever approves may change it."""
    expires_s: float | None = Field(default=None, gt=0, le=MAX_WAIT_S)
    """Seconds after which nobody has decided; None waits for ever."""
    on_expiry: Literal["reject", "fail", "approve"] = "reject"
    on_reject: Literal["fail", "continue"] = "fail"
    """``continue``: the node succeeds with ``approved: false``."""
    approvers: tuple[str, ...] | None = None
    """Principals who may decide; None lets everybody who may approve at all."""


class SetNode(NodeFields):
    """Writes variables, all at once, from the values they had before. Output: what it wrote.

    A node sees what was written by the nodes it comes after, never what runs beside it. Where
    branches that ran side by side wrote the same variable, the later one in the list counts.
    """

    type: Literal["set"] = "set"
    variables: dict[Name, Any] = Field(min_length=1)
    """Template."""


class ParallelNode(NodeFields):
    """Branches side by side.

    Output: the outputs of the branches' last nodes, in the branches' order; of ``any``, the one
    winner's; of ``first``, the winners' in the order in which they came. A branch that fails
    wins nothing; the node fails when too few are left. Losers are cancelled, and what they wrote
    does not count.
    """

    type: Literal["parallel"] = "parallel"
    branches: tuple[Annotated[tuple[Node, ...], Field(min_length=1)], ...] = Field(min_length=1)
    join: Literal["all", "any"] = "all"
    first: int | None = Field(default=None, ge=1)
    """Go on with the first so many branches that succeed; instead of ``join``."""
    max_parallel: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_join(self) -> ParallelNode:
        if self.first is not None and self.join != "all":
            raise ValueError("give 'first' or 'join', not both")
        if self.first is not None and self.first > len(self.branches):
            raise ValueError(f"'first' is {self.first}, of {len(self.branches)} branches")
        return self

    @property
    def wanted(self) -> int | None:
        """How many branches must succeed before the others are cancelled; None waits for all."""
        return 1 if self.join == "any" else self.first


class Case(Frozen):
    """One way of a branch."""

    when: str
    nodes: tuple[Node, ...] = Field(min_length=1)


class BranchNode(NodeFields):
    """The first case whose ``when`` is true, or ``else``. Output: that of its last node.

    With ``choose: all`` every case whose ``when`` is true, side by side; ``else`` when none is.
    Output: a list, one entry for each way taken, in the cases' order.
    """

    type: Literal["branch"] = "branch"
    choose: Literal["first", "all"] = "first"
    cases: tuple[Case, ...] = Field(min_length=1)
    otherwise: tuple[Node, ...] = Field(default=(), alias="else")


class MapNode(NodeFields):
    """The nodes once for each item. Output: the last nodes' outputs, in the items' order.

    ``nodes.<id>.failures`` lists what failed: ``{index, error}``.
    """

    type: Literal["map"] = "map"
    over: str | tuple[Any, ...]
    """Expression that gives a list, or a list (template)."""
    name: Name = Field(default="item", alias="as")
    """How expressions inside call the item; ``index`` counts from 0."""
    max_parallel: int | None = Field(default=None, ge=1)
    on_item_error: Literal["fail", "continue", "drop"] = "fail"
    """``fail``: the first item in the order that fails decides, and later ones are broken off.
    ``continue`` gives null for an item that failed, ``drop`` leaves it out; every item is run."""
    max_failures: int | None = Field(default=None, ge=0)
    """With ``continue`` or ``drop``: the map fails when more items than this have failed."""
    nodes: tuple[Node, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _tolerant(self) -> MapNode:
        if self.max_failures is not None and self.on_item_error == "fail":
            raise ValueError("'max_failures' needs 'on_item_error': 'continue' or 'drop'")
        return self


class LoopNode(NodeFields):
    """The nodes again and again. Output: the last node's output in the last iteration.

    ``iteration`` counts from 1. ``while`` is asked before each iteration, ``until`` after it.
    Inside, an expression may name a node that comes later: it sees the previous iteration's
    result, and ``status == "pending"`` in the first. A loop that would go on after
    ``max_iterations`` fails with ``loop_bound``.
    """

    type: Literal["loop"] = "loop"
    condition: str | None = Field(default=None, alias="while")
    until: str | None = None
    max_iterations: int = Field(ge=1, le=MAX_ITERATIONS)
    nodes: tuple[Node, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_condition(self) -> LoopNode:
        if (self.condition is None) == (self.until is None):
            raise ValueError("give exactly one of 'while' and 'until'")
        return self


Node = Annotated[
    AgentNode
    | ToolNode
    | ParallelNode
    | BranchNode
    | MapNode
    | LoopNode
    | SetNode
    | ApproachNode
    | ActionNode
    | WorkflowNode
    | WaitNode
    | ApprovalNode
    | PlanNode,
    Field(discriminator="type"),
]

LEAF_TYPES = (
    AgentNode,
    ToolNode,
    ApproachNode,
    ActionNode,
    WorkflowNode,
    WaitNode,
    ApprovalNode,
    PlanNode,
)
"""Nodes that run as tasks of their own; the rest is recomputed on replay."""
NODE_MODELS: Mapping[str, type[NodeFields]] = {
    model.model_fields["type"].default: model
    for model in (*LEAF_TYPES, SetNode, ParallelNode, BranchNode, MapNode, LoopNode)
}
NODE_TYPES = frozenset(NODE_MODELS)


class WorkflowDefinition(Frozen):
    """A graph, what it takes, and what it gives."""

    name: str = Field(min_length=1, max_length=200)
    version: str | int | None = None
    description: str = Field(default="", max_length=10_000)
    inputs: JsonObject | None = None
    """JSON Schema of an object; None takes any object."""
    variables: dict[Name, Any] = Field(default_factory=dict)
    """The variables' first values. Template over ``inputs``."""
    nodes: tuple[Node, ...] = Field(min_length=1)
    output: Any = None
    """Template; None gives the output of the last node."""
    max_parallel: int | None = Field(default=None, ge=1)
    """Tasks of one run at the same time; the server's own limit holds as well."""
    actions: tuple[PlanAction, ...] = ()
    """What happens when something happened, as in a plan."""
    workflows: dict[str, JsonObject] = Field(default_factory=dict)
    """Definitions that ``workflow`` nodes name, here and inside them, by ``name`` or
    ``name@version``; only the outermost definition of a run has them. The server writes down here
    what a run needs of the stored ones when it is submitted."""

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, data: Any) -> Any:
        problem = size_problem(data)
        if problem:
            raise ValueError(problem)
        return data


_MODELS: tuple[type[Frozen], ...] = (*NODE_MODELS.values(), Case, WorkflowDefinition)
for _model in _MODELS:
    _model.model_rebuild()


def lists_of(node: Node) -> tuple[tuple[Node, ...], ...]:
    """The lists of nodes inside ``node``, in order: branches; cases, then else; a body.

    What compensates it is not among them: it does not belong to the way forward.
    """
    if isinstance(node, ParallelNode):
        return node.branches
    if isinstance(node, BranchNode):
        return (*(case.nodes for case in node.cases), node.otherwise)
    if isinstance(node, (MapNode, LoopNode)):
        return (node.nodes,)
    return ()


def walk(nodes: tuple[Node, ...]) -> Iterator[Node]:
    """Every node, each before the ones inside it and before what compensates it."""
    for node in nodes:
        yield node
        for inner in (*lists_of(node), node.compensate):
            yield from walk(inner)


def size_problem(data: Any) -> str | None:
    """What is too deep or too many in a definition's JSON; looked at before it is read."""
    todo: list[tuple[Any, int, int]] = [(data, 0, 0)]
    found = 0
    while todo:
        value, depth, nested = todo.pop()
        if depth > MAX_JSON_DEPTH:
            return f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels"
        if isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind in NODE_TYPES and "id" in value:
                found += 1
                nested += 1
            if found > MAX_NODES:
                return f"more than {MAX_NODES} nodes"
            if nested > MAX_DEPTH:
                return f"nodes stand inside nodes deeper than {MAX_DEPTH} levels"
            todo.extend((item, depth + 1, nested) for item in value.values())
        elif isinstance(value, (list, tuple)):
            todo.extend((item, depth + 1, nested) for item in value)
    return None
