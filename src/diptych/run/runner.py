"""A run: write → paint → curate → select → distill → evaluate → report, in one folder, resumable at any moment.

    run(load("recipes/demo.yaml"), "runs/demo")

docs/runs.md describes the folder. The recipe is frozen in it, and a different recipe is an error. A lock keeps other
processes out; the system releases it when its process ends, so a killed run leaves no stale lock. Each stage does only
what is missing: after a kill, a run ends with the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import bill as bills
from diptych.data import labels, places, records
from diptych.data.engine import Engine, LocalEngine, Result, Row
from diptych.data.places import answers, desk, send
from diptych.data.ray_engine import open_engine
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.run.fingerprint import Fingerprints
from diptych.run.resolve import enter, use_threads, with_resolved
from diptych.run.select import SelectStage, none_accepted
from diptych.run.spending import Spending
from diptych.run.takeover import EarlierRun
from diptych.student.families import teachers
from diptych.student.runtime import parallel
from diptych.utils.console import Display
from diptych.utils.io import sha256_file
from diptych.utils.machine import machine, versions
from diptych.utils.paths import place

STAGES = ("write", "paint", "curate", "distill", "evaluate")


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    stages: Sequence[str] = STAGES,
    display: Display | None = None,
    engine: str = "local",
    address: str | None = None,
    source: str | Path | None = None,
    hour_price: float | None = None,
) -> dict[str, Any]:
    """Run `stages` of a recipe in the folder `out` (runs/NAME if None) and return a summary of plain values.

    Args:
        out: a folder or an address such as `s3://bucket/run` (`data.places`).
        engine: `local` or `ray`, the latter with the `address` of a cluster (`data.ray_engine`). Training runs in this
            process with both.
        source: an earlier run. Every stage whose fingerprint is the same under this recipe is taken over from it
            (`takeover`), independent of `stages`.
        hour_price: price of an hour of the machines, for the cost so far in the progress (`spending`).

    Raises UsageError if `out` belongs to another recipe, UserError if another process writes it or a stage fails.
    KeyboardInterrupt passes through and leaves a folder that the same call resumes.
    """
    display = display or Display()
    if "distill" in stages:
        teachers.refuse(recipe.teacher, recipe.distill.allow_distilled_teacher)
    folder = place(out) if out is not None else Path("runs") / recipe.name
    earlier = EarlierRun.open(source, folder) if source is not None else None
    task = tasks.load(recipe.task)
    started = time.monotonic()
    if (number := parallel.processes()) > 1 and tuple(stages) != ("distill",):
        raise UsageError(
            "option_unsuited",
            f"Started in {number} processes, but only training uses several. Run the other stages without torchrun "
            "first, then: torchrun … -m diptych distill RECIPE",
        )
    if earlier is not None and number > 1:
        raise UsageError(
            "option_conflict",
            f"--from {source} needs a single process. Run first, without torchrun: diptych curate RECIPE --from "
            f"{source} --out {folder}",
        )
    if not recipe.draws_pairs():
        training = STAGES[STAGES.index("distill") :]
        if not set(stages) & set(training):
            why = f"This recipe trains only on the pairs of distill.data, so there is nothing to {stages[0]}"
            raise UsageError("recipe_conflict", f"{why}. Run diptych distill instead.")
        stages = [name for name in stages if name in training]
    first = parallel.is_first()
    display = display if first else Display(quiet=True)
    trains = "distill" in stages
    with ExitStack() as held:
        workers = held.enter_context(open_engine(engine, address)).of(recipe)
        if number == 1:
            _check_first(Stages(_with_auto(recipe, folder, earlier), task, folder, display), stages, workers, earlier)
        recipe = held.enter_context(enter(recipe, folder, workers, trains, earlier.recipe if earlier else None))
        use_threads(recipe.threads)
        if first:
            about: dict[str, Any] = {"stages": list(stages), "engine": engine}
            about |= {"source": str(earlier.folder)} if earlier is not None else {}
            places.append(folder, "start", **about, machine=machine(), versions=versions())
        run_stages = Stages(recipe, task, folder, display, workers, earlier)
        if earlier is not None:
            run_stages.take_over(earlier)
        done: dict[str, Any] = {}
        display.cost = Spending(folder, recipe, hour_price).text
        wanted = [name for name in STAGES if name in stages]
        for number, name in enumerate(wanted, 1):
            before = time.monotonic()
            display.step = f"{number}/{len(wanted)}" if len(wanted) > 1 else ""
            try:
                result = run_stages.stage(name)
            except BaseException:
                with suppress(OSError):  # the disk may be full
                    if first:
                        places.append(folder, "stopped", stage=name, seconds=round(time.monotonic() - before, 2))
                raise
            seconds = round(time.monotonic() - before, 2)
            done[name] = {**result, "seconds": seconds}
            if first:
                places.append(folder, "stage", stage=name, seconds=seconds, result=result)
        display.cost, display.step = str, ""
    summary: dict[str, Any] = {"run": str(folder), "recipe": recipe.name, "stages": done}
    for key, path in (("report", "report/report.html"), ("metrics", "report/metrics.json"), ("student", "student")):
        if (folder / path).exists():
            summary[key] = str(folder / path)
    summary["seconds"] = round(time.monotonic() - started, 2)
    return summary


def _with_auto(recipe: Recipe, folder: Path, earlier: EarlierRun | None) -> Recipe:
    """Return the recipe with the `auto` keys that are resolved already, in this folder or in the earlier run."""
    path = folder / "recipe.yaml"
    frozen = recipes.load(path) if path.is_file() else earlier.recipe if earlier is not None else None
    return with_resolved(recipe, frozen) if frozen is not None else recipe


def _check_first(run: Stages, stages: Sequence[str], engine: Engine, earlier: EarlierRun | None) -> None:
    """Raise the errors that would stop a stage, before the first stage starts and the folder is created."""
    from diptych.run.ready import check

    if earlier is not None and run.recipe.draws_pairs():
        earlier.check_prompts(run.fingerprints.of("write"), run.recipe)
    use_threads(run.recipe.threads)
    check(run, [name for name in STAGES if name in stages], engine, earlier.folder if earlier is not None else None)


class Stages:
    """The stages of one run, with the fingerprints of their inputs."""

    def __init__(
        self,
        recipe: Recipe,
        task: tasks.Task,
        folder: Path,
        display: Display,
        engine: Engine | None = None,
        source: EarlierRun | None = None,
        weights: Mapping[str, str] | None = None,
    ) -> None:
        """`weights` are the hashes of the models, if these need not be on this machine (`Fingerprints`)."""
        self.fingerprints = Fingerprints(recipe, task, folder, weights)
        self.recipe, self.task, self.folder, self.display, self.source = recipe, task, folder, display, source
        self.engine = engine = engine or LocalEngine()
        self.answers = answers(folder, everywhere=not isinstance(engine, LocalEngine))
        if recipe.curate.copies is not None and task.geometry == "aligned":
            why = f"curate.copies rejects panels that show the same image, which the task '{task.name}' needs"
            raise UsageError("recipe_conflict", f"{why}. Set curate.copies=null; use thresholds.change instead.")

    def stage(self, name: str) -> dict[str, Any]:
        """Run the stage of this name."""
        return getattr(self, name)()

    def take_over(self, source: EarlierRun) -> None:
        """Take over the parts of an earlier run that this recipe would make again, also the training, and list them."""
        taken: dict[str, int] = {}
        if self.recipe.draws_pairs():
            for output, stage in (("prompts", "write"), ("grids", "paint"), ("candidates", "curate")):
                taken[output] = source.rows(output, stage, self.folder, self.fingerprints.of(stage))
            source.decisions(self.folder)
            taken["pairs"] = source.rows("pairs", SelectStage.name, self.folder, self.fingerprints.of("select"))
            source.answers(self.folder, everywhere=not isinstance(self.engine, LocalEngine))
        shown = [f"{name} ({parts} parts)" for name, parts in taken.items() if parts]
        trained = source.student(self.recipe, self.folder)
        places.append(self.folder, "take over", source=str(source.folder), parts=taken, training=trained)
        self.display.say(f"from {source.folder}: {', '.join([*shown, *([trained] if trained else [])]) or 'nothing'}")

    def write(self) -> dict[str, Any]:
        """Write `prompts/`."""
        from diptych.stages.write.stage import WriteStage

        shards = PromptShards(self.recipe.seed, self.recipe.write.count, self.recipe.write.shard_size)
        stage = WriteStage(self.recipe, self.answers)
        fingerprint = self.fingerprints.of("write")
        if self.recipe.write.writer != "llm":
            return self._rows(stage, shards, "prompts", "prompts", fingerprint, {})
        from diptych.stages.write import diversity  # a language model may repeat itself; a grammar cannot

        def finish(output: Dataset, failed: Dataset) -> None:
            diversity.remove_repeats(
                output, failed, self.task, stage.layout, self.recipe.write.near_duplicate, fingerprint
            )

        painted = bool(Dataset(self.folder / "grids").shards())
        with self._billed("write"):
            options: dict[str, Any] = {"retry": not painted, "finish": finish}
            result = self._rows(stage, shards, "prompts", "prompts", fingerprint, {}, **options)
        prompts = Dataset(self.folder / "prompts")
        texts = (text for _, _, batch in batches(prompts, "prompt") for text in batch["prompt"])
        spread = diversity.measure(texts, len(prompts)).values()
        return {**result, "spread": spread, "asked": self._bill()}

    def paint(self) -> dict[str, Any]:
        """Paint `grids/`."""
        from diptych.stages.paint import PaintStage

        prompts = self._input("prompts", "write", self.fingerprints.of("write"))
        teacher = {"teacher": self.recipe.teacher, "teacher_sha256": self.fingerprints.teacher()}
        return self._rows(PaintStage(self.recipe), prompts, "grids", "grids", self.fingerprints.of("paint"), teacher)

    def curate(self) -> dict[str, Any]:
        """Make `candidates/` and `pairs/`."""
        from diptych.stages.curate.stage import CurateStage

        grids = self._input("grids", "paint", self.fingerprints.of("paint"))
        made_by: dict[str, Any] = {"judge": self.recipe.curate.judge, "judge_sha256": self.fingerprints.judge()}
        if classifiers := self.fingerprints.screens():
            made_by["screens_sha256"] = classifiers
        fingerprint = self.fingerprints.of("curate")
        stage = CurateStage(self.recipe, self.answers)
        trained = (self.folder / "student").exists()
        with self._billed("curate") if self.recipe.curate.vlm else nullcontext():
            result = self._rows(stage, grids, "candidates", "grids", fingerprint, made_by, retry=not trained)
            if result["processed"]:
                self._drop_pairs()
            result["pairs"] = self.select()
        if self.recipe.curate.duplicates:
            result["duplicates"] = len(Dataset(self.folder / "failed" / SelectStage.name))
        return result | ({"asked": self._bill()} if self.recipe.curate.vlm else {})

    def _drop_pairs(self) -> None:
        """Remove the selection, because some of its candidates are new."""
        for data in (Dataset(self.folder / "pairs"), Dataset(self.folder / "failed" / SelectStage.name)):
            data.unpublish()
            for shard in data.shards():
                data.drop_shard(shard)

    @contextmanager
    def _billed(self, stage: str) -> Iterator[None]:
        """Print the costs of the run's language models so far at the end of the block, also after an error."""
        try:
            yield
        finally:
            for line in bills.format_bill(self._bill()):
                self.display.say(f"{stage}: {line}, so far")

    def _bill(self) -> list[dict[str, Any]]:
        return bills.bill(self.folder, self.recipe)

    def select(self) -> int:
        """Make `pairs/` from stored measurements, and return the number of pairs.

        It has the candidates that the thresholds accept. Those that repeat an earlier pair go to `failed/select/`.
        """
        candidates = self._input("candidates", "curate", self.fingerprints.of("curate"))
        stage = SelectStage(candidates, self.recipe, self.task, labels.applied(self.folder))
        fingerprint, local = self.fingerprints.of("select"), LocalEngine()
        result = self._rows(stage, candidates, "pairs", "pairs", fingerprint, stage.made_by(), quiet=True, engine=local)
        if result["failed"]:
            why = f"select: {result['failed']} pairs repeat an earlier pair or were rejected by people"
            self.display.say(f"{why}; see {self.folder / 'failed' / 'select'}")
        if not result["rows"]:
            raise none_accepted(candidates, self.folder)
        return result["rows"]

    def _rows(
        self,
        stage: Any,
        inputs: Dataset | Sequence[list[Row]],
        output: str,
        unit: str,
        fingerprint: str,
        made_by: dict[str, Any],
        quiet: bool = False,
        engine: Engine | None = None,
        retry: bool = True,
        finish: Callable[[Dataset, Dataset], object] | None = None,
    ) -> dict[str, Any]:
        """Run one stage through the engine, into the folder `output`."""
        target = Dataset(self.folder / output, records.schema(records.COLUMNS[output]))
        failed = Dataset(self.folder / "failed" / stage.name, records.schema(records.FAILED))
        manifest: dict[str, Any] = {"run": self.recipe.name, "task": self.task.name, "task_version": self.task.version}
        manifest |= {"seed": self.recipe.seed, **made_by}  # versions are in the log: they do not change rows
        if isinstance(inputs, Dataset):
            manifest["inputs"] = {Path(inputs.url).name: inputs.manifest_hash()}
        display = Display(quiet=True) if quiet else self.display
        with display.stage(stage.name, unit) as report:
            result: Result = (engine or self.engine).run(
                stage, inputs, target, failed, fingerprint, report, manifest, retry=retry, finish=finish
            )
        if result.failed and not quiet:
            first = f" (first: {result.reasons[0]})" if result.reasons else ""
            again = f"; run the same command again to retry {result.lost} of them" if result.lost and retry else ""
            self.display.say(
                f"{stage.name}: {result.failed} of {result.inputs} rows failed{first}; see {failed.url}{again}"
            )
        return asdict(result)

    def _input(self, name: str, made_by: str, fingerprint: str) -> Dataset:
        """Return the complete output of the stage `made_by`. Raises UserError if it is not complete."""
        data = Dataset(self.folder / name, records.schema(records.COLUMNS[name]))
        data.shards_done(fingerprint)
        if not data.is_complete(fingerprint):
            first = f"Run first: diptych {made_by} {self.folder}/recipe.yaml --out {self.folder}"
            raise UserError("run_incomplete", f"{data.url} is not complete. {first}")
        return data

    def distill(self) -> dict[str, Any]:
        """Train `student/`."""
        from diptych.train.distill import distill

        pairs = self._input("pairs", "curate", self.fingerprints.of("select")) if self.recipe.draws_pairs() else None
        with self.display.stage("distill", "steps") as report:
            recipe = sha256_file(self.folder / "recipe.yaml")
            numbers = distill(self.recipe, pairs, desk(self.folder) / "student", report, recipe_sha256=recipe)
        if parallel.is_first():
            send(self.folder, "student")
        return {
            "steps": self.recipe.distill.steps,
            "pairs": numbers["pairs"] if pairs is None else len(pairs),
            "training": numbers,
        }

    def evaluate(self) -> dict[str, Any]:
        """Generate and score images, and write the report."""
        result: dict[str, Any] = {}
        if self.recipe.evaluate.suite != "none":
            from diptych.evaluate.harness import evaluate_run

            with self.display.stage("evaluate", "images") as report:
                evaluate_run(self.recipe, self.folder, report, engine=self.engine, **self._earlier_images())
            result["suite"] = self.recipe.evaluate.suite
        if self.recipe.evaluate.relight:
            from diptych.evaluate import relighting

            with self.display.stage("relight", "images") as report:
                relighting.evaluate(self.recipe, self.folder, report, self.engine, **self._earlier_images())
            result["relight"] = self.recipe.evaluate.relight
        from diptych.evaluate.report import run_report

        with self.display.stage("report", "pages") as progress:
            run_report.write(self.recipe, self.folder)
            progress(1, 1)
        return result

    def _earlier_images(self) -> dict[str, Any]:
        """Return where else images of this evaluation may exist."""
        return {"source": self.source.folder} if self.source is not None else {}


class PromptShards(Sequence[list[Row]]):
    """The input of the first stage: the id, number and seed of each prompt, made one shard at a time."""

    def __init__(self, seed: int, total: int, shard_size: int) -> None:
        self.seed, self.total, self.shard_size = seed, total, shard_size

    def __len__(self) -> int:
        return -(-self.total // self.shard_size)

    def __getitem__(self, index: Any) -> Any:
        """Return the rows of shard `index`, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.shard_size
        names = [records.prompt_id(i) for i in range(start, min(start + self.shard_size, self.total))]
        return [
            {"id": name, "index": start + i, "seed": records.seed_of(self.seed, name, "write")}
            for i, name in enumerate(names)
        ]
