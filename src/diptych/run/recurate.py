"""Other thresholds for a run that is already judged: no judge is asked, no picture decoded.

    recurate("runs/first", ["same=0.7"])                      # what would change
    recurate("runs/first", ["same=0.7"], "runs/stricter")     # a run with these thresholds
    recurate("runs/first", [], "runs/decided")                # a run with people's decisions

What can change: `curate.thresholds`, and, where the run measured for them, the limits of its screens (`screens.blur`,
or `screens.NAME` for a classifier's `most`), and what counts as a copy or a duplicate (`copies.hash`,
`duplicates.hash`, `.embedding`).

A run folder belongs to one frozen recipe, so its own `pairs/` is never touched. Without `out` nothing is written. With
`out`, that folder becomes the run of the recipe with the other thresholds, byte for byte what running it anew would
have made, but for pairs that come before a vision-language judge who was never asked about them (`unasked`). Prompts
and grids are the same files (hard links where the disk allows), candidates get the new verdicts, and `pairs/` comes
from curation's own last step, by what people decided of single pairs (`data.decisions`), which alone is enough to make
a run. It can be distilled, evaluated and curated again like any run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import labels, places, records
from diptych.data.engine import Row
from diptych.data.places import lock, share
from diptych.data.records import judged_again
from diptych.data.scan import batches, open_run
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, nearest
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe, Screens, Thresholds
from diptych.run.runner import Pipeline, freeze
from diptych.stages.curate import duplicates
from diptych.utils.console import Display, Report
from diptych.utils.machine import versions

SECTION = "curate.thresholds"
EXAMPLES = 5


def recurate(
    run_dir: str | Path, sets: Sequence[str], out: str | Path | None = None, display: Display | None = None
) -> dict[str, Any]:
    """Compares `run_dir` with the thresholds `sets` (`"same=0.7"`, …) and, with `out`, writes the run they make.

    Returns counts as plain values. Raises UsageError for a key that is no threshold or an `out` that belongs to another
    recipe, UserError if the run is not curated to its end or the thresholds keep nothing.
    """
    display = display or Display()
    folder, old, task = open_run(run_dir)
    decided = labels.decided(folder)
    alone = not sets and out is not None and decided != labels.applied(folder)
    new = old if alone else with_thresholds(old, task, folder, sets)
    candidates = Dataset(folder / "candidates")
    found = compare(candidates, task.thresholds(new.curate.thresholds), records.Bounds.of(new.curate))
    if not found["candidates"]:
        raise UserError(f"{folder} has no candidates yet; first: diptych curate {folder}/recipe.yaml --out {folder}")
    before, after = (settable(recipe, task) for recipe in (old, new))
    result: dict[str, Any] = {"run": str(folder), "thresholds": {"before": before, "after": after}}
    result |= {"complete": candidates.is_complete(), **found, "decided": labels.counts(decided)}
    if old.curate.duplicates is not None:
        result["duplicates"] = {"before": _repeats(candidates, old, task), "after": _repeats(candidates, new, task)}
    if out is not None:
        with display.stage("recurate", "pairs") as report:
            result |= {"out": str(out), "pairs": _write(folder, old, new, task, Path(out), decided, found, report)}
    return result


def with_thresholds(recipe: Recipe, task: tasks.Task, folder: Path, sets: Sequence[str]) -> Recipe:
    """The frozen recipe of `folder` with other thresholds: `"same=0.7"` or, in full, `"curate.thresholds.same=0.7"`."""
    names = list(settable(recipe, task))
    overlay: dict[str, str] = {}  # by key
    classifiers = recipe.curate.screens.model_dump()["classifiers"] if recipe.curate.screens else []
    asked = []
    for text in sets:
        key = text.partition("=")[0].strip().removeprefix(f"{SECTION}.").removeprefix("curate.")
        if key not in names or "=" not in text:
            hint = nearest(key, names) or f"; thresholds are {', '.join(names)}"
            raise UsageError(f"--set {text}: only thresholds can change here, as same=0.7{hint}")
        asked.append(key)
        value = text.partition("=")[2]
        section, _, name = key.rpartition(".")
        if section == "screens" and name not in Screens.model_fields:
            # A list is one value: the whole of it is laid over.
            next(c for c in classifiers if c["name"] == name)["most"] = recipes.parse_set(f"most={value}")["most"]
            overlay["classifiers"] = f"curate.screens.classifiers={json.dumps(classifiers)}"
        else:
            overlay[key] = f"{f'curate.{section}' if section else SECTION}.{name}={value}"
    if not asked:
        raise UsageError(
            f"name a threshold to change, for instance --set same=0.7; there are {', '.join(names)}; or, with --out, "
            "decide on single pairs first (diptych serve, its Data tab)"
        )
    new = recipes.load(folder / "recipe.yaml", list(overlay.values()))
    effective = task.thresholds(new.curate.thresholds)
    for name in asked:
        if name not in Thresholds.model_fields:
            continue
        wanted, real = getattr(new.curate.thresholds, name), getattr(effective, name)
        if wanted != real:  # a recipe that says the default says nothing, and the task's own value holds
            raise UsageError(
                f"--set {name}={wanted:g}: that is the default, for which the task '{task.name}' takes {real:g}; "
                f"choose a value beside it, for instance {name}={wanted + 1e-6!r}"
            )
    return new


def settable(recipe: Recipe, task: tasks.Task) -> dict[str, float | None]:
    """Everything that can change here and its value, by the name that `--set` takes; None is off."""
    return {**task.thresholds(recipe.curate.thresholds).model_dump(), **recipe.curate.further()}


def _repeats(candidates: Dataset, recipe: Recipe, task: tasks.Task) -> int:
    """How many of the pairs that a recipe keeps would show again what an earlier one shows."""
    if recipe.curate.duplicates is None:
        return 0
    thresholds = task.thresholds(recipe.curate.thresholds)
    return len(duplicates.find(candidates, recipe.curate.duplicates, thresholds, records.Bounds.of(recipe.curate)))


def compare(candidates: Dataset, limits: records.Thresholds, bounds: records.Bounds = records.NONE) -> dict[str, Any]:
    """How many pairs come and go, from which reason to which, with a few ids. Reads small columns; where something is
    bounded also the evidence."""
    moves: Counter[tuple[str, str]] = Counter()
    examples: dict[str, list[str]] = {"came": [], "went": []}
    total = kept_before = kept_after = 0
    columns = ["id", "similarity", "copy_distance", "seam", "kept", "reason"]
    columns += ["evidence"] if bounds.screens or bounds.copies else []
    for _, _, batch in batches(candidates, *columns):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            keep, reason = judged_again(row, limits, bounds)
            total, kept_before, kept_after = total + 1, kept_before + row["kept"], kept_after + keep
            if reason != row["reason"]:
                moves[row["reason"], reason] += 1
            if keep != row["kept"] and len(examples[way := "came" if keep else "went"]) < EXAMPLES:
                examples[way].append(row["id"])
    came = sum(times for (_, reason), times in moves.items() if reason == "kept")
    went = sum(times for (reason, _), times in moves.items() if reason == "kept")
    return {
        "candidates": total,
        "kept_before": kept_before,
        "kept_after": kept_after,
        "came": came,
        "went": went,
        "moves": [{"from": a, "to": b, "pairs": times} for (a, b), times in moves.most_common()],
        "examples": examples,
    }


class _Judged(Pipeline):
    """A run whose models need not be on this machine: their hashes are in its manifests."""

    def __init__(self, recipe: Recipe, task: tasks.Task, folder: Path, hashes: dict[str, str]) -> None:
        super().__init__(recipe, task, folder, Display(quiet=True))
        self.hashes = hashes

    def _model(self, name: str, role: str) -> str:
        return self.hashes[role]

    def _screens(self) -> dict[str, str]:
        screens = self.recipe.curate.screens
        return {c.name: self.hashes[f"screen {c.name}"] for c in screens.classifiers} if screens else {}


def _write(
    folder: Path,
    old: Recipe,
    new: Recipe,
    task: tasks.Task,
    out: Path,
    decided: dict[str, bool],
    found: dict[str, Any],
    report: Report,
) -> int:
    if out.resolve() == folder.resolve():
        raise UsageError(f"{folder} belongs to its own thresholds; choose another --out")
    hashes = _hashes(folder)
    source = _judged(folder, old, task, hashes)
    if not found["kept_after"] and True not in decided.values():
        raise UserError(f"these thresholds keep none of {found['candidates']} candidate pairs; nothing was written")
    with lock(out):
        freeze(new, out)
        labels.fix(out, decided)
        made_from = {"source": str(folder), "candidates_sha256": source.manifest_hash()}
        places.append(out, "recurate", **made_from, decided=labels.counts(decided), versions=versions())
        return _derive(source, folder, out, new, task, hashes, report)


def derive(folder: Path, recipe: Recipe, out: Path, display: Display) -> None:
    """Makes `out` a run of `recipe` with the prompts, grids and judgements of the run `folder`, ready to be distilled;
    `recipe` may differ from that run's in its thresholds, `distill` and `evaluate`. What is there already is left."""
    _, old, task = open_run(folder)
    hashes = _hashes(folder)
    source = Dataset(folder / "candidates", records.schema(records.PAIR))
    if not source.is_complete(_fingerprint(old, task, folder, hashes)):
        raise UserError(f"{source.url} is not what {folder}/recipe.yaml makes today; curate that run anew")
    with lock(out):
        recipe = freeze(recipe, out)
        labels.fix(out, labels.applied(folder))
        if Dataset(out / "pairs").is_complete(_Judged(recipe, task, out, hashes).fingerprints("select")):
            return
        made_from = {"source": str(folder), "candidates_sha256": source.manifest_hash()}
        places.append(out, "derive", **made_from, versions=versions())
        with display.stage("derive", "parts") as report:
            _derive(source, folder, out, recipe, task, hashes, report)


def _derive(
    source: Dataset, folder: Path, out: Path, new: Recipe, task: tasks.Task, hashes: dict[str, str], report: Report
) -> int:
    """Everything up to `pairs/` of `out`, which is locked; how many pairs there are."""
    for name in ("prompts", "grids", "failed/write", "failed/paint"):
        share(folder / name, out / name)
    labels.copy(folder, out)
    if source.is_complete(_fingerprint(new, task, out, hashes)):
        for name in ("candidates", "failed/curate"):
            share(folder / name, out / name)
    else:
        _candidates(source, folder, out, new, task, hashes, report)
    return _Judged(new, task, out, hashes).select()


def _judged(folder: Path, recipe: Recipe, task: tasks.Task, hashes: dict[str, str]) -> Dataset:
    """A run's candidates; UserError unless they are whole and what its recipe makes."""
    source = Dataset(folder / "candidates", records.schema(records.PAIR))
    if not source.is_complete(_fingerprint(recipe, task, folder, hashes)):
        raise UserError(
            f"{source.url} is not what {folder}/recipe.yaml makes today: parts are missing, or the task or diptych's "
            "own stages changed since; thresholds can be compared (leave out --out), but nothing be selected from it"
        )
    return source


def _hashes(folder: Path) -> dict[str, str]:
    """The weights that painted and judged, as the run's manifests name them."""
    found = {}
    for role, name, key in (("teacher", "grids", "teacher_sha256"), ("curator", "candidates", "judge_sha256")):
        manifest = Dataset(folder / name).manifest
        if manifest is None:
            raise UserError(
                f"{folder / name} is not complete, and --out needs a run curated to its end; "
                f"first: diptych curate {folder}/recipe.yaml --out {folder}"
            )
        found[role] = str(manifest.get(key, ""))
        found |= {f"screen {screen}": str(sha) for screen, sha in manifest.get("screens_sha256", {}).items()}
    return found


def _fingerprint(recipe: Recipe, task: tasks.Task, folder: Path, hashes: dict[str, str]) -> str:
    return _Judged(recipe, task, folder, hashes).fingerprints("curate")


def _candidates(
    source: Dataset,
    folder: Path,
    out: Path,
    new: Recipe,
    task: tasks.Task,
    hashes: dict[str, str],
    report: Report,
) -> None:
    """The candidates and failures of `folder` under new verdicts; shards that are there already are left."""
    thresholds, bounds = task.thresholds(new.curate.thresholds), records.Bounds.of(new.curate)
    fingerprint = _fingerprint(new, task, out, hashes)
    target = Dataset(out / "candidates", records.schema(records.PAIR))
    failed_there = Dataset(folder / "failed" / "curate", records.schema(records.FAILED))
    failed = Dataset(out / "failed" / "curate", records.schema(records.FAILED))
    target.clean()
    failed.clean()
    done, shards = target.shards_done(fingerprint), source.shards()
    failed_shards = set(failed_there.shards())
    for count, shard in enumerate(shards):
        report(count, len(shards))
        if shard in done:
            continue
        if shard in failed_shards:
            failed.write_shard(shard, failed_there.read_shard(shard), fingerprint)
        target.write_shard(shard, [_updated(row, thresholds, bounds) for row in source.read_shard(shard)], fingerprint)
    if not target.is_complete(fingerprint):
        manifest = {key: value for key, value in (source.manifest or {}).items() if key not in ("rows", "parts")}
        target.publish({**manifest, "fingerprint": fingerprint})
    report(len(shards), len(shards))


def _updated(row: Row, limits: Thresholds, bounds: records.Bounds) -> Row:
    """A candidate as curation writes it under `limits`: its verdict, and the thresholds that its evidence names."""
    kept, reason = judged_again(row, limits, bounds)
    evidence = json.loads(row["evidence"])
    if "thresholds" in evidence:
        evidence["thresholds"] = {name: getattr(limits, name) for name in evidence["thresholds"]}
    if "screens" in evidence:
        evidence["screens"]["limits"] = bounds.screens
    if "copies" in evidence:
        evidence["copies"]["limits"] = bounds.copies
    text = json.dumps(evidence, ensure_ascii=False, sort_keys=True)
    return {**row, "kept": kept, "reason": reason, "evidence": text}


def _number(value: float | None) -> str:
    return "off" if value is None else f"{value:g}"


def lines(found: dict[str, Any]) -> list[str]:
    """What `recurate` did or would do, for people."""
    before, after = found["thresholds"]["before"], found["thresholds"]["after"]
    changes = [
        f"{name} {_number(before[name])} → {_number(value)}" if value != before[name] else f"{name} {_number(value)}"
        for name, value in after.items()
    ]
    total = found["candidates"]
    kept = " → ".join(f"{n} ({100 * n / total:.1f} %)" for n in (found["kept_before"], found["kept_after"]))
    state = "" if found["complete"] else ", of an unfinished run"
    text = [f"thresholds   {' · '.join(changes)}", f"candidates   {total}{state}", f"kept         {kept}"]
    for way in ("came", "went"):
        shown = ", ".join(found["examples"][way])
        text.append(f"{way:<13}{found[way]}" + (f"  for instance {shown}" if shown else ""))
    text += [f"  {move['from']} → {move['to']}: {move['pairs']}" for move in found["moves"]]
    if any(found["decided"].values()):
        text.append(f"by hand      {found['decided']['accepted']} accepted, {found['decided']['rejected']} rejected")
    if "duplicates" in found:
        text.append(f"duplicates   {found['duplicates']['before']} → {found['duplicates']['after']} of the kept")
    if "out" in found:
        text.append(
            f"{found['pairs']} pairs in {found['out']}/pairs; next: diptych distill {found['out']}/recipe.yaml "
        )
        text[-1] += f"--out {found['out']}"
    else:
        text.append("nothing was written; --out DIR makes a run with these thresholds")
    return text
