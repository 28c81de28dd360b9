"""A time-out for a whole request. HTTP libraries have one for each read, which a server that sends a byte now and then
never exceeds.

Every connection of a client gets its network from `Network`, which gives each read, write and handshake no more time
than the request of its thread has left.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
