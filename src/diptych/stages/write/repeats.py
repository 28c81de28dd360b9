"""Takes out of a run's prompts those that nearly repeat an earlier one, wherever in the run that is.

A language model's drafts are compared within their shard when they are written (`llm_writer`); two shards are written
apart, on two machines perhaps, and may have the same idea. So all of them are compared once more before the prompts
are published: by their words without those of the task's own wordings, in row order, the earlier one stays. Done again,
after a kill for instance, it ends with the same rows.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator

from diptych.data.engine import failed_row
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.recipe.tasks import Grid, Task
from diptych.stages.write import diversity, wording


def take_out(prompts: Dataset, failed: Dataset, task: Task, layout: Grid, limit: float, fingerprint: str) -> int:
    """Moves near duplicates from `prompts` to `failed`; returns how many. All shards must be there."""
    ignored = _of_wordings(task, layout)
    often = Counter(shingle for _, text in _texts(prompts) for shingle in diversity.shingles(text) - ignored)
    guard = diversity.Guard(limit, often, ignored)
    reasons: dict[str, str] = {}
    for name, text in _texts(prompts):
        if (near := guard.near(name, text)) is not None:
            reasons[name] = diversity.reason(near, limit)
    if reasons:
        _move(prompts, failed, reasons, fingerprint)
    return len(reasons)


def _texts(prompts: Dataset) -> Iterator[tuple[str, str]]:
    for _, _, batch in batches(prompts, "id", "prompt"):
        yield from zip(batch["id"], batch["prompt"], strict=True)


def _of_wordings(task: Task, layout: Grid) -> diversity.Shingles:
    """What every prompt of the task says."""
    templates = [*layout.templates, layout.panel, task.panel_template]
    literal = [text for template in templates for text, *_ in string.Formatter().parse(template)]
    return frozenset().union(*map(diversity.shingles, (*literal, *wording.positions(layout))))


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
