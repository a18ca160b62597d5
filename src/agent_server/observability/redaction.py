"""Takes secrets out of what is about to be written down.

Leans on the settings for the secrets it can know by value; the rest it knows by the name they
stand under or by their looks. Refuses to guess: a value is replaced whole or not at all.
"""

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from agent_server.domain.secrets import MASK, masked
from agent_server.settings import Settings

MAX_DEPTH = 8
"""Levels of nested lists and objects that are looked into; what is below is dropped."""

_NAME = re.compile(
    r"(^|[_\-. ])(api)?(key|token|secret|password|passwd|authorization|cookie|credentials?)s?$",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"(^|[_\-. ])(tokens|(idempotency|step|dedup|sort)[_\-]key)$", re.IGNORECASE)


def secrets_of(settings: Settings) -> frozenset[str]:
    """Every secret value in ``settings``, the password inside the database URL too."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr) and name != "database_url":
            found.add(value.get_secret_value())
    found |= {held.key.get_secret_value() for held in settings.tenant_keys.values()}
    password = urlsplit(settings.database).password
    if password:
        found |= {password, unquote(password)}
    return frozenset(secret for secret in found if len(secret) >= 4)


class Redaction:
    """Replaces secrets in values on their way out; also a structlog processor.

    ``secrets`` are taken out wherever they stand. Names like ``api_key``, ``token`` or
    ``Authorization`` hide their whole value; ``sk-…``, ``Bearer …``, JSON web tokens and the
    credentials of a URL are recognised inside any text.
    """

    def __init__(self, secrets: Iterable[str] = (), *, max_depth: int = MAX_DEPTH) -> None:
        # The longest first, so that a secret that contains another goes whole.
        self._max_depth = max_depth
        self._secrets = sorted(secrets, key=len, reverse=True)

    def text(self, text: str) -> str:
        """``text`` without secrets."""
        return masked(text, self._secrets)

    def value(self, value: Any, depth: int = 0) -> Any:
        """``value`` without secrets, looked through to its leaves."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= self._max_depth:
            return "[too deep to log]"
        if isinstance(value, dict):
            return {
                key: (MASK if item is not None and hides(str(key)) else self.value(item, depth + 1))
                for key, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item, depth + 1) for item in value]
        return self.text(str(value))

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        private = {name: item for name, item in event.items() if name.startswith("_")}
        shown = {name: item for name, item in event.items() if not name.startswith("_")}
        return {**self.value(shown), **private}


def hides(name: str) -> bool:
    """True when what stands under ``name`` is a secret by its name."""
    return bool(_NAME.search(name)) and not _HARMLESS.search(name)
