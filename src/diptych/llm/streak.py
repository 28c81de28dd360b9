"""Stops a run whose questions get no valid answer, one after the other: no reply, empty replies, or useless ones."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from diptych.errors import UserError
from diptych.llm.cache import Cache
from diptych.llm.outcome import Outcome

SHOWN = 120  # characters of a useless reply in the error


@dataclass
class Streak:
    """Counts questions in a row without a valid answer. `most` of them are a UserError; 0 is never. Threads may share
    it. Answers from the cache say nothing about the model now, and do not count."""

    who: str
    most: int
    cache: Cache | None
    remedy: str
    failed: str = "got no answer"
    _keys: list[str] = field(default_factory=list)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: Outcome) -> None:
        """Takes a question's outcome in. When the streak ends the run, its replies are forgotten, and so are those
        still under way that are no better: the next run asks for them again."""
        if outcome.cached or not outcome.keys:
            return
        with self._lock:
            if outcome.status == "answered":
                self._count, self._keys = 0, []
                return
            self._count += 1
            self._keys += outcome.keys
            if not 0 < self.most <= self._count:
                return
            count, keys, self._keys = self._count, self._keys, []
        if self.cache is not None:
            self.cache.drop(keys)
        came = " ".join(outcome.text.split())
        came = "".join(char for char in came if char.isprintable())
        shown = f"; it said '{came[:SHOWN]}{'…' if len(came) > SHOWN else ''}'" if came else ""
        none = self.failed if outcome.status == "failed" else "got no valid answer"
        why = f"the last because {outcome.reason}{shown}"
        raise UserError(f"{self.who}: {count} questions in a row {none}, {why}; {self.remedy}")
