"""How long a connection may say nothing, read nothing, and be one of too many.

uvicorn would wait for ever: whoever opens as many connections as the server takes, and says nothing, keeps everybody
out. What comes after the head, the body, is the guard's to time, and so is the number of requests.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

FILES = 200  # that the process opens beside its connections
STALLED = 60.0  # seconds in which a client must read something of its answer


def impatient(seconds: float, most: int) -> type[asyncio.Protocol]:
    """uvicorn's own reading of HTTP, with a time limit for a head and a limit on connections. When there are
    more, the one that has been silent longest is closed; requests that are being answered are not touched."""
    protocol: Any = AutoHTTPProtocol
    most = min(most, _files(most + FILES) - FILES)

    class Impatient(protocol):
        late: asyncio.TimerHandle | None = None  # rings unless a head is there before
        unread: asyncio.TimerHandle | None = None  # rings unless something of an answer was read before
        since = 0.0  # when it said something

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.since = self.loop.time()
            self._watch()
            if len(self.connections) > most:
                silent = [other for other in self.connections if other.waits]
                min(silent, key=lambda other: other.since, default=self).transport.abort()

        def data_received(self, data: bytes) -> None:
            self.since = self.loop.time()
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._still_reads(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            if self.unread is not None:
                self.unread.cancel()
                self.unread = None
            super().resume_writing()

        def _still_reads(self, left: int) -> None:
            def look() -> None:
                if self.transport.get_write_buffer_size() >= left:
                    self.transport.abort()
                else:
                    self._still_reads(self.transport.get_write_buffer_size())

            self.unread = self.loop.call_later(STALLED, look)

        @property
        def waits(self) -> bool:
            """Whether it is for the client to say something."""
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            """Starts the clock where a head is due. Between two requests uvicorn's own (keep-alive) runs until the
            second one begins."""
            if not self.waits:
                self._rest()
            elif self.late is None:
                self.late = self.loop.call_later(seconds, self.transport.close)

        def _rest(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return Impatient


def _files(wanted: int) -> int:
    """How many files the process may have open, raised to `wanted` where that is allowed."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):
        return soft
    return raised
