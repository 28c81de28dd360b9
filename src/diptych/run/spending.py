"""The cost of a run so far, for its progress: hours of the machines at a price, and its language models.

    display.cost = Spending(folder, recipe, hour_price=2.5).text  # "12.40 spent"

The hours are those in the run's log, which has every stage that ended or was interrupted, and those since the start of
this process. A start that was killed is not in the log. The recipe has the prices of language models
(`data.bill`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from diptych.data import places
from diptych.data.bill import bill
from diptych.recipe.schema import Recipe


class Spending:
    """Hours, calls and money of a run."""

    def __init__(self, folder: str | Path, recipe: Recipe, hour_price: float | None = None) -> None:
        """`hour_price` is the price of an hour of the machines. Without one, only language models cost money."""
        self.folder, self.recipe, self.hour_price = folder, recipe, hour_price
        ended = (event for event in places.read(folder) if event.get("event") in ("stage", "stopped"))
        self.earlier = sum(event.get("seconds", 0.0) for event in ended)
        self.started = time.monotonic()
        self.asks = recipe.write.writer == "llm" or recipe.curate.vlm is not None

    def money(self) -> float | None:
        """Money so far. None if nothing has a price, or if a language model has none."""
        spent = [] if self.hour_price is None else [self.hour_price * self.hours()]
        spent += [item["money"] for item in self._bill()]
        return None if not spent or None in spent else sum(spent)

    def hours(self) -> float:
        """Hours of all starts of the run."""
        return (self.earlier + time.monotonic() - self.started) / 3600

    def text(self) -> str:
        """`12.40 spent`, or `1,204 calls` for models without a price; empty for a run that costs nothing but time."""
        if (money := self.money()) is not None:
            return f"{money:,.2f} spent"
        calls = sum(item["calls"] for item in self._bill())
        return f"{calls:,} calls" if calls else ""

    def _bill(self) -> list[dict[str, Any]]:
        return bill(self.folder, self.recipe) if self.asks else []
