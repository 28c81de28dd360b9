"""What a run takes over from an earlier one: every stage whose fingerprint holds under the new recipe.

    source = Source.open("runs/first", Path("runs/second"))
    run(recipe, "runs/second", source="runs/first")            # what uses it

Prompts, grids, candidates, pairs and the pictures of an evaluation are taken part by part (`data.places.share`), so an
unfinished stage resumes where it was. A training is taken with its checkpoints and latents: the student is then
exported again, as the new recipe has it. Nothing in the earlier run changes.
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
# Of `TRAINING`: what a resumed training needs. What the training writes to in place is copied.
LINKED = ("step-*/*", "samples/*.png", "negatives-*/*", "best", "latest")  # the pointers come last
COPIED = ("metrics.jsonl",)
LATENTS = "latents/*/part-*.safetensors"


@dataclass(frozen=True)
class Source:
    """An earlier run, and its frozen recipe."""

    folder: Path
    recipe: Recipe

    @classmethod
    def open(cls, run: str | Path, out: Path) -> Source:
        """UsageError if it is not a run, or is `out` itself."""
        folder = place(run)
        if not (folder / "recipe.yaml").is_file():
            raise UsageError(f"--from {run}: not a run's folder; there is no recipe.yaml in it")
        if desk(folder).resolve() == desk(out).resolve():
            raise UsageError(f"--from {run}: that is the folder to write as well; name another --out")
        return cls(folder, recipes.load(folder / "recipe.yaml" if is_remote(folder) else inside(folder, "recipe.yaml")))

    def refuse_unlike(self, fingerprint: str, recipe: Recipe) -> None:
        """UsageError if the prompts, on which all else rests, were made otherwise than this recipe makes them: then
        nothing holds, and everything would be made again."""
        prompts = Dataset(self.folder / "prompts")
        if not (shards := prompts.shards()) or prompts.part_fingerprint(shards[0]) == fingerprint:
            return
        first = ("seed", "task", "teacher", "write.")
        keys = [key for key in self.recipe.differences(recipe) if key.startswith(first)]
        why = f"{', '.join(keys)} differ" if keys else "the task, its words or diptych's own stages changed since"
        raise UsageError(
            f"--from {self.folder}: nothing of it can be taken over: {why}, and all stages rest on the prompts; "
            "leave out --from to make everything again"
        )

    def rows(self, output: str, stage: str, out: Path, fingerprint: str) -> int:
        """The parts of a stage's output that were made with this fingerprint; how many `out` has then.

        A shard's failures come first: where the shard is, they are known to be there too.
        """
        share(self.folder / "failed" / stage, out / "failed" / stage, fingerprint)
        return share(self.folder / output, out / output, fingerprint)

    def decisions(self, out: Path) -> None:
        """People's decisions on single pairs, if `out` has the same grids and no pairs yet: it follows them."""
        grids = [Dataset(folder / "grids") for folder in (self.folder, out)]
        if not all(each.is_complete() for each in grids) or grids[0].fingerprint() != grids[1].fingerprint():
            return
        if not labels.applied(out) and not Dataset(out / "pairs").shards():
            labels.fix(out, labels.decided(self.folder))
        labels.copy(self.folder, out)

    def answers(self, out: Path, everywhere: bool) -> None:
        """The language models' answers so far, unless `out` has some: what was paid for is not asked again."""
        theirs, mine = (answers(folder, everywhere).expanduser() for folder in (self.folder, out))
        if mine.exists() or not theirs.is_file():
            return
        private_file(mine)
        with closing(sqlite3.connect(theirs)) as read, closing(sqlite3.connect(mine)) as write:
            read.backup(write)

    def student(self, recipe: Recipe, out: Path) -> str:
        """The latents, and the training if the recipe trains on the same pairs in the same way; what was taken."""
        there, here = bring(self.folder, "student").parent / TRAINING, desk(out) / TRAINING
        if (here / SUMMARY).exists() or (any(here.glob("step-*/manifest.json")) and (here / "latest").exists()):
            return ""  # trained here already, or taken before
        link_all(there, here, LATENTS)
        if not self._trains_alike(recipe, out):
            return ""
        if not any(there.glob("step-*/manifest.json")):
            if not (there / SUMMARY).exists():
                return ""
            # Its checkpoints were removed, as they may be: the student is taken as it is.
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
        """Whether what the earlier run has trained is what this recipe trains first."""
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
