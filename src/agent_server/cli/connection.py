"""A connection whose headers must arrive: in time, and within a size.

Leans on uvicorn's protocol over httptools, which waits for a request's headers for ever and takes
any number of them. Refuses to know what is asked: that begins when the headers are complete.
"""

import asyncio
from os import urandom
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from agent_server.api import problems
from agent_server.domain.errors import AgentServerError, HeadersTooLarge, RequestTimeout

MAX_HEADER_BYTES: Final = 65_536

log = structlog.get_logger("agent_server.http")


class Connection(HttpToolsProtocol):
    """Answers 408 to headers that have begun and are not complete within ``header_timeout_s``, 431
    to more than ``MAX_HEADER_BYTES`` of them, and hangs up on who says nothing at all.

    Between two requests uvicorn's own limit of a kept connection holds until the next one begins.
    """

    # There are thousands of them, and with more attributes a dictionary of each would cost 2 KB.
    __slots__ = ("_due", "_header_timeout_s", "_reads_headers", "_taken")

    def __init__(self, *args: Any, header_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._due: asyncio.TimerHandle | None = None
        self._reads_headers = False
        self._taken = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._due = self.loop.call_later(self._header_timeout_s, self._overdue)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._taken += len(data) if self._reads_headers else 0
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return  # Over, or a WebSocket from now on.
        if self._reads_headers and self._taken > MAX_HEADER_BYTES:
            self._refuse(
                HeadersTooLarge(
                    f"The headers are larger than {MAX_HEADER_BYTES:,} bytes.",
                    hint="Send less in them; long texts belong into the body.",
                )
            )
        elif self._due is None and (self._reads_headers or not self._answers):
            self._due = self.loop.call_later(self._header_timeout_s, self._overdue)

    def on_message_begin(self) -> None:
        self._reads_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._arrived()
        super().on_headers_complete()

    def _arrived(self) -> None:
        self._reads_headers = False
        self._taken = 0
        if self._due is not None:
            self._due.cancel()
            self._due = None

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _overdue(self) -> None:
        self._due = None
        if self._answers:
            return  # What comes behind it is looked at when more of it comes.
        if not self._reads_headers:
            self.transport.close()
            return
        self._refuse(
            RequestTimeout(
                f"The headers did not arrive within {self._header_timeout_s:g} s.",
                hint="Send them faster, or raise AGENT_SERVER_HEADER_TIMEOUT_S.",
            )
        )

    def _refuse(self, error: AgentServerError) -> None:
        """Answer, unless the answer before is under way, and hang up."""
        log.info("headers refused", code=error.code, client=self.client and self.client[0])
        if not self._answers:
            request_id = "req_" + urandom(12).hex()
            body = problems.render(error, instance="", request_id=request_id)
            head = f"content-type: {problems.MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            head += f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()
