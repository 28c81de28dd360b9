"""What is going on now: the steps and previews of jobs, told by worker threads, awaited by requests.

Lives in memory; the store holds what must last.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field


@dataclass
class Live:
    """A job as it stands. `version` grows with every change."""

    version: int = 0
    step: int = 0
    steps: int = 0
    previews: dict[int, bytes] = field(default_factory=dict)  # by the picture's place: a small PNG


class Board:
    """Live jobs by number, and a bell for each that rings in the event loop when it changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, Live] = {}
        self._bells: dict[int, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that the requests wait in."""
        self._loop = loop

    def tell(self, job: int, step: int = 0, steps: int = 0, previews: dict[int, bytes] | None = None) -> None:
        """News of a job, from any thread."""
        with self._lock:
            live = self._live.setdefault(job, Live())
            live.version += 1
            live.step, live.steps = step, steps
            live.previews |= previews or {}
        self._ring(job)

    def end(self, job: int) -> None:
        """A job has ended: what was live of it is dropped, and who waits looks at the store."""
        with self._lock:
            self._live.pop(job, None)
        self._ring(job)

    def live(self, job: int) -> Live:
        """A job as it stands; empty if nothing is drawn of it now."""
        with self._lock:
            live = self._live.get(job)
            return Live() if live is None else Live(live.version, live.step, live.steps, dict(live.previews))

    async def changed(self, job: int, timeout: float) -> None:
        """Returns when a job has news, or after `timeout` seconds."""
        bell = asyncio.Event()
        self._bells.setdefault(job, set()).add(bell)
        try:
            await asyncio.wait_for(bell.wait(), timeout)
        except TimeoutError:
            pass
        finally:
            bells = self._bells[job]
            bells.discard(bell)
            if not bells:
                del self._bells[job]

    def ring_all(self) -> None:
        """Wakes everybody: the server stops."""
        for job in list(self._bells):
            self._ring(job)

    def _ring(self, job: int) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return

        def ring() -> None:
            for bell in self._bells.get(job, ()):
                bell.set()

        loop.call_soon_threadsafe(ring)
