"""How much texts repeat each other: near duplicates in a shard and in a run, and the diversity of a run's prompts.

    accepted = NearDuplicates(limit=0.5)
    accepted.add("p-000001", "a red fox asleep on a rock")  # None: no similar text yet, so this one is added

Texts are compared by their shingles (pairs of neighboring words): Broder, On the resemblance and containment of
documents, 1997. A shard has hundreds of drafts, so the overlap is counted exactly, without MinHash.

A language model's drafts are compared within their shard when they are written (`llm_writer`). Two shards are written
separately, perhaps on two machines, and may have the same idea. So all prompts of a run are compared again before they
are published (`remove_repeats`): by their words without those of the task's templates, in row order, and the earlier
prompt stays. Repeated, for instance after a kill, this ends with the same rows.
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
SAMPLE = 1000  # texts from which the diversity of a run is measured
_WORD = re.compile(r"\w+")
Shingle = tuple[str, ...]
Shingles = frozenset[Shingle]
_NONE: Shingles = frozenset()


def shingles(text: str) -> Shingles:
    """Return a text's word pairs, in lower case and without punctuation, or its only word."""
    words = _WORD.findall(text.casefold())
    size = min(WORDS, len(words))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1)) if words else _NONE


def resemblance(first: Shingles, second: Shingles) -> float:
    """Return the Jaccard similarity of two sets, 0 to 1. Two empty sets are equal."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0


class NearDuplicates:
    """A set of texts. One that resembles an earlier text by more than `limit` is not added.

    The result depends on the order: callers add texts in row order. Shingles in `ignored` are not compared. `counts`
    has the number of texts with each shingle and speeds up the search among many texts. Two similar sets share one of
    their rarest shingles, so only these are looked up (prefix filtering: Chaudhuri et al., A primitive operator for
    similarity joins, 2006).
    """

    def __init__(self, limit: float, counts: Mapping[Shingle, int] | None = None, ignored: Shingles = _NONE) -> None:
        self.limit = limit
        self._counts = counts or {}
        self._ignored = ignored
        self._kept: list[tuple[str, Shingles]] = []
        self._holders: defaultdict[Shingle, list[int]] = defaultdict(list)

    def add(self, name: str, text: str) -> tuple[str, float] | None:
        """Add a text and return None, or return (name, resemblance) of the earlier text that it is too similar to."""
        new = shingles(text) - self._ignored
        rarest = self._rarest(new)
        highest, nearest = 0.0, ""
        for place in sorted({place for shingle in rarest for place in self._holders.get(shingle, ())}):
            other, others = self._kept[place]
            if (similarity := resemblance(new, others)) > highest:
                highest, nearest = similarity, other
        if highest > self.limit:
            return nearest, highest
        for shingle in rarest:
            self._holders[shingle].append(len(self._kept))
        self._kept.append((name, new))
        return None

    def _rarest(self, new: Shingles) -> list[Shingle]:
        """Return the rarest shingles: enough of them that every set which is too similar has one of them."""
        count = len(new) - math.ceil(self.limit * len(new)) + 1
        return sorted(new, key=lambda shingle: (self._counts.get(shingle, 0), shingle))[:count] if new else []


def repeated(texts: Sequence[str]) -> bool:
    """Whether two texts have the same words, whatever their case and punctuation."""
    return len({tuple(_WORD.findall(text.casefold())) for text in texts}) < len(texts)


def reason(near: tuple[str, float], limit: float) -> str:
    """Return the reason for which a text too similar to another is left out."""
    return f"near duplicate of {near[0]} (resemblance {near[1]:.2f}, limit {limit:g})"


@dataclass(frozen=True)
class Spread:
    """How varied texts are.

    For equal texts `distinct` is 1 / `texts` and `distance` is 0. Without common word pairs both are 1.
    """

    texts: int
    distinct: float
    """Share of different shingles among the shingles of all texts."""
    distance: float
    """Mean of 1 - resemblance over pairs of texts."""

    def values(self) -> dict[str, float]:
        """Return rounded, plain values."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def measure(texts: Iterable[str], count: int, sample: int = SAMPLE) -> Spread:
    """Measure the diversity of `count` texts from at most `sample` of them, evenly spaced. Others are not stored.

    Each text is compared with those one, two, four, … places after it, and from the end on with the first ones. These
    are about ten pairs a text, and always the same ones.
    """
    wanted = {count * i // sample for i in range(sample)} if count > sample else range(count)
    sets = [shingles(text) for place, text in enumerate(texts) if place in wanted]
    pairs = sum(len(one) for one in sets)
    distinct = len(frozenset().union(*sets)) / pairs if pairs else 0.0
    steps = [2**power for power in range(20) if 2**power < len(sets)]
    apart = [1 - resemblance(one, sets[(place + step) % len(sets)]) for place, one in enumerate(sets) for step in steps]
    return Spread(count, distinct, sum(apart) / len(apart) if apart else 0.0)


def remove_repeats(prompts: Dataset, failed: Dataset, task: Task, layout: Grid, limit: float, fingerprint: str) -> int:
    """Move near duplicates from `prompts` to `failed` and return their number. All shards must exist."""
    ignored = _template_shingles(task, layout)
    counts = Counter(shingle for _, text in _texts(prompts) for shingle in shingles(text) - ignored)
    accepted = NearDuplicates(limit, counts, ignored)
    near = ((name, accepted.add(name, text)) for name, text in _texts(prompts))
    reasons = {name: reason(earlier, limit) for name, earlier in near if earlier is not None}
    if reasons:
        _move(prompts, failed, reasons, fingerprint)
    return len(reasons)


def _texts(prompts: Dataset) -> Iterator[tuple[str, str]]:
    for _, _, batch in batches(prompts, "id", "prompt"):
        yield from zip(batch["id"], batch["prompt"], strict=True)


def _template_shingles(task: Task, layout: Grid) -> Shingles:
    """Return the shingles of the task's templates, which its prompts share."""
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
        # Failures first, as in every stage: after a kill a row may be in both, and is then moved again.
        failed.write_shard(shard, [merged[name] for name in sorted(merged)], fingerprint)
        prompts.write_shard(shard, [row for row in rows if row["id"] not in reasons], fingerprint)
