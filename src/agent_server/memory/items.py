"""The items of a conversation, as far as memory must tell them apart.

Leans on nothing but their JSON, as the Responses API writes it. Refuses to change one.
"""

import json
from typing import Final

from agent_server.domain.base import JsonObject

CALLS: Final = frozenset(
    {
        "function_call",
        "computer_call",
        "local_shell_call",
        "shell_call",
        "apply_patch_call",
        "custom_tool_call",
    }
)
"""Items that a model refuses without their output."""


def is_output(item: JsonObject) -> bool:
    """Whether the item is what a call gave."""
    kind = item.get("type")
    return isinstance(kind, str) and kind.removesuffix("_output") in CALLS and kind not in CALLS


def message_text(item: JsonObject) -> str | None:
    """What a message says; None for an item that is no message of a person or an agent."""
    if item.get("role") not in ("user", "assistant") or item.get("type") not in (None, "message"):
        return None
    content = item.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str)) or None


def text_of_item(item: JsonObject) -> str:
    """One item as a line of a transcript."""
    said = message_text(item)
    if said is not None:
        return f"{item['role']}: {said}"
    if item.get("type") in CALLS:
        return f"tool call {item.get('name', '')}: {item.get('arguments', '')}"
    if is_output(item):
        output = item.get("output")
        return f"tool output: {output if isinstance(output, str) else json.dumps(output)}"
    return ""


def size_of(item: JsonObject) -> int:
    """Characters of the item's JSON."""
    return len(json.dumps(item, ensure_ascii=False))
