"""How much texts repeat each other: near duplicates in a shard and in a run, and the spread of a run's prompts.

    guard = Guard(limit=0.5)
    guard.near("p-000001", "a red fox asleep on a rock")  # None: nothing like it was let in; it is now

Texts are compared by their shingles (pairs of neighbouring words): Broder, On the resemblance and containment of
documents, 1997. A shard holds hundreds of drafts, so the overlap is counted exactly, and needs no MinHash.

A language model's drafts are compared within their shard when they are written (`llm_writer`); two shards are written
apart, on two machines perhaps, and may have the same idea. So all prompts of a run are compared once more before they
are published (`take_out`): by their words without those of the task's own wordings, in row order, the earlier one
stays. Done again, after a kill for instance, it ends with the same rows.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from diptych.data.engine import failed_row
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.recipe.tasks import Grid, Task
from diptych.stages.write import grammar

WORDS = 2  # of a shingle
SAMPLE = 1000  # texts that the spread of a run is taken over
_WORD = re.compile(r"\w+")
Shingle = tuple[str, ...]
Shingles = frozenset[Shingle]
_NONE: Shingles = frozenset()


def shingles(text: str) -> Shingles:
    """A text's word pairs, in lower case and without punctuation; its single word if it has but one."""
    words = _WORD.findall(text.casefold())
    size = min(WORDS, len(words))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1)) if words else _NONE


def resemblance(first: Shingles, second: Shingles) -> float:
    """Jaccard's: what two texts share of all that either says, 0 to 1. Two empty texts are the same."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0


class Guard:
    """Texts let in so far. One that resembles an earlier one by more than `limit` is not let in.

    What is kept depends on the order in which texts are shown: callers show them in row order. Shingles in `ignored`
    do not count. `often` says how many texts have a shingle, and makes the search quick among many texts: two sets
    that are alike share one of their rarest shingles (prefix filtering: Chaudhuri et al., A primitive operator for
    similarity joins, 2006), so only those are looked up.
    """

    def __init__(self, limit: float, often: Mapping[Shingle, int] | None = None, ignored: Shingles = _NONE) -> None:
        self.limit = limit
        self._often = often or {}
        self._ignored = ignored
        self._kept: list[tuple[str, Shingles]] = []
        self._holders: defaultdict[Shingle, list[int]] = defaultdict(list)

    def near(self, name: str, text: str) -> tuple[str, float] | None:
        """(name, resemblance) of the most alike earlier text if it is too alike; else None, and the text is let in."""
        own = shingles(text) - self._ignored
        rarest = self._rarest(own)
        worst, found = 0.0, ""
        for place in sorted({place for shingle in rarest for place in self._holders.get(shingle, ())}):
            other, others = self._kept[place]
            if (alike := resemblance(own, others)) > worst:
                worst, found = alike, other
        if worst > self.limit:
            return found, worst
        for shingle in rarest:
            self._holders[shingle].append(len(self._kept))
        self._kept.append((name, own))
        return None

    def _rarest(self, own: Shingles) -> list[Shingle]:
        """So many of a set's shingles that any set which is too alike has one of them among its own."""
        count = len(own) - math.ceil(self.limit * len(own)) + 1
        return sorted(own, key=lambda shingle: (self._often.get(shingle, 0), shingle))[:count] if own else []


def repeated(texts: Sequence[str]) -> bool:
    """Whether two texts have the same words, whatever their case and punctuation."""
    return len({tuple(_WORD.findall(text.casefold())) for text in texts}) < len(texts)


def reason(near: tuple[str, float], limit: float) -> str:
    """Why a text that is too near to another is left out."""
    return f"near duplicate of {near[0]} (resemblance {near[1]:.2f}, limit {limit:g})"


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


def take_out(prompts: Dataset, failed: Dataset, task: Task, layout: Grid, limit: float, fingerprint: str) -> int:
    """Moves near duplicates from `prompts` to `failed`; returns how many. All shards must be there."""
    ignored = _of_wordings(task, layout)
    often = Counter(shingle for _, text in _texts(prompts) for shingle in shingles(text) - ignored)
    guard = Guard(limit, often, ignored)
    reasons: dict[str, str] = {}
    for name, text in _texts(prompts):
        if (near := guard.near(name, text)) is not None:
            reasons[name] = reason(near, limit)
    if reasons:
        _move(prompts, failed, reasons, fingerprint)
    return len(reasons)


def _texts(prompts: Dataset) -> Iterator[tuple[str, str]]:
    for _, _, batch in batches(prompts, "id", "prompt"):
        yield from zip(batch["id"], batch["prompt"], strict=True)


def _of_wordings(task: Task, layout: Grid) -> Shingles:
    """What every prompt of the task says."""
    templates = [*layout.templates, layout.panel, task.panel_template]
    literal = [text for template in templates for text, *_ in string.Formatter().parse(template)]
    return frozenset().union(*map(shingles, (*literal, *grammar.positions(layout))))


def _move(prompts: Dataset, failed: Dataset, reasons: dict[str, str], fingerprint: str) -> None:
    before = set(failed.shards())
    for shard in prompts.shards():
        rows = prompts.read_shard(shard)
        repeats = [failed_row("write", row, reasons[row["id"]]) for row in rows if row["id"] in reasons]
        if not repeats:
            continue
        known = failed.read_shard(shard) if shard in before else []
        merged = {row["id"]: row for row in (*known, *repeats)}
        # Failures first, as everywhere: a row may be in both after a kill, and then is moved again.
        failed.write_shard(shard, [merged[name] for name in sorted(merged)], fingerprint)
        prompts.write_shard(shard, [row for row in rows if row["id"] not in reasons], fingerprint)
