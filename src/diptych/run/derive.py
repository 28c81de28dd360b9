"""Makes a run from the rows of another: the same prompts, grids and judgements, other thresholds or later stages.

    derive(Path("runs/first"), recipe, Path("runs/stricter"), Display())

Prompts and grids are the same files (hard links where the disk allows). Candidates get the verdicts of the new
thresholds, without a judge and without decoding an image, and `pairs/` comes from curation's last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.data import labels, places, records
from diptych.data.places import lock, share
from diptych.data.scan import open_run
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.run.fingerprint import Fingerprints
from diptych.run.resolve import freeze
from diptych.run.runner import Stages
from diptych.run.select import limits, reconsidered
from diptych.utils.console import Display, Report
from diptych.utils.machine import versions

QUIET = Display(quiet=True)


def derive(folder: Path, recipe: Recipe, out: Path, display: Display) -> None:
    """Make `out` a run of `recipe` with the rows of the run `folder` up to `pairs/`, ready for training.

    `recipe` may differ from that run's in its thresholds, `distill` and `evaluate`. Existing parts of `out` stay.
    """
    _, old, task = open_run(folder)
    source, weights = judged(folder, old, task, "Curate that run again.")
    with lock(out):
        run = Stages(freeze(recipe, out), task, out, QUIET, weights=weights)
        labels.fix(out, labels.applied(folder))
        if Dataset(out / "pairs").is_complete(run.fingerprints.of("select")):
            return
        record(out, "derive", folder, source)
        with display.stage("derive", "parts") as report:
            fill(run, source, folder, report)


def write(
    folder: Path, old: Recipe, new: Recipe, task: tasks.Task, out: Path, decided: dict[str, bool], report: Report
) -> int:
    """Make `out` the run of `new` from the run `folder` of `old` and people's decisions; return its number of pairs."""
    how = "To compare thresholds only, leave out --out."
    source, weights = judged(folder, old, task, f"Parts are missing, or the task or diptych's stages changed. {how}")
    with lock(out):
        freeze(new, out)
        labels.fix(out, decided)
        record(out, "recurate", folder, source, decided=labels.counts(decided))
        return fill(Stages(new, task, out, QUIET, weights=weights), source, folder, report)


def record(out: Path, event: str, folder: Path, source: Dataset, **more: Any) -> None:
    """Write an event with the source of a derived run to its log."""
    made_from = {"source": str(folder), "candidates_sha256": source.manifest_hash()}
    places.append(out, event, **made_from, **more, versions=versions())


def judged(folder: Path, recipe: Recipe, task: tasks.Task, how: str) -> tuple[Dataset, dict[str, str]]:
    """Return a run's candidates, and the hashes of its teacher, judge and classifiers from the manifests.

    Raises UserError unless the candidates are complete and match the run's recipe; `how` says what to do then.
    """
    weights = {}
    for role, name, key in (("teacher", "grids", "teacher_sha256"), ("curator", "candidates", "judge_sha256")):
        manifest = Dataset(folder / name).manifest
        if manifest is None:
            first = f"Run first: diptych curate {folder}/recipe.yaml --out {folder}"
            raise UserError("run_incomplete", f"{folder / name} is not complete, which --out needs. {first}")
        weights[role] = str(manifest.get(key, ""))
        weights |= {f"screen {screen}": str(sha) for screen, sha in manifest.get("screens_sha256", {}).items()}
    source = Dataset(folder / "candidates", records.schema(records.PAIR))
    if not source.is_complete(Fingerprints(recipe, task, folder, weights).of("curate")):
        raise UserError("run_mismatch", f"{source.url} does not match {folder}/recipe.yaml. {how}")
    return source, weights


def fill(run: Stages, source: Dataset, folder: Path, report: Report) -> int:
    """Make everything up to `pairs/` of a run whose folder is locked; return the number of pairs."""
    for name in ("prompts", "grids", "failed/write", "failed/paint"):
        share(folder / name, run.folder / name)
    labels.copy(folder, run.folder)
    if source.is_complete(run.fingerprints.of("curate")):
        for name in ("candidates", "failed/curate"):
            share(folder / name, run.folder / name)
    else:
        _candidates(run, source, folder, report)
    return run.select()


def _candidates(run: Stages, source: Dataset, folder: Path, report: Report) -> None:
    """Write the candidates and failures of `folder` with the run's verdicts; existing shards stay."""
    thresholds, bounds = limits(run.recipe, run.task)
    fingerprint = run.fingerprints.of("curate")
    target = Dataset(run.folder / "candidates", records.schema(records.PAIR))
    old_failed = Dataset(folder / "failed" / "curate", records.schema(records.FAILED))
    failed = Dataset(run.folder / "failed" / "curate", records.schema(records.FAILED))
    target.clean()
    failed.clean()
    done, shards = target.shards_done(fingerprint), source.shards()
    failed_shards = set(old_failed.shards())
    for count, shard in enumerate(shards):
        report(count, len(shards))
        if shard in done:
            continue
        if shard in failed_shards:
            failed.write_shard(shard, old_failed.read_shard(shard), fingerprint)
        rows = [reconsidered(row, thresholds, bounds) for row in source.read_shard(shard)]
        target.write_shard(shard, rows, fingerprint)
    if not target.is_complete(fingerprint):
        manifest = {key: value for key, value in (source.manifest or {}).items() if key not in ("rows", "parts")}
        target.publish({**manifest, "fingerprint": fingerprint})
    report(len(shards), len(shards))
