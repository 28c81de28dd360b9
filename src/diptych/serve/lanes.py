"""Threads of their own for what takes long: decoding images, checking masks, laying out pages.

Other requests never wait behind it. Large images have a thread apart from small ones, so that a small one waits for
small ones alone. Each thread has a short queue, of which one owner gets a part; who finds it full is told to come
again.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from diptych.serve.refusals import Busy

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
