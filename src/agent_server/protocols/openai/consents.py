"""``mcp_approval_response`` items: people's consent, sent by a client, to a run that stands still.

Leans on the inbox of approvals, which they are the same as: one record, decided once, by whoever
comes first. Refuses to let an answer change anything else of the run, or to take half of them.
"""

from collections.abc import Sequence
from typing import Final

from agent_server.auth.principal import Principal
from agent_server.domain.approvals import Decide
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AlreadyDecided, NotFound
from agent_server.domain.ids import RunId, Tenant
from agent_server.domain.runs import RunRequest
from agent_server.protocols.openai import asking, names
from agent_server.protocols.openai.bodies import CreateResponse
from agent_server.protocols.openai.deps import OpenAIDeps
from agent_server.protocols.openai.errors import refuse
from agent_server.protocols.openai.items import CONSENT
from agent_server.protocols.openai.names import Ref
from agent_server.protocols.openai.stored import Stored
from agent_server.protocols.openai.tale import echo_of

MOST: Final = 200
_OF_THE_REQUEST: Final = frozenset(
    {"background", "conversation", "previous_response_id", "store", "user"}
)
"""What a further request may say in its own way."""


def answers(given: str | Sequence[JsonObject] | None) -> list[JsonObject]:
    """The consents at the end of an input; those in its midst are of a history."""
    found: list[JsonObject] = []
    for item in reversed(given if given is not None and not isinstance(given, str) else ()):
        if item.get("type") != CONSENT:
            break
        found.append(item)
    return found[::-1]


class Consents:
    """Built once; see the module."""

    def __init__(self, deps: OpenAIDeps, stored: Stored) -> None:
        self._control = deps.control
        self._stored = stored

    async def check(self, body: CreateResponse, principal: Principal) -> tuple[Ref, RunRequest]:
        """The response that ``body`` makes go on, and what was asked for at first.

        Raises ``InvalidRequest`` for what is not whole or would change the run, and
        ``AlreadyDecided`` for what is decided.
        """
        tenant, wanted = principal.tenant, _decisions(body.input)
        run_ids = set()
        for approval_id in wanted:
            try:
                approval = await self._control.approval(tenant, approval_id)
            except NotFound as error:
                raise _unknown(names.consent_id(approval_id)) from error
            run_ids.add(approval.run_id)
            if approval.status != "pending":
                raise AlreadyDecided(
                    f"{names.consent_id(approval_id)!r} is {approval.status} already.",
                    hint="GET the response that came after it: an approval counts once.",
                )
        if len(run_ids) != 1:
            raise refuse("input", "These consents belong to several responses: send them apart.")
        run_id = RunId(run_ids.pop())
        _, request = await self._stored.run(tenant, run_id)
        ref = Ref(run_id, await self._stored.next_part(tenant, run_id))
        _check_place(body, request, ref)
        _check_unchanged(body, request)
        await self._check_whole(tenant, run_id, wanted)
        return ref, request

    async def settle(self, body: CreateResponse, ref: Ref, principal: Principal) -> None:
        """Decide. Raises ``AlreadyDecided`` where somebody was faster."""
        for approval_id, decide in _decisions(body.input).items():
            await self._control.decide(principal.tenant, approval_id, decide, by=principal.name)

    async def _check_whole(self, tenant: Tenant, run_id: RunId, wanted: dict[str, Decide]) -> None:
        page = await self._control.approvals(tenant, status="pending", run_id=run_id, limit=MOST)
        for approval in page.data:
            if approval.id not in wanted:
                missing = names.consent_id(approval.id)
                raise refuse("input", f"No approval response found for request {missing!r}.")


def _decisions(given: str | Sequence[JsonObject] | None) -> dict[str, Decide]:
    found: dict[str, Decide] = {}
    for item in answers(given):
        consent = item.get("approval_request_id")
        approval_id = names.approval_of(consent) if isinstance(consent, str) else None
        if approval_id is None:
            raise _unknown(consent)
        if not isinstance(item.get("approve"), bool):
            raise refuse("input", f"The consent {consent!r} needs 'approve', true or false.")
        if approval_id in found:
            raise refuse("input", f"The consent {consent!r} is there twice.")
        reason = item.get("reason")
        found[approval_id] = Decide(
            decision="approve" if item["approve"] else "reject",
            reason=reason[:10_000] if isinstance(reason, str) else "",
        )
    return found


def _unknown(consent: object) -> Exception:
    return refuse("input", f"There is no approval request {str(consent)[:100]!r}.")


def _check_unchanged(body: CreateResponse, request: RunRequest) -> None:
    """The run goes on as it was asked for: a parameter that says otherwise would be ignored."""
    asked = echo_of(request)
    for name, value in asking.echo(body, None).items():
        given = getattr(body, name, None)
        if name not in _OF_THE_REQUEST and given is not None and value != asked.get(name):
            raise refuse(name, f"The response goes on as it was asked for: {name!r} cannot change.")


def _check_place(body: CreateResponse, request: RunRequest, ref: Ref) -> None:
    """The client means the response that asks."""
    asking_one = names.response_id(ref.run_id, ref.part - 1)
    if body.previous_response_id not in (None, asking_one):
        raise refuse("previous_response_id", f"It is {asking_one!r} that asks for this consent.")
    conversation = body.conversation
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if conversation is not None and conversation != request.session_id:
        raise refuse("conversation", f"{asking_one!r} is not of this conversation.")
    known = body.previous_response_id is not None or conversation is not None
    if known and len(body.input or ()) > len(answers(body.input)):
        raise refuse("input", "A consent is sent alone: the run goes on with what it has.")
