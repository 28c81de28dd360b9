"""When the next request may go out: rate limits, waits that a server asks for, and pauses before a retry."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more


class Pace:
    """Spaces requests evenly, so that no minute holds more than is allowed. Shared by threads; it never sleeps itself.

    A call's tokens are known after it. Until then it is booked at the mean of the calls before it, the first ones at a
    rough guess, and put right by `correct`.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._next_request = self._next_token = self._held = float("-inf")
        self._calls = self._tokens = 0

    def book(self, guess: float) -> tuple[float, float]:
        """(seconds to wait before sending, tokens booked) for a call of about `guess` tokens."""
        with self._lock:
            now = self._clock()
            tokens = self._tokens / self._calls if self._calls else guess
            at = max(now, self._next_request, self._next_token, self._held)
            # A limit that there is not must not remember when a call went out: the other one may be given back.
            if self._per_request:
                self._next_request = at + self._per_request
            if self._per_token:
                self._next_token = at + tokens * self._per_token
            return at - now, tokens

    def correct(self, booked: float, spent: int) -> None:
        """What a booked call really took; 0 for one that failed or was not metered."""
        with self._lock:
            self._next_token += (spent - booked) * self._per_token
            if spent:
                self._calls += 1
                self._tokens += spent

    def hold(self, seconds: float) -> None:
        """Nothing goes out for so long: the server said so."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)

    def held(self) -> float:
        """Seconds until it may."""
        with self._lock:
            return max(0.0, self._held - self._clock())


def pause(attempt: int, first: float) -> float:
    """Seconds before try `attempt` + 1 (the first is 0): doubled each time, between half and all of it."""
    return min(LONGEST_PAUSE, first * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date); None if there is none to understand."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None
