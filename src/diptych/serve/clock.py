"""The time that jobs are stamped with. The computer's clock may jump, and results must not expire because of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

JUMP = 60.0  # seconds; a smaller difference is an ordinary correction
SETTLE = 600.0  # seconds without a jump until a clock is believed


class Clock:
    """Seconds since 1970 that pass evenly. A jump of the wall clock counts once it has lasted `settle` seconds."""

    def __init__(
        self,
        settle: float = SETTLE,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settle, self._wall, self._steady = settle, wall, steady
        self._lock = threading.Lock()
        self._since = steady()  # no jump has been seen after this
        self._believed = self._seen = wall() - self._since

    def now(self) -> float:
        """Seconds since 1970."""
        with self._lock:
            return self._look() + self._believed

    def settled(self) -> bool:
        """Whether the wall clock has not jumped for `settle` seconds, so that things may expire by it."""
        with self._lock:
            return self._look() - self._since >= self.settle

    def _look(self) -> float:
        now = self._steady()
        offset = self._wall() - now
        if abs(offset - self._seen) > JUMP:
            self._since = now
        self._seen = offset
        if abs(offset - self._believed) <= JUMP or now - self._since >= self.settle:
            self._believed = offset
        return now
