"""A connection must send the head of a request in time, or it is closed.

uvicorn would wait for ever: whoever opens as many connections as the server takes, and says nothing, keeps everybody
out. What comes after the head, the body, is the guard's to time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def impatient(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's own reading of HTTP, with so many seconds for a head."""
    protocol: Any = AutoHTTPProtocol

    class Impatient(protocol):
        late: asyncio.TimerHandle | None = None  # rings unless a head is there before

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Starts the clock where a head is due. Between two requests uvicorn's own (keep-alive) runs until the
            second one begins."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._rest()
            elif self.late is None:
                self.late = self.loop.call_later(seconds, self.transport.close)

        def _rest(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return Impatient
