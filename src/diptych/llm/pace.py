"""When the next request may be sent: rate limits, waits that a server requests, pauses before a retry, and time-outs.

HTTP libraries apply a time-out to each read, and a server that sends a byte now and then never exceeds it. `Network`
limits the whole request: each read, write and handshake gets no more time than the request of its thread has left.
"""

from __future__ import annotations

import importlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from diptych.llm.endpoint import Endpoint

MAX_PAUSE = 60.0  # seconds between two tries, unless the server requests more


class Pacing(Protocol):
    """What a client asks before and after each request: a `Pace`, or one that the workers of a cluster share."""

    def book(self, estimate: float) -> tuple[float, float]: ...
    def correct(self, booked: float, spent: int) -> None: ...
    def hold(self, seconds: float) -> None: ...
    def held(self) -> float: ...


class Pace:
    """Spaces requests evenly, so that no minute has more than the limits. Threads share it; it never sleeps.

    The tokens of a call are known after it. Until then, the call is booked at the mean of the calls before it (the
    first ones at an estimate), and `correct` replaces that number.
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

    def book(self, estimate: float) -> tuple[float, float]:
        """Return (seconds to wait before sending, tokens booked) for a call of about `estimate` tokens."""
        with self._lock:
            now = self._clock()
            tokens = self._tokens / self._calls if self._calls else estimate
            at = max(now, self._next_request, self._next_token, self._held)
            # Without a limit the time of a call is not stored: the booking of the other limit may be corrected.
            if self._per_request:
                self._next_request = at + self._per_request
            if self._per_token:
                self._next_token = at + tokens * self._per_token
            return at - now, tokens

    def correct(self, booked: float, spent: int) -> None:
        """Replace a booking by the real number of tokens: 0 for a call that failed or was not metered."""
        with self._lock:
            self._next_token += (spent - booked) * self._per_token
            if spent:
                self._calls += 1
                self._tokens += spent

    def hold(self, seconds: float) -> None:
        """Send nothing for `seconds`, because the server requests it."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)

    def held(self) -> float:
        """Return the seconds until the next request may be sent."""
        with self._lock:
            return max(0.0, self._held - self._clock())


_shared: dict[tuple[str, str], Pacing] = {}


def share(base_url: str, model: str, pace: Pacing) -> None:
    """Make all later clients of the endpoint in this process use `pace`, because other processes use it too."""
    _shared[base_url, model] = pace


def pace_of(endpoint: Endpoint) -> Pacing:
    """Return the pace that is shared for the endpoint, or else a new one with its limits."""
    return _shared.get((endpoint.base_url, endpoint.model)) or Pace(
        endpoint.requests_per_minute, endpoint.tokens_per_minute
    )


def pause(attempt: int, first: float) -> float:
    """Return the seconds before try `attempt` + 1 (the first is 0): doubled each time, then 50 to 100 % of that."""
    return min(MAX_PAUSE, first * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header (a number or a date); None if it is absent or not understood."""
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


class Network:
    """The network of an httpx or httpx2 client, with a deadline for each thread's request."""

    def __init__(self, client: Any) -> None:
        self._threads = threading.local()
        for transport in (client._transport, *client._mounts.values()):
            pool = getattr(transport, "_pool", None)
            if pool is not None:
                self._core = importlib.import_module(type(pool).__module__.partition(".")[0])
                pool._network_backend = _Backend(pool._network_backend, self)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit everything that this thread sends and receives inside the block to `seconds` in total."""
        self._threads.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._threads.until = None

    def left(self, timeout: float | None) -> float | None:
        """Return a time-out that ends with the request. Raises the library's ReadTimeout if that time is over."""
        until = getattr(self._threads, "until", None)
        if until is None:
            return timeout
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise self._core.ReadTimeout("the request took too long")
        return seconds if timeout is None else min(timeout, seconds)


class _Backend:
    """A network backend that opens `_Stream` connections."""

    def __init__(self, inner: Any, network: Network) -> None:
        self._inner, self._network = inner, network

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **more: Any) -> _Stream:
        inner = self._inner.connect_tcp(host, port, timeout=self._network.left(timeout), **more)
        return _Stream(inner, self._network)


class _Stream:
    """A connection whose every step ends with the request."""

    def __init__(self, inner: Any, network: Network) -> None:
        self._inner, self._network = inner, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, timeout=self._network.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout=self._network.left(timeout))

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        inner = self._inner.start_tls(ssl_context, server_hostname, self._network.left(timeout))
        return _Stream(inner, self._network)

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
