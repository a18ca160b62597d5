"""What looks like a secret in a text, and how it is taken out.

Leans on nothing of ours. Refuses to know where secrets come from: whoever knows some passes them.
"""

import re
from collections.abc import Iterable

MASK = "[redacted]"

_LOOKS = re.compile(
    r"\bsk-[A-Za-z0-9_\-]{8,}"
    r"|(?i:\b(?:bearer|basic)\s+[A-Za-z0-9._~+/\-]{8,}=*)"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]*"
)


def masked(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without ``secrets``, keys, tokens and the credentials of a URL."""
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, MASK)
    return _LOOKS.sub(MASK, text)
