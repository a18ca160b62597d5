"""Takes out of an export what is not to leave the house.

Leans on the export's shape alone; what a secret is, it is told. ``secrets`` keeps a file that can be
replayed unless a secret was part of the talk; ``content`` keeps the structure (which calls, how
many, how long, how dear) and no word of it, and cannot be replayed.
"""

from collections.abc import Callable
from typing import Any

from agent_server.domain.base import JsonObject
from agent_server.domain.history import Redact, RunExport

MaskSecrets = Callable[[Any], Any]
"""A JSON value without the secrets in it."""

_STRUCTURE = frozenset(
    {
        *(
            "id",
            "run_id",
            "task_id",
            "path",
            "node",
            "kind",
            "status",
            "name",
            "type",
            "key",
            "step",
        ),
        *("task_path", "agent", "model", "code", "at", "started_at", "ended_at", "created_at"),
        *("input_hash", "cost_usd", "role", "call_id", "tool", "action", "trigger", "forked_from"),
        *("response_id", "approach", "parent_id", "limit", "used", "maximum"),
    }
)
"""Fields whose text says how the run went, not what was said."""


def redacted(export: RunExport, how: Redact, mask_secrets: MaskSecrets) -> RunExport:
    """``export`` without secrets, or without any content."""
    if how == "none":
        return export
    body = export.model_dump(mode="json")
    parts = ("run", "request", "session", "tasks", "steps", "events")
    mask = mask_secrets if how == "secrets" else _hidden
    changed: JsonObject = {name: mask(body[name]) for name in parts}
    return RunExport.model_validate({**body, **changed, "redacted": how})


def _hidden(value: Any, field: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _hidden(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item, field) for item in value]
    if isinstance(value, str) and field not in _STRUCTURE:
        return f"[{len(value)} characters]"
    return value
