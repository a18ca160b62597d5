"""What the server tells its operator: logs and metrics.

Leans on structlog, prometheus-client, the settings and the domain's events. Refuses to be
imported by what it watches: the floors below log through structlog's own loggers, and hand
their events and durations to callables that `server.py` connects to this folder.
"""

from agent_server.observability.logs import configure_logs
from agent_server.observability.metrics import Metrics
from agent_server.observability.redaction import Redaction, secrets_of
from agent_server.observability.run_log import log_end

__all__ = ["Metrics", "Redaction", "configure_logs", "log_end", "secrets_of"]
