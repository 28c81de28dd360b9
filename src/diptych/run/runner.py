"""A run: write → paint → curate → select → distill → evaluate → report, in one folder, resumable at any moment.

    run(load("recipes/demo.yaml"), "runs/demo")

The folder is that of docs/runs.md. The recipe is frozen in it, and a different one is refused; a lock keeps a second
process out (the system drops it with its holder, so a killed run leaves nothing to clear); each stage does only what
is missing. Started again after a kill, a run ends with the rows it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import bill as bills
from diptych.data import labels, places, records
from diptych.data.engine import Engine, LocalEngine, Result, Row
from diptych.data.engines import open_engine
from diptych.data.places import answers, desk, send
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.run.fingerprint import Fingerprints
from diptych.run.resolve import decided, enter, use_threads
from diptych.run.select import Select, refuse_none
from diptych.run.takeover import Source
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
) -> dict[str, Any]:
    """Runs `stages` of a recipe in the folder `out` (runs/NAME if None) and returns a summary of plain values.

    `out` may be an address such as `s3://bucket/run` (`data.places`). `engine` is `local` or `ray`, the latter with the
    `address` of a cluster (`data.ray_engine`); training runs in this process with either. `source` is an earlier run:
    every stage whose fingerprint holds under this recipe is taken over from it (`takeover`), whatever `stages` are.

    Raises UsageError if `out` belongs to another recipe, UserError if another process writes it or a stage cannot go
    on. KeyboardInterrupt passes through and leaves a folder that the same call continues.
    """
    display = display or Display()
    if "distill" in stages:
        teachers.refuse(recipe.teacher, recipe.distill.allow_distilled_teacher)
    folder = place(out) if out is not None else Path("runs") / recipe.name
    earlier = Source.open(source, folder) if source is not None else None
    task = tasks.load(recipe.task)
    started = time.monotonic()
    if (number := parallel.processes()) > 1 and tuple(stages) != ("distill",):
        raise UsageError(
            f"started in {number} processes, and only training shares its work among them: run the other stages "
            "without torchrun first, then: torchrun … -m diptych distill RECIPE"
        )
    if earlier is not None and number > 1:
        raise UsageError(
            f"--from {source}: one process takes over a run; first, without torchrun: diptych curate RECIPE "
            f"--from {source} --out {folder}"
        )
    if not recipe.draws_pairs():
        training = STAGES[STAGES.index("distill") :]
        if not set(stages) & set(training):
            raise UsageError(f"distill.data has other people's pairs alone: there is nothing to {stages[0]}")
        stages = [name for name in stages if name in training]
    first = parallel.is_first()
    display = display if first else Display(quiet=True)
    trains = "distill" in stages
    with ExitStack() as held:
        workers = held.enter_context(open_engine(engine, address)).of(recipe)
        if number == 1:
            _look_ahead(Pipeline(_as_decided(recipe, folder, earlier), task, folder, display), stages, workers, earlier)
        recipe = held.enter_context(enter(recipe, folder, workers, trains, earlier.recipe if earlier else None))
        use_threads(recipe.threads)
        if first:
            told = {"source": str(earlier.folder)} if earlier is not None else {}
            about: dict[str, Any] = {"stages": list(stages), "engine": engine, **told}
            places.append(folder, "start", **about, machine=machine(), versions=versions())
        pipeline = Pipeline(recipe, task, folder, display, workers, earlier)
        if earlier is not None:
            pipeline.take_over(earlier)
        done: dict[str, Any] = {}
        for name in STAGES:
            if name in stages:
                before = time.monotonic()
                result = pipeline.stage(name)
                seconds = round(time.monotonic() - before, 2)
                done[name] = {**result, "seconds": seconds}
                if first:
                    places.append(folder, "stage", stage=name, seconds=seconds, result=result)
    summary: dict[str, Any] = {"run": str(folder), "recipe": recipe.name, "stages": done}
    for key, path in (("report", "report/report.html"), ("metrics", "report/metrics.json"), ("student", "student")):
        if (folder / path).exists():
            summary[key] = str(folder / path)
    summary["seconds"] = round(time.monotonic() - started, 2)
    return summary


def _as_decided(recipe: Recipe, folder: Path, earlier: Source | None) -> Recipe:
    """The recipe with what a machine has decided already: here, or in the run that is taken over."""
    there = folder / "recipe.yaml"
    frozen = recipes.load(there) if there.is_file() else earlier.recipe if earlier is not None else None
    return decided(recipe, frozen) if frozen is not None else recipe


def _look_ahead(pipeline: Pipeline, stages: Sequence[str], engine: Engine, earlier: Source | None) -> None:
    """Finds what would stop one of the stages, before the first of them makes anything or the folder is anyone's."""
    from diptych.run.ready import check

    if earlier is not None and pipeline.recipe.draws_pairs():
        earlier.refuse_unlike(pipeline.fingerprints.of("write"), pipeline.recipe)
    use_threads(pipeline.recipe.threads)
    check(
        pipeline, [name for name in STAGES if name in stages], engine, earlier.folder if earlier is not None else None
    )


class Pipeline:
    """The stages of one run, each knowing what made its input."""

    def __init__(
        self,
        recipe: Recipe,
        task: tasks.Task,
        folder: Path,
        display: Display,
        engine: Engine | None = None,
        source: Source | None = None,
        weights: Mapping[str, str] | None = None,
    ) -> None:
        """`weights` are the models' hashes, where the models need not be here (`Fingerprints`)."""
        self.fingerprints = Fingerprints(recipe, task, folder, weights)
        self.recipe, self.task, self.folder, self.display, self.source = recipe, task, folder, display, source
        self.engine = engine = engine or LocalEngine()
        self.answers = answers(folder, everywhere=not isinstance(engine, LocalEngine))
        if recipe.curate.copies is not None and task.geometry == "aligned":
            why = f"curate.copies rejects panels that show the same image, which the task '{task.name}' needs"
            raise UsageError("recipe_conflict", f"{why}. Leave curate.copies out; use thresholds.change instead.")

    def stage(self, name: str) -> dict[str, Any]:
        """Runs the stage of this name."""
        return getattr(self, name)()

    def take_over(self, source: Source) -> None:
        """Takes over from an earlier run what holds under this recipe, the training included, and says what that is."""
        taken: dict[str, int] = {}
        if self.recipe.draws_pairs():
            for output, stage in (("prompts", "write"), ("grids", "paint"), ("candidates", "curate")):
                taken[output] = source.rows(output, stage, self.folder, self.fingerprints.of(stage))
            source.decisions(self.folder)
            taken["pairs"] = source.rows("pairs", Select.name, self.folder, self.fingerprints.of("select"))
            source.answers(self.folder, everywhere=not isinstance(self.engine, LocalEngine))
        said = [f"{name} ({parts} parts)" for name, parts in taken.items() if parts]
        trained = source.student(self.recipe, self.folder)
        places.append(self.folder, "take over", source=str(source.folder), parts=taken, training=trained)
        self.display.say(f"from {source.folder}: {', '.join([*said, *([trained] if trained else [])]) or 'nothing'}")

    # ---- rows

    def write(self) -> dict[str, Any]:
        from diptych.stages.write.stage import Write

        shards = PromptShards(self.recipe.seed, self.recipe.write.count, self.recipe.write.shard_size)
        stage = Write(self.recipe, self.answers)
        print_ = self.fingerprints.of("write")
        if self.recipe.write.writer != "llm":
            return self._rows(stage, shards, "prompts", "prompts", print_, {})
        from diptych.stages.write import diversity  # a language model may repeat itself; a grammar cannot

        def finish(output: Dataset, failed: Dataset) -> None:
            diversity.remove_repeats(output, failed, self.task, stage.layout, self.recipe.write.near_duplicate, print_)

        painted = bool(Dataset(self.folder / "grids").shards())
        with self._billed("write"):
            result = self._rows(stage, shards, "prompts", "prompts", print_, {}, retry=not painted, finish=finish)

        prompts = Dataset(self.folder / "prompts")
        texts = (text for _, _, batch in batches(prompts, "prompt") for text in batch["prompt"])
        spread = diversity.measure(texts, len(prompts)).values()
        return {**result, "spread": spread, "asked": self._bill()}

    def paint(self) -> dict[str, Any]:
        from diptych.stages.paint import Paint

        prompts = self._input("prompts", "write", self.fingerprints.of("write"))
        teacher = {"teacher": self.recipe.teacher, "teacher_sha256": self.fingerprints.teacher()}
        return self._rows(Paint(self.recipe), prompts, "grids", "grids", self.fingerprints.of("paint"), teacher)

    def curate(self) -> dict[str, Any]:
        from diptych.stages.curate.stage import Curate

        grids = self._input("grids", "paint", self.fingerprints.of("paint"))
        made_by: dict[str, Any] = {"judge": self.recipe.curate.judge, "judge_sha256": self.fingerprints.judge()}
        if classifiers := self.fingerprints.screens():
            made_by["screens_sha256"] = classifiers
        print_ = self.fingerprints.of("curate")
        stage = Curate(self.recipe, self.answers)
        trained = (self.folder / "student").exists()
        with self._billed("curate") if self.recipe.curate.vlm else nullcontext():
            result = self._rows(stage, grids, "candidates", "grids", print_, made_by, retry=not trained)
            if result["processed"]:
                self._drop_pairs()
            result["pairs"] = self.select()
        if self.recipe.curate.duplicates:
            result["duplicates"] = len(Dataset(self.folder / "failed" / Select.name))
        return result | ({"asked": self._bill()} if self.recipe.curate.vlm else {})

    def _drop_pairs(self) -> None:
        """Removes what was selected among candidates of which some were made again since."""
        for data in (Dataset(self.folder / "pairs"), Dataset(self.folder / "failed" / Select.name)):
            data.unpublish()
            for shard in data.shards():
                data.drop_shard(shard)

    @contextmanager
    def _billed(self, stage: str) -> Iterator[None]:
        """Says at its end, however it ends, what the run's language models cost so far."""
        try:
            yield
        finally:
            for line in bills.lines(self._bill()):
                self.display.say(f"{stage}: {line}, so far")

    def _bill(self) -> list[dict[str, Any]]:
        return bills.bill(self.folder, self.recipe)

    def select(self) -> int:
        """`pairs/`: the candidates that the thresholds keep and no earlier one shows already; those that repeat one
        are in `failed/select/`. Reads stored numbers only."""
        candidates = self._input("candidates", "curate", self.fingerprints.of("curate"))
        stage = Select(candidates, self.recipe, self.task, labels.applied(self.folder))
        print_ = self.fingerprints.of("select")
        result = self._rows(
            stage, candidates, "pairs", "pairs", print_, stage.made_by(), quiet=True, engine=LocalEngine()
        )
        if result["failed"]:
            again = f"select: {result['failed']} pairs show again what an earlier one shows, or people rejected them"
            self.display.say(f"{again}; see {self.folder / 'failed' / 'select'}")
        if not result["rows"]:
            refuse_none(candidates, self.folder)
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
        """One stage through the engine, into the folder `output`."""
        target = Dataset(self.folder / output, records.schema(records.COLUMNS[output]))
        failed = Dataset(self.folder / "failed" / stage.name, records.schema(records.FAILED))
        manifest: dict[str, Any] = {"run": self.recipe.name, "task": self.task.name, "task_version": self.task.version}
        manifest |= {"seed": self.recipe.seed, **made_by}  # versions are in the log: they alone make no other rows
        if isinstance(inputs, Dataset):
            manifest["inputs"] = {Path(inputs.url).name: inputs.manifest_hash()}
        display = Display(quiet=True) if quiet else self.display
        with display.stage(stage.name, unit) as report:
            result: Result = (engine or self.engine).run(
                stage, inputs, target, failed, fingerprint, report, manifest, retry=retry, finish=finish
            )
        if result.failed and not quiet:
            first = f" (first: {result.reasons[0]})" if result.reasons else ""
            again = f"; run the same command again to ask for {result.lost} of them" if result.lost and retry else ""
            self.display.say(
                f"{stage.name}: {result.failed} of {result.inputs} rows failed{first}; see {failed.url}{again}"
            )
        return asdict(result)

    def _input(self, name: str, made_by: str, fingerprint: str) -> Dataset:
        data = Dataset(self.folder / name, records.schema(records.COLUMNS[name]))
        data.shards_done(fingerprint)
        if not data.is_complete(fingerprint):
            raise UserError(
                f"{data.url} is not complete; first: diptych {made_by} {self.folder}/recipe.yaml --out {self.folder}"
            )
        return data

    # ---- training and scores

    def distill(self) -> dict[str, Any]:
        from diptych.train.distill import distill

        own = self._input("pairs", "curate", self.fingerprints.of("select")) if self.recipe.draws_pairs() else None
        with self.display.stage("distill", "steps") as report:
            recipe = sha256_file(self.folder / "recipe.yaml")
            numbers = distill(self.recipe, own, desk(self.folder) / "student", report, recipe_sha256=recipe)
        if parallel.is_first():
            send(self.folder, "student")
        return {
            "steps": self.recipe.distill.steps,
            "pairs": numbers["pairs"] if own is None else len(own),
            "training": numbers,
        }

    def evaluate(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self.recipe.evaluate.suite != "none":
            from diptych.evaluate.harness import evaluate_run

            with self.display.stage("evaluate", "images") as report:
                evaluate_run(self.recipe, self.folder, report, engine=self.engine, **self._drawn_before())
            result["suite"] = self.recipe.evaluate.suite
        if self.recipe.evaluate.relight:
            from diptych.evaluate import relighting

            with self.display.stage("relight", "images") as report:
                relighting.evaluate(self.recipe, self.folder, report, self.engine, **self._drawn_before())
            result["relight"] = self.recipe.evaluate.relight
        from diptych.evaluate.report import run_report

        with self.display.stage("report", "pages") as progress:
            run_report.write(self.recipe, self.folder)
            progress(1, 1)
        return result

    def _drawn_before(self) -> dict[str, Any]:
        """Where else pictures of this evaluation may have been drawn already."""
        return {"source": self.source.folder} if self.source is not None else {}


class PromptShards(Sequence[list[Row]]):
    """The input of the first stage, a shard at a time, made when it is asked for: for each grid to ask for its id, its
    number and its seed."""

    def __init__(self, seed: int, total: int, shard_size: int) -> None:
        self.seed, self.total, self.shard_size = seed, total, shard_size

    def __len__(self) -> int:
        return -(-self.total // self.shard_size)

    def __getitem__(self, index: Any) -> Any:
        """The rows of shard `index`, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.shard_size
        names = [records.prompt_id(i) for i in range(start, min(start + self.shard_size, self.total))]
        return [
            {"id": name, "index": start + i, "seed": records.seed_of(self.seed, name, "write")}
            for i, name in enumerate(names)
        ]
