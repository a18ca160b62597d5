"""``agent-server.toml``: what the operator says about tools and agents without touching code.

Leans on the domain's policy words. Refuses keys it does not know, because a misspelt
``approval`` that is silently dropped would let through what was meant to be held.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from agent_server.domain.agents import AgentPolicy, LoadError, ToolPolicy
from agent_server.domain.base import Frozen, JsonObject
from agent_server.domain.runs import Budget, Limits, ModelPrice
from agent_server.registry.sources import place

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "agent-server.toml"
_TABLES = ["tools", "agents", "limits", "prices"]
_PLACED = {"tenants": "limits.tenants", "keys": "limits.keys"}
"""Where in the file a field of ``Policies`` stands, if not under its own name."""


@dataclass(frozen=True)
class Policies:
    """The entries of one or more files, by tool name and by the agent name as written."""

    tools: Mapping[str, ToolPolicy] = field(default_factory=dict)
    agents: Mapping[str, AgentPolicy] = field(default_factory=dict)
    tenants: Mapping[str, Limits] = field(default_factory=dict)
    keys: Mapping[str, Limits] = field(default_factory=dict)
    """By the name of the key, as a principal bears it."""
    prices: Mapping[str, ModelPrice] = field(default_factory=dict)
    """By the name of the model."""
    places: Mapping[str, str] = field(default_factory=dict)
    """``tools.add`` or ``agents.clerk`` to the file that sets it."""


def read_policy_file(path: Path, cwd: Path) -> Policies | tuple[LoadError, ...]:
    """The file's entries, or everything that is wrong with it."""
    source = place(path, cwd)
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        return (LoadError(source=source, message=f"Cannot be read: {error.strerror}."),)
    except UnicodeDecodeError:
        return (LoadError(source=source, message="Is not UTF-8 text."),)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at.group(1)) if at else None
        return (LoadError(source=source, line=line, message=f"Is not TOML: {error}."),)
    errors: list[LoadError] = []
    for key in data:
        if key not in _TABLES:
            message = f"Unknown table {key!r}.{_nearest(key, _TABLES)}"
            errors.append(LoadError(source=source, line=_line(text, key), message=message))
    tools = _entries(ToolPolicy, "tools", data.get("tools", {}), source, text, errors)
    agents = _entries(AgentPolicy, "agents", data.get("agents", {}), source, text, errors)
    for name, policy in agents.items():
        if policy.budget is not None:
            _validate(Budget, f"agents.{name}.budget", policy.budget, source, text, errors)
    prices = _entries(ModelPrice, "prices", data.get("prices", {}), source, text, errors)
    limits = _table(data.get("limits", {}), "limits", source, text, errors)
    for key in limits.keys() - {"tenants", "keys"}:
        message = f"Unknown table 'limits.{key}'.{_nearest(key, ['tenants', 'keys'])}"
        errors.append(LoadError(source=source, line=_line(text, key), message=message))
    found: dict[str, dict[str, Any]] = {"tools": tools, "agents": agents, "prices": prices}
    for kind in ("tenants", "keys"):
        found[kind] = _limits(limits.get(kind, {}), f"limits.{kind}", source, text, errors)
    if errors:
        return tuple(errors)
    names = [f"{_PLACED.get(kind, kind)}.{n}" for kind, table in found.items() for n in table]
    return Policies(**found, places=dict.fromkeys(names, source))


def _limits(
    data: object, table: str, source: str, text: str, errors: list[LoadError]
) -> dict[str, Limits]:
    """The limits by name; each budget is checked by itself, so that what is wrong is named."""
    found: dict[str, Limits] = {}
    for name, entry in _table(data, table, source, text, errors).items():
        where = f"{table}.{name}"
        parts = _validate(_LimitsTable, where, entry, source, text, errors)
        if isinstance(parts, _LimitsTable):
            budgets = {
                part: _validate(Budget, f"{where}.{part}", given, source, text, errors)
                for part, given in parts
                if given is not None
            }
            if None not in budgets.values():
                found[name] = Limits.model_validate(budgets)
    return found


class _LimitsTable(Frozen):
    default: JsonObject | None = None
    maximum: JsonObject | None = None


def merged(policies: Iterable[Policies]) -> tuple[Policies, tuple[LoadError, ...]]:
    """One set of all files' entries. Of two that set the same name the first stands."""
    whole: dict[str, dict[str, Any]] = {one.name: {} for one in fields(Policies)}
    errors: list[LoadError] = []
    for part in policies:
        for name, source in part.places.items():
            if name in whole["places"]:
                stands = whole["places"][name]
                message = f"[{name}] is set in {stands} already, which stands. Remove one."
                errors.append(LoadError(source=source, message=message))
        for table, known in whole.items():
            whole[table] = {**getattr(part, table), **known}
    return Policies(**whole), tuple(errors)


def _entries(
    kind: type[Any], table: str, data: object, source: str, text: str, errors: list[LoadError]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in _table(data, table, source, text, errors).items():
        policy = _validate(kind, f"{table}.{name}", entry, source, text, errors)
        if policy is not None:
            found[name] = policy
    return found


def _table(
    data: object, table: str, source: str, text: str, errors: list[LoadError]
) -> dict[str, Any]:
    if isinstance(data, dict):
        return data
    message = f"{table!r} must be a table: write [{table}.NAME]."
    errors.append(LoadError(source=source, line=_line(text, table), message=message))
    return {}


def _validate(
    kind: type[BaseModel],
    where: str,
    entry: object,
    source: str,
    text: str,
    errors: list[LoadError],
) -> BaseModel | None:
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else ""
            line = _line(text, key or where.rpartition(".")[2])
            if problem["type"] == "extra_forbidden":
                known = sorted(kind.model_fields)
                message = f"[{where}] has an unknown key {key!r}.{_nearest(key, known)}"
            elif key:
                value = problem["input"]
                message = f"[{where}] {key} = {value!r} is not valid: {problem['msg']}."
            else:
                message = f"[{where}] must be a table of {', '.join(sorted(kind.model_fields))}."
            errors.append(LoadError(source=source, line=line, message=message))
        return None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    listed = ", ".join(known)
    return f" Did you mean {near[0]!r}? Known: {listed}." if near else f" Known: {listed}."


def _line(text: str, key: str) -> int | None:
    """The first line that sets ``key`` or opens its table; a guess that is nearly always right."""
    pattern = re.compile(rf"^\s*(\[.*\b{re.escape(key)}\b.*\]|[\"']?{re.escape(key)}[\"']?\s*=)")
    for number, line in enumerate(text.splitlines(), start=1):
        if pattern.match(line):
            return number
    return None
