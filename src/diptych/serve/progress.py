"""What is going on now: the steps and previews of jobs, told by worker threads, awaited by requests.

Lives in memory; the store holds what must last.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from diptych.errors import UserError


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


# Threads of their own for what takes long: decoding images, checking masks, laying out pages. Other requests never
# wait behind it. Large images have a thread apart from small ones, so that a small one waits for small ones alone.
# Each thread has a short queue, of which one owner gets a part; who finds it full is told to come again.

LARGE = 2_000_000  # pixels from which an image is large
P = ParamSpec("P")
Result = TypeVar("Result")


class Lane:
    """One thread and a queue for it of at most `most`, half of them of one owner. `seconds` is about how long one
    takes, for those who must come again."""

    def __init__(self, name: str, seconds: float, most: int) -> None:
        self.seconds, self.most = seconds, most
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"diptych-{name}")
        self._lock = threading.Lock()
        self._held: collections.Counter[str] = collections.Counter()

    def check(self, owner: str) -> None:
        """Busy if there is no room for another of this owner."""
        with self._lock:
            if self._held[owner] >= self.most // 2 or self._held.total() >= self.most:
                raise Busy("too many images wait to be read", self.seconds * max(1, self._held.total()), 503)

    def start(self, owner: str, do: Callable[P, Result], *given: P.args, **named: P.kwargs) -> Future[Result]:
        """Does it once it is its turn. Busy if the queue is full."""
        self.check(owner)
        with self._lock:
            self._held[owner] += 1
        future = self._pool.submit(do, *given, **named)
        future.add_done_callback(lambda _: self._release(owner))
        return future

    async def run(self, owner: str, do: Callable[P, Result], *given: P.args, **named: P.kwargs) -> Result:
        """`start`, and what comes of it."""
        return await asyncio.wrap_future(self.start(owner, do, *given, **named))

    def close(self) -> None:
        """Does nothing more of what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _release(self, owner: str) -> None:
        with self._lock:
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]


class Lanes:
    """The thread for small images and the one for large ones."""

    def __init__(self) -> None:
        self.small, self.large = Lane("small", 0.1, 64), Lane("large", 3.0, 16)

    def of(self, pixels: int) -> Lane:
        """The lane of an image."""
        return self.large if pixels >= LARGE else self.small

    def close(self) -> None:
        """Closes both."""
        self.small.close()
        self.large.close()


# What Prometheus is told at /metrics. Labels hold no prompt, token, address or name of a user.

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The counters of one server, in a registry of its own."""

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


# Requests that are refused although nothing is wrong with them.


class Busy(UserError):
    """Not now: the queue is full, the key asked too often, or the server starts or stops. `seconds` says when."""

    def __init__(self, message: str, seconds: float, status: int = 429) -> None:
        super().__init__(message)
        self.seconds, self.status = max(1, round(seconds + 0.5)), status


class OverQuota(UserError):
    """The owner's results and references take all the room that one may have."""
