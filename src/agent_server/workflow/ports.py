"""What workflows need of whoever keeps them: the definition that a name stands for.

Leans on the domain alone. Refuses to know how definitions are kept; a run asks once for each
workflow that it begins, and keeps what it was told in its ledger.
"""

from typing import Protocol

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import UnknownWorkflow
from agent_server.domain.ids import Tenant


class StoredWorkflows(Protocol):
    """The workflows that are stored under a name, with their versions."""

    async def definition(self, tenant: Tenant, name: str, version: str | None) -> JsonObject:
        """The definition, its ``name`` and ``version`` filled in; None asks for the newest version.

        Raises ``UnknownWorkflow`` with the nearest names, or the versions there are.
        """


class NoStoredWorkflows:
    """Where nothing is stored."""

    async def definition(self, tenant: Tenant, name: str, version: str | None) -> JsonObject:
        raise UnknownWorkflow(
            f"There is no stored workflow {name!r}.",
            hint="Send the definition itself as 'workflow'.",
        )
