"""One line in the log for each run that ends badly: which, why, and what to do.

Leans on structlog and the domain's events. Refuses to log runs that end well: metrics count
those, and a line for each would cost more than it tells.
"""

import structlog

from agent_server.domain.events import EventBase, RunBudgetExceeded, RunFailed

_log = structlog.get_logger("agent_server.runs")


def log_end(event: EventBase) -> None:
    """Log ``event`` if it ends a run badly."""
    if isinstance(event, (RunFailed, RunBudgetExceeded)):
        error = event.error
        _log.warning(
            event.type, run_id=event.run_id, code=error.code, error=error.message, hint=error.hint
        )
