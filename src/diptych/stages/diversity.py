"""How much texts repeat each other: near duplicates among a shard's drafts, and the spread of a run's prompts.

    guard = Guard(limit=0.5)
    guard.near("p-000001", "a red fox asleep on a rock")  # None: nothing like it was let in; it is now

Texts are compared by their shingles (pairs of neighbouring words): Broder, On the resemblance and containment of
documents, 1997. A shard holds hundreds of drafts, so the overlap is counted exactly, and needs no MinHash.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

WORDS = 2  # of a shingle
SAMPLE = 1000  # texts that the spread of a run is taken over
_WORD = re.compile(r"\w+")
Shingles = frozenset[tuple[str, ...]]


def shingles(text: str) -> Shingles:
    """A text's word pairs, in lower case and without punctuation; its single word if it has but one."""
    words = _WORD.findall(text.casefold())
    size = min(WORDS, len(words))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1)) if words else _NONE


_NONE: Shingles = frozenset()


def resemblance(first: Shingles, second: Shingles) -> float:
    """Jaccard's: what two texts share of all that either says, 0 to 1. Two empty texts are the same."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0


class Guard:
    """Texts let in so far. One that resembles an earlier one by more than `limit` is not let in.

    What is kept depends on the order in which texts are shown: callers show them in row order.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._kept: list[tuple[str, Shingles]] = []
        self._holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def near(self, name: str, text: str) -> tuple[str, float] | None:
        """(name, resemblance) of the most alike earlier text if it is too alike; else None, and the text is let in."""
        own = shingles(text)
        shared = Counter(place for shingle in own for place in self._holders[shingle])
        worst, found = 0.0, ""
        for place in sorted(shared):
            other, others = self._kept[place]
            alike = shared[place] / (len(own) + len(others) - shared[place])
            if alike > worst:
                worst, found = alike, other
        if worst > self.limit:
            return found, worst
        for shingle in own:
            self._holders[shingle].append(len(self._kept))
        self._kept.append((name, own))
        return None


@dataclass(frozen=True)
class Spread:
    """How varied texts are. All the same: `distinct` is 1 / texts and `distance` 0; nothing shared: both are 1."""

    texts: int
    distinct: float
    """Different shingles, as a share of the shingles of all texts."""
    distance: float
    """Mean of 1 - resemblance over pairs of texts."""

    def values(self) -> dict[str, float]:
        """As plain values, rounded."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def spread(texts: Iterable[str], count: int, sample: int = SAMPLE) -> Spread:
    """The spread of `count` texts, over at most `sample` of them, evenly picked; no others are held.

    Each is compared with its next neighbours, one, two, four, … further, round the end: some ten pairs a text, and the
    same ones each time.
    """
    wanted = {count * i // sample for i in range(sample)} if count > sample else range(count)
    sets = [shingles(text) for place, text in enumerate(texts) if place in wanted]
    pairs = sum(len(one) for one in sets)
    distinct = len(frozenset().union(*sets)) / pairs if pairs else 0.0
    steps = [2**power for power in range(20) if 2**power < len(sets)]
    apart = [1 - resemblance(one, sets[(place + step) % len(sets)]) for place, one in enumerate(sets) for step in steps]
    return Spread(count, distinct, sum(apart) / len(apart) if apart else 0.0)
