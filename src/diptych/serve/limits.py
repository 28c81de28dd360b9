"""What one caller may take of the server: how often, how many images at once, and whose turn it is."""

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


class Busy(UserError):
    """Not now: the queue is full, the key asked too often, or the server starts or stops. `seconds` says when."""

    def __init__(self, message: str, seconds: float, status: int = 429) -> None:
        super().__init__("server_busy", message)
        self.seconds, self.status = max(1, round(seconds + 0.5)), status


class OverQuota(UserError):
    """The owner's results and references take all the room that one may have."""

    def __init__(self, message: str) -> None:
        super().__init__("quota_exceeded", message)


MOST_NAMES = 10_000


class RateLimit:
    """At most `per_minute` tries a minute for each name, all at once if need be: a bucket of tries for each name, which
    fills up again evenly over a minute. 0 or less: no limit."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tries left, and when that was

    def take(self, name: str) -> float:
        """0 if there was a try left, which is now used; else the seconds until there is one."""
        if self.per_minute <= 0:
            return 0.0
        with self._lock:
            left = self._now(name)
            if left < 1:
                return (1 - left) * 60 / self.per_minute
            self._left[name] = (left - 1, self.clock())
            self._left.move_to_end(name)
            while len(self._left) > MOST_NAMES:
                self._left.popitem(last=False)
            return 0.0

    def _now(self, name: str) -> float:
        most = max(1.0, self.per_minute)
        left, when = self._left.get(name, (most, self.clock()))
        return min(most, left + (self.clock() - when) * self.per_minute / 60)


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
    """The threads for what takes long: decoding images, checking masks, laying out pages. Other requests never wait
    behind it, and small images never behind large ones. Each thread has a short queue, of which one owner gets a part;
    a request beyond the limit is rejected with a time to retry."""

    def __init__(self) -> None:
        self.small, self.large = Lane("small", 0.1, 64), Lane("large", 3.0, 16)

    def of(self, pixels: int) -> Lane:
        """The lane of an image."""
        return self.large if pixels >= LARGE else self.small

    def close(self) -> None:
        """Closes both."""
        self.small.close()
        self.large.close()


Item = TypeVar("Item")


class FairShares:
    """The work done for each owner so far, as far as it still matters.

    Every owner who waits gets an equal share of the work, whoever sent how much how early. This is start-time fair
    queuing (Goyal, Vin and Cheng 1996), a weighted round-robin: what an image costs counts, and who comes back after a
    pause has no claim on the time before.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}  # owner → where the next share begins
        self._now = 0.0  # where the latest share began

    def choose(self, waiting: Mapping[str, Sequence[tuple[Item, float]]], most: int) -> list[tuple[str, Item]]:
        """Up to `most` items in turn, of the owners' (item, cost) each in its order, and their owners."""
        left = {owner: list(items) for owner, items in waiting.items() if items}
        order = {owner: place for place, owner in enumerate(left)}
        chosen: list[tuple[str, Item]] = []
        while left and len(chosen) < most:
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
        """The owner whose turn it is; of equal ones the first."""
        return min(owners, key=self._start)

    def _start(self, owner: str) -> float:
        return max(self._now, self._served.get(owner, 0.0))
