"""Around the steps of a training: batches are made while the one before computes, and Ctrl-C waits for a step's end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from diptych.train.objective import Batch

log = logging.getLogger(__name__)


def ahead(assemble: Callable[[int], Batch], steps: range, device: torch.device) -> Iterator[Batch]:
    """The batches of these steps, in main memory, from where a GPU takes them fast; an accelerator computes while the
    next one is made."""
    if device.type == "cpu":
        # A second thread would only take cores from the step.
        for step in steps:
            yield assemble(step)
        return

    def pinned(step: int) -> Batch:
        return assemble(step).map(lambda tensor: tensor.pin_memory() if device.type == "cuda" else tensor)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(pinned, steps[0]) if steps else None
        for step in steps:
            assert following is not None
            batch = following.result()
            following = pool.submit(pinned, step + 1) if step < steps[-1] else None
            yield batch


class Interrupts:
    """Ctrl-C and SIGTERM are answered between two steps, when the weights are whole; a second one is not waited for."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        log.warning("stopping after this step; the run can be continued with the same command")
