"""Whose turn it is: every owner who waits gets an equal share of the work, whoever sent how much how early.

This is start-time fair queuing (Goyal, Vin and Cheng 1996), a weighted round-robin: what an image costs counts, and who
comes back after a pause has no claim on the time before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Shares:
    """The work done for each owner so far, as far as it still matters."""

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
