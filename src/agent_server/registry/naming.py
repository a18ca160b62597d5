"""Who gets which name: what a module defines, and the first come of two that want one name.

Leans on the SDK's ``Agent`` and ``FunctionTool`` and the text of the files. Refuses to know how
modules are imported or when.
"""

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from agents import Agent, FunctionTool

from agent_server.domain.agents import LoadError
from agent_server.registry.catalog import Catalog
from agent_server.registry.mcp_servers import reachable_agents
from agent_server.registry.slugs import slug
from agent_server.registry.sources import Unit


@dataclass(frozen=True)
class Loaded:
    """What a unit defines, by variable name. ``error`` says why this is an older version."""

    unit: Unit
    agents: tuple[tuple[str, Agent[Any]], ...] = ()
    tools: tuple[tuple[str, FunctionTool], ...] = ()
    error: LoadError | None = None


class Names:
    """Gives each agent and tool its name, and records who wants a name that is taken."""

    def __init__(self, errors: list[LoadError]) -> None:
        self.agents: dict[str, Agent[Any]] = {}
        self.tools: dict[str, FunctionTool] = {}
        self.agent_units: dict[str, Loaded] = {}
        self._tool_units: dict[str, Loaded] = {}
        self._errors = errors

    def take(self, one: Loaded) -> None:
        for variable, agent in one.agents:
            key = slug(agent.name)
            if not key:
                self._refuse(
                    one, variable, f"The agent {agent.name!r} has no letter or digit in its name."
                )
            elif key not in self.agents:
                self.agents[key], self.agent_units[key] = agent, one
            elif self.agents[key] is not agent and one.error is None:
                first = self._place(self.agent_units[key], self.agents[key])
                text = f"The agent {agent.name!r} has the slug {key!r}, which {first} has already"
                self._refuse(one, variable, f"{text}. That one is served; rename one of them.")
        for variable, tool in one.tools:
            if tool.name not in self.tools:
                self.tools[tool.name], self._tool_units[tool.name] = tool, one
            elif self.tools[tool.name] is not tool and one.error is None:
                first = self._place(self._tool_units[tool.name], self.tools[tool.name])
                text = f"The tool {tool.name!r} is defined in {first} already"
                self._refuse(one, variable, f"{text}. That one is used; rename one of them.")

    def _refuse(self, one: Loaded, variable: str, message: str) -> None:
        line = _line_of(one.unit, variable)
        self._errors.append(LoadError(source=one.unit.place, line=line, message=message))

    def _place(self, one: Loaded, value: object) -> str:
        variables = [name for name, other in (*one.agents, *one.tools) if other is value]
        line = _line_of(one.unit, variables[0]) if variables else None
        where = one.unit.place if line is None else f"{one.unit.place}:{line}"
        return f"{variables[0]!r} in {where}" if variables else where


def collected(unit: Unit, module: ModuleType) -> Loaded:
    values = list(vars(module).items())
    return Loaded(
        unit,
        tuple((name, value) for name, value in values if isinstance(value, Agent)),
        tuple((name, value) for name, value in values if isinstance(value, FunctionTool)),
    )


def _line_of(unit: Unit, variable: str) -> int | None:
    """The line that binds a module-level name, where the text shows it plainly."""
    if unit.file is None or not unit.file.is_file():
        return None
    binds = re.compile(rf"(?:async\s+)?(?:def\s+)?{re.escape(variable)}\s*[:=(]")
    text = unit.file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if binds.match(line):
            return number
    return None


def unknown_names(catalog: Catalog) -> list[LoadError]:
    """Policy entries that name nothing. Tools of MCP servers show only once they are connected,
    so where an agent has such a server no tool's name is called unknown."""
    errors: list[LoadError] = []
    served = list(catalog.agents.values())
    everyone = [other for agent in served for other in reachable_agents(agent)]
    names = {slug(agent.name) for agent in everyone}
    tools = set(catalog.tools) | {tool.name for agent in everyone for tool in agent.tools}
    for name in catalog.policies.agents:
        if slug(name) not in names:
            listed = ", ".join(sorted(names)) or "none"
            message = f"[agents.{name}] names no agent that is served ({listed})."
            source = catalog.policies.places[f"agents.{name}"]
            errors.append(LoadError(source=source, message=message))
    for name, policy in catalog.policies.tools.items():
        if policy.reconcile is not None and policy.reconcile not in catalog.tools:
            message = f"[tools.{name}] reconcile = {policy.reconcile!r} names no tool of a file."
            source = catalog.policies.places[f"tools.{name}"]
            errors.append(LoadError(source=source, message=message))
    if any(agent.mcp_servers for agent in everyone):
        return errors
    for name in catalog.policies.tools:
        if name not in tools:
            message = f"[tools.{name}] names no tool ({', '.join(sorted(tools))})."
            source = catalog.policies.places[f"tools.{name}"]
            errors.append(LoadError(source=source, message=message))
    return errors
