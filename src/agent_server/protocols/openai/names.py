"""What the names and ids of OpenAI's API stand for here.

``agent/<slug>``, ``workflow/<name>`` and ``goal`` are models, with ``:<approach>`` behind them for
another approach; a response has the id of its run. Leans on the domain; refuses to look anything up.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from agent_server.domain.errors import AgentServerError, NotFound, UnknownAgent
from agent_server.domain.ids import RunId

KINDS: Final = ("agent", "workflow")
_HEX = "[0-9a-f]{32}"
_RESPONSE = re.compile(f"resp_({_HEX})([0-9a-f]{{4}})?")
_ITEM = re.compile(f"[a-z]+_({_HEX})([0-9a-f]{{4}})")
_KEPT_ITEM = re.compile(f"[a-z]+_({_HEX})([0-9a-f]{{8}})")
_CONSENT = re.compile(f"mcpr_({_HEX})")
_CONVERSATION = re.compile(f"conv_{_HEX}")


@dataclass(frozen=True)
class Target:
    """Who answers for a model's name."""

    kind: Literal["agent", "workflow", "goal"]
    name: str = ""
    approach: str | None = None


def target(model: str) -> Target:
    """Raises ``UnknownAgent`` for a name of another form."""
    whole, _, approach = model.partition(":")
    kind, _, name = whole.partition("/")
    if kind == "goal" and not name:
        return Target("goal", "", approach or None)
    if len(name) > 200 or len(approach) > 100:
        raise unknown_model(model)
    if kind == "agent" and name:
        return Target("agent", name, approach or None)
    if kind == "workflow" and name:
        return Target("workflow", name, approach or None)
    raise unknown_model(model)


def unknown_model(model: str) -> AgentServerError:
    return UnknownAgent(
        f"The model {model[:200]!r} does not exist.",
        hint="GET /v1/models lists what there is: agent/<name>, workflow/<name> and goal.",
    )


class Ref(NamedTuple):
    """What a response's id names: a run, and which part of it. A run that stood still for people's
    consent has a further part for each time."""

    run_id: RunId
    part: int = 0


def response_id(run_id: str, part: int = 0) -> str:
    return "resp_" + run_id.removeprefix("run_") + (f"{part:04x}" if part else "")


def ref_of(response: str) -> Ref:
    """Raises ``NotFound`` for what cannot be a response's id."""
    found = _RESPONSE.fullmatch(response)
    if found is None:
        raise no_response(response)
    return Ref(RunId("run_" + found[1]), int(found[2] or "0", 16))


def no_response(response: str) -> AgentServerError:
    return NotFound(f"Response with id {response[:100]!r} not found.")


def item_id(prefix: str, run_id: str, index: int) -> str:
    """The id of the item at ``index`` of a response's output, or of its input."""
    return f"{prefix}_{run_id.removeprefix('run_')}{index:04x}"


def run_of_item(item: str) -> RunId | None:
    found = _ITEM.fullmatch(item)
    return RunId("run_" + found[1]) if found else None


def is_conversation(identity: str) -> bool:
    return _CONVERSATION.fullmatch(identity) is not None


def conversation_item_id(prefix: str, conversation: str, position: int) -> str:
    """The id of the item at ``position`` of a conversation."""
    return f"{prefix}_{conversation.removeprefix('conv_')}{position:08x}"


def conversation_of_item(item: str) -> tuple[str, int] | None:
    """The conversation and the position that an item's id names."""
    found = _KEPT_ITEM.fullmatch(item)
    return ("conv_" + found[1], int(found[2], 16)) if found else None


def consent_id(approval: str) -> str:
    """The id of the item that asks for an approval."""
    return "mcpr_" + approval.removeprefix("appr_")


def approval_of(consent: str) -> str | None:
    found = _CONSENT.fullmatch(consent)
    return "appr_" + found[1] if found else None
