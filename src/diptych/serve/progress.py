"""Live progress: steps and previews of jobs, reported by worker threads and awaited by requests; and the counters that
Prometheus reads at /metrics.

All of it is in memory; the store holds what must last.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


@dataclass
class JobProgress:
    """Progress of a running job."""

    step: int = 0
    steps: int = 0
    previews: dict[int, bytes] = field(default_factory=dict)  # small PNGs by the image's place in the job


class ProgressBoard:
    """Live jobs by number. Requests in the event loop wait for their changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, JobProgress] = {}
        self._waiting: dict[int, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sets the event loop of the requests."""
        self._loop = loop

    def report(self, job: int, step: int = 0, steps: int = 0, previews: dict[int, bytes] | None = None) -> None:
        """Updates a job, from any thread."""
        with self._lock:
            live = self._live.setdefault(job, JobProgress())
            live.step, live.steps = step, steps
            live.previews |= previews or {}
        self._wake(job)

    def end(self, job: int) -> None:
        """Drops the progress of a job that has ended, and wakes its requests, which read the store."""
        with self._lock:
            self._live.pop(job, None)
        self._wake(job)

    def live(self, job: int) -> JobProgress:
        """Returns a copy of a job's progress; empty if it is not running."""
        with self._lock:
            live = self._live.get(job, JobProgress())
            return replace(live, previews=dict(live.previews))

    async def changed(self, job: int, timeout: float) -> None:
        """Returns when a job changes, or after `timeout` seconds."""
        change = asyncio.Event()
        self._waiting.setdefault(job, set()).add(change)
        try:
            await asyncio.wait_for(change.wait(), timeout)
        except TimeoutError:
            pass
        finally:
            waiting = self._waiting[job]
            waiting.discard(change)
            if not waiting:
                del self._waiting[job]

    def wake_all(self) -> None:
        """Wakes all requests, because the server stops."""
        for job in list(self._waiting):
            self._wake(job)

    def _wake(self, job: int) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return

        def wake() -> None:
            for change in self._waiting.get(job, ()):
                change.set()

        loop.call_soon_threadsafe(wake)


SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The counters of one server, in a separate registry. Labels hold no prompt, token, address or name of a user."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        shared: Any = {"registry": self.registry}
        self.requests = Counter("diptych_requests", "Requests by route and status", ["route", "status"], **shared)
        self.jobs = Counter("diptych_jobs", "Jobs by final status", ["end"], **shared)
        self.pictures = Counter("diptych_pictures", "Generated images", **shared)
        self.refused = Counter("diptych_refused", "Rejected requests by reason", ["reason"], **shared)
        self.batch = Histogram("diptych_batch_pictures", "Images per batch", buckets=(1, 2, 4, 8, 16), **shared)
        self.draw = Histogram("diptych_draw_seconds", "Seconds per batch", buckets=SECONDS, **shared)
        queue = Gauge("diptych_queue_pictures", "Queued images", **shared)
        queue.set_function(waiting)

    def text(self) -> bytes:
        """Returns all counters in Prometheus' text format."""
        return generate_latest(self.registry)
