"""Who calls: a name, the tenant whose data may be seen, and what may be done with it.

Leans on the domain's ids. Refuses to know how the caller proved it.
"""

from dataclasses import dataclass

from agent_server.domain.ids import DEFAULT_TENANT, Tenant

ALL_SCOPES: tuple[str, ...] = ("*",)
TENANT_SCOPES: tuple[str, ...] = ("tenant",)
"""Everything, but only with one tenant's data."""


@dataclass(frozen=True)
class Principal:
    """A caller who was let in."""

    tenant: Tenant
    name: str
    scopes: tuple[str, ...] = ALL_SCOPES

    @property
    def operates(self) -> bool:
        """Whether they may see what is about all tenants together."""
        return self.scopes == ALL_SCOPES


ANONYMOUS = Principal(tenant=DEFAULT_TENANT, name="anonymous")
"""A caller on this machine, in development, without a key."""

KEY_HOLDER = Principal(tenant=DEFAULT_TENANT, name="api_key")
"""A caller who holds the server's own key, ``AGENT_SERVER_API_KEY``."""
