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
from diptych.data.places import lock, share
from diptych.data.scan import batches, open_run
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, nearest
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe, Screens, Thresholds
from diptych.run.fingerprint import Fingerprints
from diptych.run.resolve import freeze
from diptych.run.runner import Pipeline
from diptych.run.select import limits, reconsidered, repeats
from diptych.utils.console import Display, Report
from diptych.utils.machine import versions

SECTION = "curate.thresholds"
EXAMPLES = 5
QUIET = Display(quiet=True)


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
    found = compare(candidates, *limits(new, task))
    if not found["candidates"]:
        raise UserError(f"{folder} has no candidates yet; first: diptych curate {folder}/recipe.yaml --out {folder}")
    before, after = (settable(recipe, task) for recipe in (old, new))
    result: dict[str, Any] = {"run": str(folder), "thresholds": {"before": before, "after": after}}
    result |= {"complete": candidates.is_complete(), **found, "decided": labels.counts(decided)}
    if old.curate.duplicates is not None:
        before, after = (len(repeats(candidates, recipe, task)) for recipe in (old, new))
        result["duplicates"] = {"before": before, "after": after}
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


def compare(candidates: Dataset, thresholds: records.Thresholds, bounds: records.Bounds) -> dict[str, Any]:
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
            keep, reason = records.judged_again(row, thresholds, bounds)
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
    source, weights = _judged(
        folder,
        old,
        task,
        ": parts are missing, or the task or diptych's own stages changed since; thresholds can be compared (leave out "
        "--out), but nothing be selected from it",
    )
    if not found["kept_after"] and True not in decided.values():
        raise UserError(f"these thresholds keep none of {found['candidates']} candidate pairs; nothing was written")
    with lock(out):
        freeze(new, out)
        labels.fix(out, decided)
        made_from = {"source": str(folder), "candidates_sha256": source.manifest_hash()}
        places.append(out, "recurate", **made_from, decided=labels.counts(decided), versions=versions())
        return _derive(source, folder, Pipeline(new, task, out, QUIET, weights=weights), report)


def derive(folder: Path, recipe: Recipe, out: Path, display: Display) -> None:
    """Makes `out` a run of `recipe` with the prompts, grids and judgements of the run `folder`, ready to be distilled;
    `recipe` may differ from that run's in its thresholds, `distill` and `evaluate`. What is there already is left."""
    _, old, task = open_run(folder)
    source, weights = _judged(folder, old, task, "; curate that run again")
    with lock(out):
        run = Pipeline(freeze(recipe, out), task, out, QUIET, weights=weights)
        labels.fix(out, labels.applied(folder))
        if Dataset(out / "pairs").is_complete(run.fingerprints.of("select")):
            return
        made_from = {"source": str(folder), "candidates_sha256": source.manifest_hash()}
        places.append(out, "derive", **made_from, versions=versions())
        with display.stage("derive", "parts") as report:
            _derive(source, folder, run, report)


def _derive(source: Dataset, folder: Path, run: Pipeline, report: Report) -> int:
    """Everything up to `pairs/` of a run, whose folder is locked; how many pairs there are."""
    for name in ("prompts", "grids", "failed/write", "failed/paint"):
        share(folder / name, run.folder / name)
    labels.copy(folder, run.folder)
    if source.is_complete(run.fingerprints.of("curate")):
        for name in ("candidates", "failed/curate"):
            share(folder / name, run.folder / name)
    else:
        _candidates(source, folder, run, report)
    return run.select()


def _judged(folder: Path, recipe: Recipe, task: tasks.Task, why: str) -> tuple[Dataset, dict[str, str]]:
    """A run's candidates, and the hashes of the weights that painted and judged, as its manifests name them; UserError
    unless the candidates are whole and what its recipe makes."""
    weights = {}
    for role, name, key in (("teacher", "grids", "teacher_sha256"), ("curator", "candidates", "judge_sha256")):
        manifest = Dataset(folder / name).manifest
        if manifest is None:
            raise UserError(
                f"{folder / name} is not complete, and --out needs a run curated to its end; "
                f"first: diptych curate {folder}/recipe.yaml --out {folder}"
            )
        weights[role] = str(manifest.get(key, ""))
        weights |= {f"screen {screen}": str(sha) for screen, sha in manifest.get("screens_sha256", {}).items()}
    source = Dataset(folder / "candidates", records.schema(records.PAIR))
    if not source.is_complete(Fingerprints(recipe, task, folder, weights).of("curate")):
        raise UserError(f"{source.url} is not what {folder}/recipe.yaml makes today{why}")
    return source, weights


def _candidates(source: Dataset, folder: Path, run: Pipeline, report: Report) -> None:
    """The candidates and failures of `folder` under the run's verdicts; shards that are there already are left."""
    thresholds, bounds = limits(run.recipe, run.task)
    fingerprint = run.fingerprints.of("curate")
    target = Dataset(run.folder / "candidates", records.schema(records.PAIR))
    failed_there = Dataset(folder / "failed" / "curate", records.schema(records.FAILED))
    failed = Dataset(run.folder / "failed" / "curate", records.schema(records.FAILED))
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
        rows = [reconsidered(row, thresholds, bounds) for row in source.read_shard(shard)]
        target.write_shard(shard, rows, fingerprint)
    if not target.is_complete(fingerprint):
        manifest = {key: value for key, value in (source.manifest or {}).items() if key not in ("rows", "parts")}
        target.publish({**manifest, "fingerprint": fingerprint})
    report(len(shards), len(shards))


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
