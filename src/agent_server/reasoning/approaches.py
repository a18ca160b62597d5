"""The approaches by name, and the rule that chooses one for ``auto``.

Leans on the extension points. Refuses to know what an approach does.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from agents import Agent

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import UnknownApproach
from agent_server.plugins import APPROACHES, OURS, Extension, extensions
from agent_server.reasoning.approach import AgentInput, Approach, as_text

AUTO: Final = "auto"
DEFAULT: Final = "react"
SHORT_CHARACTERS: Final = 200
"""Up to here, and on one line, an input counts as a short question."""


def choose(agent: Agent[Any], input: AgentInput) -> str:
    """The approach that ``auto`` stands for, by three rules, the first that fits:

    1. The agent can act (tools, MCP servers or handoffs): ``react``, since the others cannot.
    2. The input is short and on one line: ``direct``, since there is little to work out.
    3. Else ``chain_of_thought``.
    """
    if agent.tools or agent.mcp_servers or agent.handoffs:
        return "react"
    text = as_text(input).strip()
    if len(text) <= SHORT_CHARACTERS and "\n" not in text:
        return "direct"
    return "chain_of_thought"


class Approaches:
    """The approaches of this server: its own and those of plugins, made when first used."""

    def __init__(self, found: Mapping[str, Extension] | None = None) -> None:
        self._found = extensions(APPROACHES) if found is None else dict(found)
        self._made: dict[str, Approach] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._found, AUTO)

    def check(self, name: str) -> None:
        """Raises ``UnknownApproach`` with the nearest names if there is none called ``name``."""
        if name not in self._found and name != AUTO:
            near = difflib.get_close_matches(name, self.names, n=3)
            raise UnknownApproach(
                f"There is no approach {name!r}.",
                hint=(
                    f"Did you mean {' or '.join(map(repr, near))}?"
                    if near
                    else f"There are: {', '.join(self.names)}."
                ),
            )

    def get(self, name: str, agent: Agent[Any], input: AgentInput) -> Approach:
        """The approach ``name``; for ``auto``, the one that ``choose`` finds."""
        self.check(name)
        name = choose(agent, input) if name == AUTO else name
        if name not in self._made:
            self._made[name] = self._found[name].make()
        return self._made[name]

    def describe(self) -> list[JsonObject]:
        """Each approach as ``GET /api/v1/approaches`` lists it; a plugin that cannot be loaded
        says so in ``error``."""
        listed: list[JsonObject] = []
        for name, extension in self._found.items():
            entry: JsonObject = {"name": name, "source": extension.distribution}
            try:
                made = self._made.setdefault(name, self._made.get(name) or extension.make())
                entry["description"] = made.description
            except Exception as error:  # a broken plugin must not hide the others
                entry |= {"description": "", "error": str(error)}
            listed.append({**entry, "default": name == DEFAULT})
        rule = "Choose by rule: tools → react, a short question → direct, else chain_of_thought."
        return [
            *listed,
            {"name": AUTO, "source": OURS, "description": rule, "default": False},
        ]
