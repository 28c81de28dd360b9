"""How often somebody may ask: a bucket of tries for each name, which fills up again evenly over a minute."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_NAMES = 10_000


class Rate:
    """At most `per_minute` tries a minute for each name, all at once if need be. 0 or less: no limit."""

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
