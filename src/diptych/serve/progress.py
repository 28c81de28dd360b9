"""What is going on now: the steps and previews of jobs, told by worker threads and awaited by requests, and the
counters that Prometheus reads at /metrics.

Lives in memory; the store holds what must last.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


@dataclass
class JobProgress:
    """A job as it stands. `version` grows with every change."""

    version: int = 0
    step: int = 0
    steps: int = 0
    previews: dict[int, bytes] = field(default_factory=dict)  # by the picture's place: a small PNG


class ProgressBoard:
    """Live jobs by number, and a bell for each that rings in the event loop when it changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, JobProgress] = {}
        self._bells: dict[int, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that the requests wait in."""
        self._loop = loop

    def tell(self, job: int, step: int = 0, steps: int = 0, previews: dict[int, bytes] | None = None) -> None:
        """News of a job, from any thread."""
        with self._lock:
            live = self._live.setdefault(job, JobProgress())
            live.version += 1
            live.step, live.steps = step, steps
            live.previews |= previews or {}
        self._ring(job)

    def end(self, job: int) -> None:
        """A job has ended: what was live of it is dropped, and who waits looks at the store."""
        with self._lock:
            self._live.pop(job, None)
        self._ring(job)

    def live(self, job: int) -> JobProgress:
        """A job as it stands; empty if nothing is drawn of it now."""
        with self._lock:
            live = self._live.get(job)
            return (
                JobProgress() if live is None else JobProgress(live.version, live.step, live.steps, dict(live.previews))
            )

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


SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The counters of one server, in a registry of its own. Labels hold no prompt, token, address or name of a user."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        given: Any = {"registry": self.registry}
        self.requests = Counter("diptych_requests", "Requests by route and status", ["route", "status"], **given)
        self.jobs = Counter("diptych_jobs", "Jobs by how they ended", ["end"], **given)
        self.pictures = Counter("diptych_pictures", "Pictures drawn", **given)
        self.refused = Counter("diptych_refused", "Requests refused, by reason", ["reason"], **given)
        self.batch = Histogram("diptych_batch_pictures", "Pictures drawn together", buckets=(1, 2, 4, 8, 16), **given)
        self.draw = Histogram("diptych_draw_seconds", "Seconds that a batch took", buckets=SECONDS, **given)
        queue = Gauge("diptych_queue_pictures", "Pictures that wait", **given)
        queue.set_function(waiting)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
