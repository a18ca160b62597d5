"""Files that clients upload, so that a message can name one instead of carrying it.

Leans on the domain's base. Refuses to know where the bytes are.
"""

from datetime import datetime

from agent_server.domain.base import Frozen


class StoredFile(Frozen):
    """What is known of an uploaded file; its content is read apart."""

    id: str
    filename: str
    purpose: str
    media_type: str
    size: int
    """Bytes."""
    created_at: datetime
    expires_at: datetime | None = None
