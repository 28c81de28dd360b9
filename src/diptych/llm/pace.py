"""When the next request may go out: rate limits, waits that a server asks for, and pauses before a retry."""

from __future__ import annotations

import importlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

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


# A time-out for a whole request. HTTP libraries have one for each read, which a server that sends a byte now and then
# never exceeds. Every connection of a client gets its network from `Network`, which gives each read, write and
# handshake no more time than the request of its thread has left.


class Network:
    """The network of an httpx client (either of its names), with a deadline for each thread's request."""

    def __init__(self, client: Any) -> None:
        self._threads = threading.local()
        for transport in (client._transport, *client._mounts.values()):
            pool = getattr(transport, "_pool", None)
            if pool is not None:
                self._core = importlib.import_module(type(pool).__module__.partition(".")[0])
                pool._network_backend = _Backend(pool._network_backend, self)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Inside, nothing that this thread sends or receives ends later."""
        self._threads.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._threads.until = None

    def left(self, timeout: float | None) -> float | None:
        """A time-out that ends with the request. The library's ReadTimeout if that is over."""
        until = getattr(self._threads, "until", None)
        if until is None:
            return timeout
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise self._core.ReadTimeout("the request took too long")
        return seconds if timeout is None else min(timeout, seconds)


class _Backend:
    """A network backend that gives out `_Stream`s."""

    def __init__(self, inner: Any, network: Network) -> None:
        self._inner, self._network = inner, network

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **more: Any) -> _Stream:
        inner = self._inner.connect_tcp(host, port, timeout=self._network.left(timeout), **more)
        return _Stream(inner, self._network)

    def connect_unix_socket(self, path: str, timeout: float | None = None, **more: Any) -> _Stream:
        inner = self._inner.connect_unix_socket(path, timeout=self._network.left(timeout), **more)
        return _Stream(inner, self._network)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


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
