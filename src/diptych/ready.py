"""What all stages need, checked before the first row is made: a mistake in the last stage costs nothing then.

Each stage's check is beside its code (`stages.ready`, `evaluate.ready`) and raises what the stage itself would raise
later. On a cluster a check runs where its stage works. A stage that is complete is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.data.engine import Engine
from diptych.data.places import desk
from diptych.data.store import Dataset

if TYPE_CHECKING:
    from diptych.run import Pipeline
    from diptych.sections import Recipe

ROWS = {"write": "prompts", "paint": "grids", "curate": "candidates"}  # a stage's output


def check(pipeline: Pipeline, stages: Sequence[str], engine: Engine, earlier: Path | None = None) -> None:
    """Checks what these stages of a run need. `earlier` is a run from which complete stages are taken over.

    Raises the UsageError or UserError that a stage would raise.
    """
    from diptych.evaluate import ready as evaluation
    from diptych.stages import ready

    checks: dict[str, Callable[[Recipe], None]] = {
        "write": ready.write,
        "paint": ready.paint,
        "curate": ready.curate,
        "distill": ready.distill,
        "evaluate": evaluation.evaluate,
    }
    for name in stages:
        if _complete(pipeline, name, earlier):
            continue
        if name == "distill":  # trains in this process
            checks[name](pipeline.recipe)
        else:
            engine.there(name, checks[name], pipeline.recipe)


def _complete(pipeline: Pipeline, stage: str, earlier: Path | None) -> bool:
    folder = pipeline.folder
    if stage == "distill":
        return (desk(folder) / "student" / "training" / "summary.json").exists()
    if stage == "evaluate":
        return (folder / "report" / "metrics.json").exists()
    here = [Dataset(run / ROWS[stage]) for run in (folder, earlier) if run is not None]
    if not any(data.is_complete() for data in here):
        return False
    fingerprint = pipeline.fingerprints(stage)
    return any(data.is_complete(fingerprint) for data in here)
