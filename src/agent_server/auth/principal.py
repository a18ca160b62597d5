"""Who calls: a name, the tenant whose data may be seen, and what may be done with it.

Leans on the domain's ids. Refuses to know how the caller proved it.
"""

from dataclasses import dataclass

from agent_server.domain.ids import DEFAULT_TENANT, Tenant

ALL_SCOPES: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Principal:
    """A caller who was let in."""

    tenant: Tenant
    name: str
    scopes: tuple[str, ...] = ALL_SCOPES


ANONYMOUS = Principal(tenant=DEFAULT_TENANT, name="anonymous")
"""A caller on this machine, in development, without a key."""

KEY_HOLDER = Principal(tenant=DEFAULT_TENANT, name="api_key")
"""A caller who holds the server's one key."""
