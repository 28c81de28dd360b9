"""Other thresholds for a curated run, without a judge and without decoding an image.

    recurate("runs/first", ["same=0.7"])                      # what would change
    recurate("runs/first", ["same=0.7"], "runs/stricter")     # a run with these thresholds
    recurate("runs/first", [], "runs/decided")                # a run with people's decisions

You can change `curate.thresholds`. If the run has the measurements, you can also change the limits of its screens
(`screens.blur`, or `screens.NAME` for a classifier's `most`), copies and duplicates (`copies.hash`, `duplicates.hash`,
`.embedding`).

A run folder belongs to one frozen recipe, so its `pairs/` never changes. Without `out` nothing is written. With `out`,
that folder becomes the run of the recipe with the other thresholds (`run.derive`). It is the same, byte for byte, as a
new run, except for pairs that a vision-language judge would see now and has not judged (`unasked`). `pairs/` also
follows people's decisions on single pairs (`data.labels`); these alone are enough to make a run. The new run can be
distilled, evaluated and curated again like any other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import labels, verdicts
from diptych.data.scan import batches, open_run
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, nearest
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe, Screens, Thresholds
from diptych.run import derive
from diptych.run.select import limits, repeats
from diptych.utils.console import Display

SECTION = "curate.thresholds"
EXAMPLES = 5


def recurate(
    run_dir: str | Path, sets: Sequence[str], out: str | Path | None = None, display: Display | None = None
) -> dict[str, Any]:
    """Compare `run_dir` with the thresholds `sets` (`"same=0.7"`, …) and, with `out`, write the run that they make.

    Returns counts as plain values. Raises UsageError for an unknown threshold or an `out` that belongs to another
    recipe, UserError if the run is not completely curated or the thresholds accept no pair.
    """
    display = display or Display()
    folder, old, task = open_run(run_dir)
    decided = labels.decided(folder)
    decisions_only = not sets and out is not None and decided != labels.applied(folder)
    new = old if decisions_only else with_thresholds(old, task, folder, sets)
    candidates = Dataset(folder / "candidates")
    changes = compare(candidates, *limits(new, task))
    if not changes["candidates"]:
        first = f"Run first: diptych curate {folder}/recipe.yaml --out {folder}"
        raise UserError("run_incomplete", f"{folder} has no candidates. {first}")
    before, after = (settable(recipe, task) for recipe in (old, new))
    result: dict[str, Any] = {"run": str(folder), "thresholds": {"before": before, "after": after}}
    result |= {"complete": candidates.is_complete(), **changes, "decided": labels.counts(decided)}
    if old.curate.duplicates is not None:
        before, after = (len(repeats(candidates, recipe, task)) for recipe in (old, new))
        result["duplicates"] = {"before": before, "after": after}
    if out is None:
        return result
    out = Path(out)
    with display.stage("recurate", "pairs") as report:
        if out.resolve() == folder.resolve():
            message = f"{folder} is the run to compare with and keeps its thresholds. Choose another --out."
            raise UsageError("option_conflict", message)
        if not changes["kept_after"] and True not in decided.values():
            message = f"These thresholds accept none of {changes['candidates']} candidate pairs. Nothing was written."
            raise UserError("run_empty", f"{message} Choose lower thresholds.")
        return result | {"out": str(out), "pairs": derive.write(folder, old, new, task, out, decided, report)}


def with_thresholds(recipe: Recipe, task: tasks.Task, folder: Path, sets: Sequence[str]) -> Recipe:
    """Return the frozen recipe of `folder` with other thresholds: `"same=0.7"`, or `"curate.thresholds.same=0.7"`."""
    names = list(settable(recipe, task))
    overlay: dict[str, str] = {}  # by key
    classifiers = recipe.curate.screens.model_dump()["classifiers"] if recipe.curate.screens else []
    keys = []
    for text in sets:
        key = text.partition("=")[0].strip().removeprefix(f"{SECTION}.").removeprefix("curate.")
        if key not in names or "=" not in text:
            hint = nearest(key, names) or f"; thresholds: {', '.join(names)}"
            if key == "change" and key not in names:
                hint = f"; `change` is measured while curating: set it in the task's file, and curate again{hint}"
            message = f"--set {text}: only thresholds can change here, for instance same=0.7{hint}"
            raise UsageError("threshold_invalid", message)
        keys.append(key)
        value = text.partition("=")[2]
        section, _, name = key.rpartition(".")
        if section == "screens" and name not in Screens.model_fields:
            # A list is one value, so the whole list is set.
            next(c for c in classifiers if c["name"] == name)["most"] = recipes.parse_set(f"most={value}")["most"]
            overlay["classifiers"] = f"curate.screens.classifiers={json.dumps(classifiers)}"
        else:
            overlay[key] = f"{f'curate.{section}' if section else SECTION}.{name}={value}"
    if not keys:
        raise UsageError(
            "option_missing",
            f"Name a threshold to change, for instance --set same=0.7. Thresholds: {', '.join(names)}. Or, with --out, "
            "decide on single pairs first, in the Data tab of diptych serve.",
        )
    new = recipes.load(folder / "recipe.yaml", list(overlay.values()))
    effective = task.thresholds(new.curate.thresholds)
    for name in set(keys) & Thresholds.model_fields.keys():
        wanted, real = getattr(new.curate.thresholds, name), getattr(effective, name)
        if wanted != real:  # a default in the recipe counts as not set, so the task's value applies
            raise UsageError(
                "threshold_invalid",
                f"--set {name}={wanted:g}: this is the default, which the task '{task.name}' replaces by {real:g}. "
                f"Choose a value next to it, for instance {name}={wanted + 1e-6!r}.",
            )
    return new


def settable(recipe: Recipe, task: tasks.Task) -> dict[str, float | None]:
    """Return everything that can change here and its value, by the name for `--set`; None is off."""
    return {**task.thresholds(recipe.curate.thresholds).model_dump(), **recipe.curate.further()}


def compare(candidates: Dataset, thresholds: Thresholds, bounds: verdicts.Bounds) -> dict[str, Any]:
    """Count the pairs that become accepted or rejected, and the changes of reasons, with a few ids.

    Reads small columns, and the evidence if screens or copies have limits.
    """
    moves: Counter[tuple[str, str]] = Counter()
    examples: dict[str, list[str]] = {"came": [], "went": []}
    total = kept_before = kept_after = 0
    columns = ["id", "similarity", "copy_distance", "seam", "kept", "reason"]
    columns += ["evidence"] if bounds.screens or bounds.copies else []
    for _, _, batch in batches(candidates, *columns):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            keep, reason = verdicts.judged_again(row, thresholds, bounds)
            total, kept_before, kept_after = total + 1, kept_before + row["kept"], kept_after + keep
            if reason != row["reason"]:
                moves[row["reason"], reason] += 1
            if keep != row["kept"] and len(examples[way := "came" if keep else "went"]) < EXAMPLES:
                examples[way].append(row["id"])
    return {
        "candidates": total,
        "kept_before": kept_before,
        "kept_after": kept_after,
        "came": sum(times for (_, reason), times in moves.items() if reason == "kept"),
        "went": sum(times for (reason, _), times in moves.items() if reason == "kept"),
        "moves": [{"from": a, "to": b, "pairs": times} for (a, b), times in moves.most_common()],
        "examples": examples,
    }


def format_result(result: dict[str, Any]) -> list[str]:
    """Return the result of `recurate` as lines of text."""

    def number(value: float | None) -> str:
        return "off" if value is None else f"{value:g}"

    before, after = result["thresholds"]["before"], result["thresholds"]["after"]
    changes = [
        f"{name} {number(before[name])} → {number(value)}" if value != before[name] else f"{name} {number(value)}"
        for name, value in after.items()
    ]
    total = result["candidates"]
    accepted = " → ".join(f"{n} ({100 * n / total:.1f} %)" for n in (result["kept_before"], result["kept_after"]))
    state = "" if result["complete"] else ", of an unfinished run"
    text = [f"thresholds   {' · '.join(changes)}", f"candidates   {total}{state}", f"accepted     {accepted}"]
    for way, word in (("came", "added"), ("went", "removed")):
        shown = ", ".join(result["examples"][way])
        text.append(f"{word:<13}{result[way]}" + (f"  for instance {shown}" if shown else ""))
    text += [f"  {move['from']} → {move['to']}: {move['pairs']}" for move in result["moves"]]
    if any(result["decided"].values()):
        text.append(f"by hand      {result['decided']['accepted']} accepted, {result['decided']['rejected']} rejected")
    if "duplicates" in result:
        text.append(f"duplicates   {result['duplicates']['before']} → {result['duplicates']['after']} of the accepted")
    if "out" in result:
        folder = result["out"]
        text.append(
            f"{result['pairs']} pairs in {folder}/pairs; next: diptych distill {folder}/recipe.yaml --out {folder}"
        )
    else:
        text.append("Nothing was written. --out DIR makes a run with these thresholds.")
    return text
