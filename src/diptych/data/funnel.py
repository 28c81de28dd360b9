"""The funnel of a run: prompted → painted → cut → pre-filtered → judged → kept, with the reasons of losses.

    for line in format_report(measure("runs/first")): print(line)

Reads the scores that the stages stored, in batches and without images. An incomplete run is measured as far as it is.
Each lost row is counted once, at the step whose test it failed first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data import bill as bills
from diptych.data import places, records, verdicts
from diptych.data.scan import batches, open_run, selected
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.utils.console import one_line

# A rejection by the seam concerns the grid, the next two need the judge, and all others (copies, misaligned panels, …)
# need no judge.
OF_THE_CUT = ("seam",)
UNDECIDED = "undecided"
BY_THE_JUDGE = (verdicts.DIFFERENT, UNDECIDED)
# The selection follows all judging. It rejects repeats and what people rejected, although those candidates say "kept".
# What people accepted counts as kept.
OF_THE_SELECTION = (verdicts.DUPLICATE, verdicts.REJECTED)

NUMBERS = {"similarity": "same", "copy_distance": "near_copy", "seam": "seam"}  # column → its threshold
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 12
MAX_NAMES = 10_000  # kinds or reasons; further ones are counted together, so that memory stays constant
SHOWN = 12  # names in the text
OTHERS = "(others)"


def reached_judge(reason: str) -> bool:
    """Whether a candidate with this `reason` reached the judge's decision."""
    return reason == "kept" or reason.partition(":")[0] in BY_THE_JUDGE


class Tally(Counter[str]):
    """Counts of at most `MAX_NAMES` names."""

    def put(self, name: str, times: int = 1) -> None:
        """Counts a name, or `OTHERS` if there are too many."""
        self[name if name in self or len(self) < MAX_NAMES else OTHERS] += times


def measure(run_dir: str | Path) -> dict[str, Any]:
    """The values of `diptych data stats`. UsageError if the folder is not a run or has no rows."""
    folder, recipe, task = open_run(run_dir)
    limits = task.thresholds(recipe.curate.thresholds)
    sets = {name: Dataset(folder / name) for name in ("prompts", "grids", "candidates", "pairs")}
    rows = {name: len(data) for name, data in sets.items()}
    if not rows["prompts"] and not rows["candidates"]:
        message = f"{folder} has no rows yet; first: diptych write {folder}/recipe.yaml --out {folder}"
        raise UsageError("run_empty", message)
    seen = _candidates(folder)
    failed = {stage: _failures(folder, stage) for stage in ("write", "paint", "curate")}
    return {
        "run": str(folder),
        "recipe": recipe.name,
        "task": task.name,
        "complete": {name: data.is_complete() for name, data in sets.items()},
        "rows": rows,
        "steps": _steps(recipe.write.count, recipe.paint.images, rows, failed, seen),
        "numbers": {
            column: _numbers(*seen.numbers[column], getattr(limits, threshold))
            for column, threshold in NUMBERS.items()
            if seen.numbers[column][0].count
        },
        "balance": {"subject": _balance(*seen.subjects), "task": _balance(*seen.tasks)},
        "spread": _spread(folder),
        "asked": bills.bill(folder, recipe),
    }


def _spread(folder: Path) -> dict[str, float] | None:
    """Diversity of the prompts (`stages.write.diversity.Spread`) that the writer logged last; None for a grammar."""
    logged = [event.get("result", {}).get("spread") for event in places.read(folder) if event.get("stage") == "write"]
    return next((spread for spread in reversed(logged) if spread), None)


class _Seen:
    """Counts of one pass over the candidates. Of two counts, the first is of all pairs, the second of accepted ones."""

    def __init__(self) -> None:
        self.pairs = 0
        self.grids = 0
        self.cut_grids = 0
        self.reasons = Tally()
        self.subjects = (Tally(), Tally())
        self.tasks = (Tally(), Tally())
        self.numbers = {column: (Distribution(), Distribution()) for column in NUMBERS}


def _candidates(folder: Path) -> _Seen:
    seen = _Seen()
    last, last_is_cut = None, False  # rows of one grid are consecutive
    for batch in selected(folder, "grid_id", "subject", "task", *NUMBERS):
        seen.pairs += len(batch["reason"])
        for grid, reason in zip(batch["grid_id"], batch["reason"], strict=True):
            if grid != last:
                last, last_is_cut = grid, False
                seen.grids += 1
            if not last_is_cut and reason not in OF_THE_CUT:
                last_is_cut = True
                seen.cut_grids += 1
        for reason, times in Counter(batch["reason"]).items():
            seen.reasons.put(reason, times)
        for column, (every, kept) in (("subject", seen.subjects), ("task", seen.tasks)):
            for name, times in Counter(batch[column]).items():
                every.put(name, times)
            for name, times in Counter(n for n, k in zip(batch[column], batch["kept"], strict=True) if k).items():
                kept.put(name, times)
        for column, (every, kept) in seen.numbers.items():
            every.add(batch[column])
            kept.add([value for value, keep in zip(batch[column], batch["kept"], strict=True) if keep])
    return seen


def _failures(folder: Path, stage: str) -> Tally:
    reasons = Tally()
    for _, _, batch in batches(Dataset(folder / "failed" / stage, records.schema(records.FAILED)), "reason"):
        for reason, times in Counter(batch["reason"]).items():
            reasons.put(reason, times)
    return reasons


def _steps(
    requested: int, images: int, rows: dict[str, int], failed: dict[str, Tally], seen: _Seen
) -> list[dict[str, Any]]:
    """The steps in order: how many rows are left, of how many, the losses by reason, and how many are still to come. A
    prompt counts once for each of its `images`."""
    prompts, grids = images * rows["prompts"], rows["grids"]
    written, painted = (Tally({why: images * n for why, n in failed[stage].items()}) for stage in ("write", "paint"))
    lost_at: dict[str, Tally] = {"cut": Tally(), "pre-filtered": Tally(), "judged": Tally(), "kept": Tally()}
    of_cut = 0
    for reason, times in seen.reasons.items():
        if reason in OF_THE_CUT:
            of_cut += times
            lost_at["cut"].put(reason, seen.grids - seen.cut_grids)
        elif reason.partition(":")[0] == UNDECIDED:
            lost_at["judged"].put(reason, times)
        elif reason != "kept":
            at_last = reason.partition(":")[0] in (*BY_THE_JUDGE, *OF_THE_SELECTION)
            lost_at["kept" if at_last else "pre-filtered"].put(reason, times)
    lost_at["cut"].update(failed["curate"])
    pairs = seen.pairs - of_cut
    left = pairs - lost_at["pre-filtered"].total()
    judged = left - lost_at["judged"].total()

    def step(name: str, unit: str, count: int, of: int, lost: Tally) -> dict[str, Any]:
        waiting = max(0, of - count - lost.total())
        share = round(count / of, 4) if of else None
        why = dict(lost.most_common())
        return {"name": name, "unit": unit, "count": count, "of": of, "share": share, "lost": why, "waiting": waiting}

    return [
        step("prompted", "grids", prompts, images * requested, written),
        step("painted", "grids", grids, prompts, painted),
        step("cut", "grids", seen.cut_grids, grids, lost_at["cut"]),
        step("pre-filtered", "pairs", left, pairs, lost_at["pre-filtered"]),
        step("judged", "pairs", judged, left, lost_at["judged"]),
        step("kept", "pairs", seen.reasons["kept"], judged, lost_at["kept"]),
    ]


def _numbers(every: Distribution, kept: Distribution, threshold: float) -> dict[str, Any]:
    edges = every.edges(BINS)
    values = [every.low, *every.quantiles(*QUANTILES), every.high]
    names = ["min", *(f"p{round(100 * share):02d}" for share in QUANTILES), "max"]
    return {
        "n": every.count,
        "missing": every.missing,
        "mean": round(every.total / every.count, 4),
        "quantiles": {name: round(value, 4) for name, value in zip(names, values, strict=True)},
        "threshold": threshold,
        "histogram": {
            "edges": [round(edge, 4) for edge in edges],
            "all": every.histogram(edges),
            "kept": kept.histogram(edges),
        },
    }


def _balance(every: Tally, kept: Tally) -> dict[str, Any]:
    """All and accepted pairs by name, and the evenness of the accepted ones: `even` equally frequent names have the
    same entropy."""
    total = kept.total()
    shares = [times / total for times in kept.values() if times]
    return {
        "names": len(every),
        "even": round(math.exp(-sum(p * math.log(p) for p in shares)), 2) if shares else 0.0,
        "by_name": {
            name: {"pairs": times, "kept": kept[name], "share": round(kept[name] / times, 4)}
            for name, times in every.most_common()
        },
    }


def format_report(report: dict[str, Any]) -> list[str]:
    """The result of `measure` as text."""
    incomplete = [name for name, complete in report["complete"].items() if not complete]
    state = f"incomplete: {', '.join(incomplete)}" if incomplete else "complete"
    text = [f"{report['run']} · recipe {report['recipe']} · task {report['task']} · {state}", ""]
    text.append(f"{'':<13}{'left':>9} {'of':>9} {'share':>7}")
    for step in report["steps"]:
        share = "" if step["share"] is None else f"{100 * step['share']:.1f} %"
        why = [f"{times} {reason}" for reason, times in _first(step["lost"], 4)]
        why += [f"{step['waiting']} to come"] if step["waiting"] else []
        row = f"{step['name']:<13}{step['count']:>9} {step['of']:>9} {share:>7}  {step['unit']}"
        text.append(row + (f"; lost: {', '.join(why)}" if why else ""))
    text.append(f"pairs/ has {report['rows']['pairs']} pairs for training")
    if (spread := report["spread"]) is not None:
        distinct = f"{100 * spread['distinct']:.0f} % of their word pairs are distinct"
        text.append(f"prompts: {distinct}, mean distance {spread['distance']:.2f} (0: all equal, 1: nothing in common)")
    text += [f"language model {one_line(line)}" for line in bills.format_bill(report["asked"])]
    for column, numbers in report["numbers"].items():
        text += ["", *_histogram(column, numbers)]
    for word, balance in report["balance"].items():
        if balance["by_name"]:
            text += ["", *_kinds(word, balance)]
    return text


def _first(counts: dict[str, int], shown: int) -> list[tuple[str, int]]:
    """The most frequent names, and the sum of the others."""
    named = [(one_line(name), times) for name, times in counts.items()]
    rest = sum(times for _, times in named[shown:])
    return named[:shown] + ([("for other reasons", rest)] if rest else [])


def _histogram(column: str, numbers: dict[str, Any]) -> list[str]:
    q = numbers["quantiles"]
    missing = f" · {numbers['missing']} without" if numbers["missing"] else ""
    head = f"{column}  n {numbers['n']}{missing} · threshold {numbers['threshold']:g} · median {q['p50']:.3f} · "
    head += f"5–95 % {q['p05']:.3f} to {q['p95']:.3f} · █ kept ░ rejected"
    text = [head]
    highest = max(numbers["histogram"]["all"]) or 1
    edges = numbers["histogram"]["edges"]
    for i, (every, kept) in enumerate(zip(numbers["histogram"]["all"], numbers["histogram"]["kept"], strict=True)):
        width = math.ceil(40 * every / highest)
        filled = min(width, round(40 * kept / highest))
        text.append(f"  {edges[i]:>7.3f} {'█' * filled}{'░' * (width - filled)}{' ' if width else ''}{every}")
    return text


def _kinds(word: str, balance: dict[str, Any]) -> list[str]:
    head = f"by {word}: {balance['names']}, as even as {balance['even']:g} of equal size"
    rows = list(balance["by_name"].items())
    text = [head]
    for name, row in rows[:SHOWN]:
        text.append(
            f"  {one_line(name)[:24]:<24} {row['pairs']:>8} pairs {row['kept']:>8} kept {100 * row['share']:>6.1f} %"
        )
    if len(rows) > SHOWN:
        text.append(f"  … and {len(rows) - SHOWN} more (--json lists them)")
    return text


CELL = 1 / 4096  # width of a lattice cell, which is the error of a quantile
_FAR = 2**52  # cells from 0; values beyond are in the last cell


class Distribution:
    """Values, added in batches, as counts on a fine lattice, which give quantiles and histograms in little memory.

    None and NaN are counted as missing. Scores are between -1 and 1, so there are about 8,000 cells at most.
    """

    def __init__(self) -> None:
        self.count = 0
        self.missing = 0
        self.low = float("inf")
        self.high = float("-inf")
        self.total = 0.0
        self._cells: Counter[int] = Counter()

    def add(self, values: Sequence[float | None] | np.ndarray) -> None:
        """Adds values (N,)."""
        numbers = np.array(values, dtype=float)
        known = numbers[np.isfinite(numbers)]
        self.missing += len(numbers) - len(known)
        if not len(known):
            return
        self.count += len(known)
        self.total += float(known.sum())
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        cells, counts = np.unique(np.clip(np.floor(known / CELL), -_FAR, _FAR).astype(np.int64), return_counts=True)
        self._cells.update(dict(zip(cells.tolist(), counts.tolist(), strict=True)))

    @property
    def mean(self) -> float | None:
        """Mean of the values; None if there are none."""
        return self.total / self.count if self.count else None

    def quantiles(self, *shares: float) -> list[float]:
        """Quantiles for shares from 0 to 1, exact to one cell. There must be at least one value."""
        assert self.count, "quantiles need values"
        cells = np.array(sorted(self._cells))
        ends = np.cumsum([self._cells[cell] for cell in cells.tolist()])
        result = []
        for share in shares:
            rank = share * (self.count - 1) + 0.5
            place = min(int(np.searchsorted(ends, rank)), len(cells) - 1)
            inside = 1 - (ends[place] - rank) / self._cells[int(cells[place])]
            result.append(float(np.clip((cells[place] + inside) * CELL, self.low, self.high)))
        return result

    def edges(self, bins: int) -> list[float]:
        """Edges of `bins` bins of equal width over all values."""
        assert self.count, "bins need values"
        low, high = np.floor(self.low / CELL) * CELL, (np.floor(self.high / CELL) + 1) * CELL
        return np.linspace(low, high, bins + 1).tolist()

    def histogram(self, edges: Sequence[float]) -> list[int]:
        """Number of values in each bin between `edges`. A cell counts in the bin of its middle."""
        middles = np.array([(cell + 0.5) * CELL for cell in self._cells])
        return np.histogram(middles, bins=np.array(edges), weights=list(self._cells.values()))[0].astype(int).tolist()
