"""Sets up the logs: one line per fact, JSON or coloured, with ids and without secrets.

Leans on structlog for our own loggers and routes the standard library's through the same chain,
so that uvicorn, SQLAlchemy and the SDK read alike. Refuses to decide what is worth a line.

The ids of a run, its task and its step come from context variables: whoever carries a task out
calls ``structlog.contextvars.bind_contextvars(run_id=…, task_id=…)``, and every line written
below carries them.
"""

import logging
import sys
from typing import TextIO

import structlog
from structlog.types import Processor

from agent_server.observability.redaction import Redaction, secrets_of
from agent_server.settings import Settings

CHATTY = (
    "httpx2",
    "httpcore2",
    "openai",
    "openai.agents",
    "mcp",
    "asyncio",
    "watchfiles",
    "alembic.runtime.plugins",
)
"""Libraries that are heard from WARNING on, unless the level is DEBUG."""


def configure_logs(settings: Settings, stream: TextIO | None = None) -> None:
    """Send every log of this process to ``stream`` (stderr), as ``settings`` say.

    May be called again; the last call holds.
    """
    out = stream if stream is not None else sys.stderr
    coloured = settings.log_format == "console" or (settings.log_format == "auto" and out.isatty())
    level: int = getattr(logging, settings.log_level)

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        # Before the redaction: a traceback may quote a secret.
        structlog.processors.format_exc_info,
        Redaction(secrets_of(settings)),
    ]
    if coloured:
        last.append(structlog.dev.ConsoleRenderer(colors=out.isatty()))
    else:
        last += [
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        # Our own door logs each call, with more to say.
        logger.propagate = name != "uvicorn.access"
        logger.setLevel(level)
    for name in CHATTY:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else logging.WARNING)
    logging.captureWarnings(True)
