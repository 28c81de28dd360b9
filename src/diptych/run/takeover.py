"""Reuse of an earlier run: every stage whose fingerprint is the same under the new recipe is taken over.

    earlier = EarlierRun.open("runs/first", Path("runs/second"))
    run(recipe, "runs/second", source="runs/first")            # uses it

Prompts, grids, candidates, pairs and the images of an evaluation are taken part by part (`data.places.share`), so an
unfinished stage resumes where it stopped. A training is taken with its checkpoints and latents, and the student is
exported again with the settings of the new recipe. Nothing in the earlier run changes.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from diptych import recipe as recipes
from diptych.data import labels
from diptych.data.places import answers, bring, desk, link_all, share
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe.schema import Recipe
from diptych.train.checkpoint import identity
from diptych.utils.io import write_atomic
from diptych.utils.paths import inside, is_remote, place, private_file

TRAINING = "student/training"
SUMMARY = "summary.json"
# Files in `TRAINING` that a resumed training needs. Files to which the training appends are copied.
LINKED = ("step-*/*", "samples/*.png", "negatives-*/*", "best", "latest")  # the pointers come last
COPIED = ("metrics.jsonl",)
LATENTS = "latents/*/part-*.safetensors"


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run, and its frozen recipe."""

    folder: Path
    recipe: Recipe

    @classmethod
    def open(cls, run: str | Path, out: Path) -> EarlierRun:
        """Open a run. Raises UsageError if the folder is not a run, or is `out` itself."""
        folder = place(run)
        if not (folder / "recipe.yaml").is_file():
            raise UsageError("run_not_found", f"--from {run} is not a run's folder: it has no recipe.yaml.")
        if desk(folder).resolve() == desk(out).resolve():
            raise UsageError("option_conflict", f"--from {run} is also the folder to write. Choose another --out.")
        return cls(folder, recipes.load(folder / "recipe.yaml" if is_remote(folder) else inside(folder, "recipe.yaml")))

    def check_prompts(self, fingerprint: str, recipe: Recipe) -> None:
        """Raise UsageError if this recipe makes other prompts, because then no stage could be reused."""
        prompts = Dataset(self.folder / "prompts")
        if not (shards := prompts.shards()) or prompts.part_fingerprint(shards[0]) == fingerprint:
            return
        first = ("seed", "task", "teacher", "write.")
        keys = [key for key in self.recipe.differences(recipe) if key.startswith(first)]
        why = f"{', '.join(keys)} differ" if keys else "the task, its vocabulary or diptych's stages changed"
        raise UsageError(
            "run_mismatch",
            f"--from {self.folder}: no stage can be reused, because {why}, and all stages depend on the prompts. "
            "Leave out --from to make everything again.",
        )

    def rows(self, output: str, stage: str, out: Path, fingerprint: str) -> int:
        """Take over the parts of a stage's output with this fingerprint; return their number in `out`.

        A shard's failures come first, so that they exist wherever the shard exists.
        """
        share(self.folder / "failed" / stage, out / "failed" / stage, fingerprint)
        return share(self.folder / output, out / output, fingerprint)

    def decisions(self, out: Path) -> None:
        """Take over people's decisions on single pairs, if `out` has the same grids and no pairs yet."""
        grids = [Dataset(folder / "grids") for folder in (self.folder, out)]
        if not all(each.is_complete() for each in grids) or grids[0].fingerprint() != grids[1].fingerprint():
            return
        if not labels.applied(out) and not Dataset(out / "pairs").shards():
            labels.fix(out, labels.decided(self.folder))
        labels.copy(self.folder, out)

    def answers(self, out: Path, everywhere: bool) -> None:
        """Take over the language models' answers, unless `out` has some, so that no question is paid for twice."""
        theirs, mine = (answers(folder, everywhere).expanduser() for folder in (self.folder, out))
        if mine.exists() or not theirs.is_file():
            return
        private_file(mine)
        with closing(sqlite3.connect(theirs)) as read, closing(sqlite3.connect(mine)) as write:
            read.backup(write)

    def student(self, recipe: Recipe, out: Path) -> str:
        """Take over the latents, and the training if this recipe trains in the same way on the same pairs.

        Returns what was taken, or "".
        """
        there, here = bring(self.folder, "student").parent / TRAINING, desk(out) / TRAINING
        if (here / SUMMARY).exists() or (any(here.glob("step-*/manifest.json")) and (here / "latest").exists()):
            return ""  # trained here already, or taken before
        link_all(there, here, LATENTS)
        if not self._trains_alike(recipe, out):
            return ""
        if not any(there.glob("step-*/manifest.json")):
            if not (there / SUMMARY).exists():
                return ""
            # Its checkpoints were removed, so the student is taken as it is.
            link_all(there.parent, here.parent, "**/*")
            return f"the student, without checkpoints: it is exported as {self.folder}/recipe.yaml has it"
        here.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            if (there / name).exists():
                write_atomic(here / name, inside(there, name).read_bytes())
        for pattern in LINKED:
            link_all(there, here, pattern)
        return f"the training up to {inside(there, 'latest').read_text('utf8').strip()}"

    def _trains_alike(self, recipe: Recipe, out: Path) -> bool:
        """Whether the training of the earlier run is the beginning of this recipe's training."""
        before = self.recipe
        keys = ("teacher", "task", "paint.panel_size", "distill.data", "distill.buckets")
        if before.fingerprint(*keys) != recipe.fingerprint(*keys) or before.distill.steps > recipe.distill.steps:
            return False
        there, here = (identity(each.distill, each.training_seed) for each in (before, recipe))
        if there != here:
            return False
        if not recipe.draws_pairs():
            return True
        pairs = [Dataset(folder / "pairs") for folder in (self.folder, out)]
        return all(each.is_complete() for each in pairs) and pairs[0].fingerprint() == pairs[1].fingerprint()
