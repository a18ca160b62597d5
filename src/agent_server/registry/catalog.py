"""The catalog: an immutable picture of what is served, and what the operator says about it.

Leans on the SDK's ``Agent`` and ``FunctionTool``, which it hands out unchanged. Refuses to know
files: the registry makes a new catalog when one changes, and whoever holds the old keeps it.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import structlog
from agents import Agent, AgentOutputSchema, AgentOutputSchemaBase, FunctionTool, Handoff

from agent_server.domain.agents import (
    AgentInfo,
    AgentPolicy,
    ApprovalTerms,
    LoadError,
    ToolEffect,
    ToolInfo,
    ToolPolicy,
)
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import UnknownAgent, UnknownTool
from agent_server.domain.runs import Budget, Limits, RunRequest
from agent_server.inference.tags import tags_of
from agent_server.registry.builtin_tools import BUILTIN_TOOLS
from agent_server.registry.consolidation_tools import CONSOLIDATION_TOOLS
from agent_server.registry.mcp_servers import effect_of_annotations, reachable_agents
from agent_server.registry.memory_tools import MEMORY_TOOLS, WRITING
from agent_server.registry.policies import Policies
from agent_server.registry.slugs import slug

log = structlog.get_logger("agent_server.registry")

_NO_TOOL_POLICY = ToolPolicy()
_NO_AGENT_POLICY = AgentPolicy()
SERVED_TOOLS = (*BUILTIN_TOOLS, *MEMORY_TOOLS, *CONSOLIDATION_TOOLS)
"""What the server itself brings."""
_UNLISTED = frozenset(tool.name for tool in CONSOLIDATION_TOOLS)
_BUILTIN_IDS = frozenset(id(tool) for tool in SERVED_TOOLS)


@dataclass(frozen=True)
class Catalog:
    """What is served. ``version`` grows by one with every reload; 0 is before the first load."""

    agents: Mapping[str, Agent[Any]] = field(default_factory=lambda: MappingProxyType({}))
    """By slug, in the order of the sources."""
    tools: Mapping[str, FunctionTool] = field(default_factory=lambda: MappingProxyType({}))
    """What plans and workflows may call, by tool name: built in, and module-level in a file."""
    places: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """An agent's slug to the file or module it came from."""
    foreign: frozenset[str] = frozenset()
    """Names that tools inside agents have and that are not the server's own."""
    errors: tuple[LoadError, ...] = ()
    policies: Policies = Policies()
    version: int = 0

    def agent(self, name: str) -> Agent[Any]:
        """The agent of this slug or exact SDK name. Raises ``UnknownAgent`` with the nearest."""
        found = self.agents.get(name) or self.agents.get(slug(name))
        if found is None or (name != found.name and name not in self.agents):
            raise UnknownAgent(
                f"There is no agent {name!r}.",
                hint=_nearest(name, self.agents, "agents", "Set AGENT_SERVER_AGENTS to a file."),
            )
        return found

    def tool(self, name: str) -> FunctionTool:
        """The tool of this name. Raises ``UnknownTool`` with the nearest."""
        found = self.tools.get(name)
        if found is None:
            raise UnknownTool(
                f"There is no tool {name!r}.",
                hint=_nearest(name, self.tools, "tools", "Define a function tool in a file."),
            )
        return found

    def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
        """What calling the tool of this name twice would do: by policy, else by the hints that an
        MCP server gave (``read_only``, ``idempotent``), else ``once``; a built-in one only reads,
        or may be repeated.
        """
        policy = self.tool_policy(tool)
        if policy.effect is not None:
            return policy.effect
        if annotations is not None:
            return effect_of_annotations(SimpleNamespace(**_hints(annotations))) or ToolEffect.ONCE
        served = self.tools.get(tool)
        builtin = id(served) in _BUILTIN_IDS and tool not in self.foreign
        return WRITING.get(tool, ToolEffect.NONE) if builtin else ToolEffect.ONCE

    def timeout_s(self, tool: str) -> float | None:
        """Seconds by policy; None where it says nothing."""
        return self.tool_policy(tool).timeout_s

    def max_concurrent(self, tool: str | None = None, agent: str | None = None) -> int | None:
        """How many calls of the tool, or tasks of the agent, may be at once; None: any."""
        policy = self.tool_policy(tool) if tool is not None else self.agent_policy(agent or "")
        return policy.max_concurrent

    def reconciler(self, tool: str) -> FunctionTool | None:
        """The served tool that the policy names to say how a call of ``tool`` in doubt went."""
        return self.tools.get(self.tool_policy(tool).reconcile or "")

    def approval(
        self, tool: str, tags: frozenset[str] = frozenset(), agent: str | None = None
    ) -> ApprovalTerms | None:
        """How the policy asks for approval of a call of ``tool`` by ``agent`` (``"*"``: by any; None:
        by a plan or a workflow itself), if it does: by the tool's own entry, else by the first rule.

        It adds to a tool's own ``needs_approval`` and cannot lift it: what the author held back
        stays held."""
        policy = self.tool_policy(tool)
        if isinstance(policy.approval, ApprovalTerms):
            return policy.approval
        if policy.approval is not None:
            return ApprovalTerms() if policy.approval else None
        for rule in self.policies.approvals:
            among = rule.agents is None or agent == "*"
            if agent is not None and rule.agents is not None:
                among = among or slug(agent) in map(slug, rule.agents)
            if among and rule.covers(tool, tags.union(policy.tags)):
                return rule
        return None

    def tool_policy(self, name: str) -> ToolPolicy:
        return self.policies.tools.get(name, _NO_TOOL_POLICY)

    def agent_policy(self, name: str) -> AgentPolicy:
        """The policy of the agent of this slug or SDK name; an empty one where none is set."""
        for written, policy in self.policies.agents.items():
            if name == written or slug(name) == slug(written):
                return policy
        return _NO_AGENT_POLICY

    def limits(self, tenant: str, key: str) -> dict[str, Limits]:
        """What the policy sets for runs of that key (its name) and of that tenant, in this order,
        by where it stands."""
        found = {
            f"[limits.keys.{key}]": self.policies.keys.get(key),
            f"[limits.tenants.{tenant}]": self.policies.tenants.get(tenant),
        }
        return {f"{where} in agent-server.toml": one for where, one in found.items() if one}

    def agent_budget(self, name: str) -> Budget | None:
        """The budget that the agent's policy sets for its runs."""
        given = self.agent_policy(name).budget
        return None if given is None else Budget.model_validate(given)

    def describe_agents(self) -> list[AgentInfo]:
        """Every agent as the API lists it."""
        return [self.describe_agent(name) for name in self.agents]

    def describe_agent(self, name: str) -> AgentInfo:
        """One agent, by slug or SDK name. Raises ``UnknownAgent``."""
        agent = self.agent(name)
        key = slug(agent.name)
        policy = self.agent_policy(key)
        handoffs = (h.agent_name if isinstance(h, Handoff) else h.name for h in agent.handoffs)
        return AgentInfo(
            name=key,
            title=agent.name,
            description=policy.description or agent.handoff_description or "",
            model=_model_name(agent.model),
            tools=tuple(tool.name for tool in agent.tools),
            handoffs=tuple(slug(handoff) for handoff in handoffs),
            mcp_servers=tuple(server.name for server in agent.mcp_servers),
            output_schema=_output_schema(agent),
            approach=policy.approach,
            source=self.places.get(key, ""),
        )

    def models_of(self, request: RunRequest, default: str) -> set[str]:
        """The names of the models that the run may use, as far as its request says: those of its
        agents, of what they hand off to, and ``default`` for whoever names none."""
        default = request.model or default
        names = set(request.agents or (self.agents if request.goal is not None else ()))
        names |= {request.agent} if request.agent is not None else set()
        found = {default} if request.goal is not None else set()
        for key, value in _fields(request.workflow):
            if key == "agent":
                names.add(value)
            elif key == "model":
                found.add(value)
            elif key == "type" and value in ("agent", "approach"):
                found.add(default)
        for name in names & self.agents.keys():
            for agent in reachable_agents(self.agents[name]):
                found.add(_model_name(agent.model) or default)
        return found

    def describe_tools(self) -> list[ToolInfo]:
        """Every tool that plans and workflows may call, by name; not those of the server's own
        workflows."""
        listed = sorted(set(self.tools) - _UNLISTED)
        return [self._describe(self.tools[name]) for name in listed]

    def _describe(self, tool: FunctionTool) -> ToolInfo:
        return ToolInfo(
            name=tool.name,
            description=tool.description,
            parameters=tool.params_json_schema,
            effect=self.effect(tool.name),
            approval=bool(tool.needs_approval)
            or self.approval(tool.name, tags_of(tool), "*") is not None,
            tags=tuple(sorted(tags_of(tool).union(self.tool_policy(tool.name).tags))),
            timeout_s=self.timeout_s(tool.name),
            source="builtin" if id(tool) in _BUILTIN_IDS else "file",
        )


def foreign_names(agents: Iterable[Agent[Any]]) -> frozenset[str]:
    """The names of these agents' tools that are not built in."""
    everyone = (other for agent in agents for other in reachable_agents(agent))
    tools = (tool for agent in everyone for tool in agent.tools)
    return frozenset(tool.name for tool in tools if id(tool) not in _BUILTIN_IDS)


def _fields(value: Any) -> Iterator[tuple[str, str]]:
    """Each field of a definition that holds a text, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield key, item
            yield from _fields(item)
    elif isinstance(value, list):
        for item in value:
            yield from _fields(item)


def _hints(annotations: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "read_only_hint": annotations.get("read_only"),
        "idempotent_hint": annotations.get("idempotent"),
    }


def _nearest(name: str, known: Mapping[str, object], what: str, if_none: str) -> str:
    if not known:
        return f"No {what} are served. {if_none}"
    near = difflib.get_close_matches(slug(name) if what == "agents" else name, known, n=3)
    listed = ", ".join(sorted(known)[:50])
    meant = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{meant}The {what} are: {listed}."


def _model_name(model: object) -> str | None:
    if model is None or isinstance(model, str):
        return model
    name = getattr(model, "model", None)
    return name if isinstance(name, str) else type(model).__name__


def _output_schema(agent: Agent[Any]) -> JsonObject | None:
    kind = agent.output_type
    if kind is None:
        return None
    try:
        schema = (
            kind
            if isinstance(kind, AgentOutputSchemaBase)
            else AgentOutputSchema(kind, strict_json_schema=False)
        )
        return None if schema.is_plain_text() else schema.json_schema()
    except (
        Exception
    ) as error:  # the user's type may fail in any way; the agent is served all the same
        log.warning("agent.output_schema", agent=agent.name, reason=str(error))
        return None
