"""Other thresholds for a run that is already judged: no judge is asked, no picture decoded.

    recurate("runs/first", ["same=0.7"])                      # what would change
    recurate("runs/first", ["same=0.7"], "runs/stricter")     # a run with these thresholds

A run folder belongs to one frozen recipe, so its own `pairs/` is never touched. Without `out` nothing is written. With
`out`, that folder becomes the run of the recipe with the other thresholds, byte for byte what running it anew would
have made: prompts and grids are the same files (hard links where the disk allows), candidates get the new verdicts, and
`pairs/` comes from curation's own last step. It can be distilled, evaluated and curated again like any run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych import tasks
from diptych.console import Display, Report
from diptych.data import log, records
from diptych.data.engine import Row
from diptych.data.scan import batches, open_run
from diptych.data.store import MANIFEST, Dataset
from diptych.errors import UsageError, UserError, nearest
from diptych.recipe import Recipe, Thresholds
from diptych.run import Pipeline, freeze, lock

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
    new = with_thresholds(old, task, folder, sets)
    before, after = (task.thresholds(recipe.curate.thresholds) for recipe in (old, new))
    found = compare(Dataset(folder / "candidates"), after)
    if not found["candidates"]:
        raise UserError(f"{folder} has no candidates yet; first: diptych curate {folder}/recipe.yaml --out {folder}")
    result: dict[str, Any] = {"run": str(folder), "thresholds": {"before": before.model_dump()}}
    result["thresholds"]["after"] = after.model_dump()
    result |= {"complete": Dataset(folder / "candidates").is_complete(), **found}
    if out is not None:
        with display.stage("recurate", "pairs") as report:
            result |= {"out": str(out), "pairs": _write(folder, old, new, task, Path(out), found, report)}
    return result


def with_thresholds(recipe: Recipe, task: tasks.Task, folder: Path, sets: Sequence[str]) -> Recipe:
    """The frozen recipe of `folder` with other thresholds: `"same=0.7"` or, in full, `"curate.thresholds.same=0.7"`."""
    names = list(Thresholds.model_fields)
    asked = []
    for text in sets:
        key = text.partition("=")[0].strip().removeprefix(f"{SECTION}.")
        if key not in names or "=" not in text:
            hint = nearest(key, names) or f"; thresholds are {', '.join(names)}"
            raise UsageError(f"--set {text}: only thresholds can change here, as same=0.7{hint}")
        asked.append((key, f"{SECTION}.{key}={text.partition('=')[2]}"))
    if not asked:
        raise UsageError(f"name a threshold to change, for instance --set same=0.7; there are {', '.join(names)}")
    new = recipes.load(folder / "recipe.yaml", [text for _, text in asked])
    effective = task.thresholds(new.curate.thresholds)
    for name, _ in asked:
        wanted, real = getattr(new.curate.thresholds, name), getattr(effective, name)
        if wanted != real:  # a recipe that says the default says nothing, and the task's own value holds
            raise UsageError(
                f"--set {name}={wanted:g}: that is the default, for which the task '{task.name}' takes {real:g}; "
                f"choose a value beside it, for instance {name}={wanted + 1e-6!r}"
            )
    return new


def judged_again(row: Row, limits: records.Thresholds) -> tuple[bool, str]:
    """A candidate's verdict under other thresholds. What another test refused stays refused, as in `records.select`."""
    if row["kept"] or row["reason"] in records.TESTS:
        return records.verdict(row["similarity"], row["copy_distance"], row["seam"], limits)
    return row["kept"], row["reason"]


def compare(candidates: Dataset, limits: records.Thresholds) -> dict[str, Any]:
    """How many pairs come and go, from which reason to which, with a few ids. Reads five small columns."""
    moves: Counter[tuple[str, str]] = Counter()
    examples: dict[str, list[str]] = {"came": [], "went": []}
    total = kept_before = kept_after = 0
    for _, _, batch in batches(candidates, "id", "similarity", "copy_distance", "seam", "kept", "reason"):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            keep, reason = judged_again(row, limits)
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


def _write(
    folder: Path, old: Recipe, new: Recipe, task: tasks.Task, out: Path, found: dict[str, Any], report: Report
) -> int:
    if out.resolve() == folder.resolve():
        raise UsageError(f"{folder} belongs to its own thresholds; choose another --out")
    hashes = _hashes(folder)
    source = Dataset(folder / "candidates", records.schema(records.PAIR))
    if not source.is_complete(_fingerprint(old, task, folder, hashes)):
        raise UserError(
            f"{source.url} is not what {folder}/recipe.yaml makes today: parts are missing, or the task or diptych's "
            "own stages changed since; the thresholds can be compared (leave out --out), but no run be made of it"
        )
    if not found["kept_after"]:
        raise UserError(f"these thresholds keep none of {found['candidates']} candidate pairs; nothing was written")
    with lock(out):
        freeze(new, out)
        log.append(out, "recurate", source=str(folder), candidates_sha256=source.manifest_hash())
        for name in ("prompts", "grids", "failed/write", "failed/paint"):
            share(folder / name, out / name)
        _candidates(source, folder, out, task.thresholds(new.curate.thresholds), new, task, hashes, report)
        return _Judged(new, task, out, hashes).select()


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
    return found


def _fingerprint(recipe: Recipe, task: tasks.Task, folder: Path, hashes: dict[str, str]) -> str:
    return _Judged(recipe, task, folder, hashes).fingerprints("curate")


def _candidates(
    source: Dataset,
    folder: Path,
    out: Path,
    limits: Thresholds,
    new: Recipe,
    task: tasks.Task,
    hashes: dict[str, str],
    report: Report,
) -> None:
    """The candidates and failures of `folder` under new verdicts; shards that are there already are left."""
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
        target.write_shard(shard, [_updated(row, limits) for row in source.read_shard(shard)], fingerprint)
    if not target.is_complete(fingerprint):
        manifest = {key: value for key, value in (source.manifest or {}).items() if key not in ("rows", "parts")}
        target.publish({**manifest, "fingerprint": fingerprint})
    report(len(shards), len(shards))


def _updated(row: Row, limits: Thresholds) -> Row:
    """A candidate as curation writes it under `limits`: its verdict, and the thresholds that its evidence names."""
    kept, reason = judged_again(row, limits)
    evidence = json.loads(row["evidence"])
    if "thresholds" in evidence:
        evidence["thresholds"] = {name: getattr(limits, name) for name in evidence["thresholds"]}
    text = json.dumps(evidence, ensure_ascii=False, sort_keys=True)
    return {**row, "kept": kept, "reason": reason, "evidence": text}


def share(source: Path, target: Path) -> None:
    """A published data set under a second name: hard links, or copies where the disk has none; the manifest last.

    Parts are never changed in place, only replaced, so neither folder can change the other.
    """
    if not source.is_dir():
        return
    target.mkdir(parents=True, exist_ok=True)
    Dataset(target).clean()
    files = [path for path in source.iterdir() if path.suffix == ".parquet" or path.name == MANIFEST]
    for path in sorted(files, key=lambda path: (path.name == MANIFEST, path.name)):
        goal = target / path.name
        if goal.exists():
            continue
        try:
            os.link(path, goal)
        except OSError:
            # Another disk, or a file system without links. The name is one of a killed writer, see store.is_temporary.
            copy = target / f".{path.name}.{os.getpid()}.tmp"
            try:
                shutil.copyfile(path, copy)
                copy.replace(goal)
            except OSError as error:
                with contextlib.suppress(OSError):
                    copy.unlink()
                raise UserError(f"cannot write {goal}: {error.strerror or error}") from error


def lines(found: dict[str, Any]) -> list[str]:
    """What `recurate` did or would do, for people."""
    before, after = found["thresholds"]["before"], found["thresholds"]["after"]
    changes = [f"{k} {before[k]:g} → {v:g}" if v != before[k] else f"{k} {v:g}" for k, v in after.items()]
    total = found["candidates"]
    kept = " → ".join(f"{n} ({100 * n / total:.1f} %)" for n in (found["kept_before"], found["kept_after"]))
    state = "" if found["complete"] else ", of an unfinished run"
    text = [f"thresholds   {' · '.join(changes)}", f"candidates   {total}{state}", f"kept         {kept}"]
    for way in ("came", "went"):
        shown = ", ".join(found["examples"][way])
        text.append(f"{way:<13}{found[way]}" + (f"  for instance {shown}" if shown else ""))
    text += [f"  {move['from']} → {move['to']}: {move['pairs']}" for move in found["moves"]]
    if "out" in found:
        text.append(
            f"{found['pairs']} pairs in {found['out']}/pairs; next: diptych distill {found['out']}/recipe.yaml "
        )
        text[-1] += f"--out {found['out']}"
    else:
        text.append("nothing was written; --out DIR makes a run with these thresholds")
    return text
