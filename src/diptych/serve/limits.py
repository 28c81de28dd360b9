"""Limits per client: the rate of requests, the images in memory at once, and fair turns in the queue."""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from diptych.errors import UserError


class Refused(UserError):
    """A rejected request, with its HTTP status and the seconds until a retry may succeed (0: a retry is useless)."""

    def __init__(self, code: str, message: str, status: int, seconds: int = 0) -> None:
        super().__init__(code, message)
        self.status, self.seconds = status, seconds


class Busy(Refused):
    """The server cannot accept a request now: a full queue, a rate limit, or a start or stop."""

    def __init__(self, message: str, seconds: float, status: int = 429, code: str = "server_busy") -> None:
        super().__init__(code, message, status, max(1, round(seconds + 0.5)))


MAX_NAMES = 10_000


class RateLimit:
    """A token bucket for each name: at most `per_minute` tries at once, refilled evenly over a minute. 0: no limit."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tries left, and when that was

    def take(self, name: str) -> float:
        """Uses a try and returns 0; returns the seconds until the next one if none is left."""
        if self.per_minute <= 0:
            return 0.0
        with self._lock:
            left = self._now(name)
            if left < 1:
                return (1 - left) * 60 / self.per_minute
            self._left[name] = (left - 1, self.clock())
            self._left.move_to_end(name)
            while len(self._left) > MAX_NAMES:
                self._left.popitem(last=False)
            return 0.0

    def _now(self, name: str) -> float:
        full = max(1.0, self.per_minute)
        left, when = self._left.get(name, (full, self.clock()))
        return min(full, left + (self.clock() - when) * self.per_minute / 60)


LARGE = 2_000_000  # pixels from which an image is large
P = ParamSpec("P")
Result = TypeVar("Result")
Item = TypeVar("Item")


class Lane:
    """One thread with a queue of at most `limit` tasks, half of them of one owner. `seconds` estimates one task."""

    def __init__(self, name: str, seconds: float, limit: int) -> None:
        self.seconds, self.limit = seconds, limit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"diptych-{name}")
        self._lock = threading.Lock()
        self._held: collections.Counter[str] = collections.Counter()

    def check(self, owner: str) -> None:
        """Raises Busy if the queue has no room for another task of this owner."""
        with self._lock:
            if self._held[owner] >= self.limit // 2 or self._held.total() >= self.limit:
                raise Busy("Too many images are waiting to be read.", self.seconds * max(1, self._held.total()), 503)

    def start(self, owner: str, task: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Future[Result]:
        """Queues a task. Busy if the queue is full."""
        self.check(owner)
        with self._lock:
            self._held[owner] += 1
        future = self._pool.submit(task, *args, **kwargs)
        future.add_done_callback(lambda _: self._release(owner))
        return future

    async def run(self, owner: str, task: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Queues a task and returns its result. Busy if the queue is full."""
        return await asyncio.wrap_future(self.start(owner, task, *args, **kwargs))

    def close(self) -> None:
        """Drops the tasks that wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _release(self, owner: str) -> None:
        with self._lock:
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]


class Lanes:
    """Threads for slow work: decoding images, checking masks, laying out pages.

    Other requests never wait behind it, nor small images behind large ones. Each thread has a short queue, shared
    between owners; a request beyond the limit is rejected with a time to retry.
    """

    def __init__(self) -> None:
        self.small, self.large = Lane("small", 0.1, 64), Lane("large", 3.0, 16)

    def of(self, pixels: int) -> Lane:
        """Returns the lane for an image size."""
        return self.large if pixels >= LARGE else self.small

    def close(self) -> None:
        """Closes both lanes."""
        self.small.close()
        self.large.close()


class FairShares:
    """Divides the work equally between the owners who wait, however much and how early each one sent.

    This is start-time fair queuing (Goyal, Vin and Cheng 1996), a weighted round-robin: the cost of an image counts,
    and an owner who returns after a pause has no claim on that time.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}  # owner → start of the next share
        self._now = 0.0  # start of the latest share

    def choose(self, waiting: Mapping[str, Sequence[tuple[Item, float]]], limit: int) -> list[tuple[str, Item]]:
        """Returns up to `limit` (owner, item) in turn. `waiting` has each owner's (item, cost) in order."""
        left = {owner: list(items) for owner, items in waiting.items() if items}
        order = {owner: place for place, owner in enumerate(left)}
        chosen: list[tuple[str, Item]] = []
        while left and len(chosen) < limit:
            owner = min(left, key=lambda name: (self._start(name), order[name]))
            item, cost = left[owner].pop(0)
            if not left[owner]:
                del left[owner]
            chosen.append((owner, item))
            self._now = self._start(owner)
            self._served[owner] = self._now + cost
        self._served = {owner: end for owner, end in self._served.items() if end > self._now}
        return chosen

    def first(self, owners: Sequence[str]) -> str:
        """Returns the owner whose turn it is; the first of equals."""
        return min(owners, key=self._start)

    def _start(self, owner: str) -> float:
        return max(self._now, self._served.get(owner, 0.0))
