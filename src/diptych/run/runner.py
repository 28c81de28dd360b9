"""A run: write → paint → curate → select → distill → evaluate → report, in one folder, resumable at any moment.

    run(load("recipes/demo.yaml"), "runs/demo")

The folder is that of docs/runs.md. The recipe is frozen in it, and a different one is refused; a lock keeps a second
process out (the system drops it with its holder, so a killed run leaves nothing to clear); each stage does only what
is missing. Started again after a kill, a run ends with the rows it would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import bill as bills
from diptych.data import labels, places, records
from diptych.data.engine import Engine, Failure, LocalEngine, Result, Row, Work, open_engine
from diptych.data.places import answers, bring, desk, lock, send
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import tasks
from diptych.recipe.schema import Duplicates, Recipe, Thresholds
from diptych.run.frozen import Source, decided, free_name, freeze
from diptych.stages.curate import duplicates
from diptych.student.families import teachers
from diptych.student.runtime import parallel
from diptych.utils import models
from diptych.utils.console import Display
from diptych.utils.machine import machine, thread_variables, versions
from diptych.utils.paths import place

STAGES = ("write", "paint", "curate", "distill", "evaluate")
# Raised when the rows a stage makes from equal inputs change: parts of an older version are then not mixed in.
TRAINING_KEYS = {"captions": {"instructions"}}  # of a task: no row depends on them
VERSIONS = {"write": 1, "paint": 1, "curate": 1, "select": 1}
ALIGNED = 2  # the same, for what curation does with aligned panels alone
WORDED = 2  # the same, for what is written by a language model or from a vocabulary, whose captions name the style


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
        recipe = held.enter_context(enter(recipe, folder, workers, trains, earlier))
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
        earlier.refuse_unlike(pipeline.fingerprints("write"), pipeline.recipe)
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
    ) -> None:
        self.recipe, self.task, self.folder, self.display, self.source = recipe, task, folder, display, source
        self.engine = engine = engine or LocalEngine()
        self.answers = answers(folder, everywhere=not isinstance(engine, LocalEngine))
        if recipe.curate.copies is not None and task.geometry == "aligned":
            raise UsageError(
                f"curate.copies refuses panels that show one picture, and the task '{task.name}' asks for such: leave "
                "it out; what must differ there is the task's thresholds.change"
            )

    def stage(self, name: str) -> dict[str, Any]:
        return {
            "write": self.write,
            "paint": self.paint,
            "curate": self.curate,
            "distill": self.distill,
            "evaluate": self.evaluate,
        }[name]()

    def take_over(self, source: Source) -> None:
        """Takes over from an earlier run what holds under this recipe, the training included, and says what that is."""
        taken: dict[str, int] = {}
        if self.recipe.draws_pairs():
            for output, stage in (("prompts", "write"), ("grids", "paint"), ("candidates", "curate")):
                taken[output] = source.rows(output, stage, self.folder, self.fingerprints(stage))
            source.decisions(self.folder)
            taken["pairs"] = source.rows("pairs", _Select.name, self.folder, self.fingerprints("select"))
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
        print_ = self.fingerprints("write")
        if self.recipe.write.writer != "llm":
            return self._rows(stage, shards, "prompts", "prompts", print_, {})
        from diptych.stages.write import diversity  # a language model may repeat itself; a grammar cannot
        from diptych.stages.write import diversity as repeats

        def finish(output: Dataset, failed: Dataset) -> None:
            repeats.take_out(output, failed, self.task, stage.layout, self.recipe.write.near_duplicate, print_)

        painted = bool(Dataset(self.folder / "grids").shards())
        with self._billed("write"):
            result = self._rows(stage, shards, "prompts", "prompts", print_, {}, retry=not painted, finish=finish)

        prompts = Dataset(self.folder / "prompts")
        texts = (text for _, _, batch in batches(prompts, "prompt") for text in batch["prompt"])
        spread = diversity.spread(texts, len(prompts)).values()
        return {**result, "spread": spread, "asked": self._bill()}

    def paint(self) -> dict[str, Any]:
        from diptych.stages.paint import Paint

        prompts = self._input("prompts", "write", self.fingerprints("write"))
        teacher = {"teacher": self.recipe.teacher, "teacher_sha256": self._model(self.recipe.teacher, "teacher")}
        return self._rows(Paint(self.recipe), prompts, "grids", "grids", self.fingerprints("paint"), teacher)

    def curate(self) -> dict[str, Any]:
        from diptych.stages.curate.stage import Curate

        grids = self._input("grids", "paint", self.fingerprints("paint"))
        judge = self.recipe.curate.judge
        made_by: dict[str, Any] = {"judge": judge, "judge_sha256": self._model(judge, "curator")}
        if classifiers := self._screens():
            made_by["screens_sha256"] = classifiers
        print_ = self.fingerprints("curate")
        stage = Curate(self.recipe, self.answers)
        trained = (self.folder / "student").exists()
        with self._billed("curate") if self.recipe.curate.vlm else nullcontext():
            result = self._rows(stage, grids, "candidates", "grids", print_, made_by, retry=not trained)
            if result["processed"]:
                self._drop_pairs()
            result["pairs"] = self.select()
        if self.recipe.curate.duplicates:
            result["duplicates"] = len(Dataset(self.folder / "failed" / _Select.name))
        return result | ({"asked": self._bill()} if self.recipe.curate.vlm else {})

    def _drop_pairs(self) -> None:
        """Removes what was selected among candidates of which some were made again since."""
        for data in (Dataset(self.folder / "pairs"), Dataset(self.folder / "failed" / _Select.name)):
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
        candidates = self._input("candidates", "curate", self.fingerprints("curate"))
        settings = self.recipe.curate
        thresholds = self.task.thresholds(settings.thresholds)
        bounds = records.Bounds.of(settings)
        made_by: dict[str, Any] = {"thresholds": thresholds.model_dump()}
        if bounds.screens is not None:
            made_by["screens"] = bounds.screens
        if bounds.copies is not None:
            made_by["copies"] = bounds.copies
        if settings.duplicates:
            made_by["duplicates"] = settings.duplicates.model_dump()
        decided = labels.applied(self.folder)
        if decided:
            made_by["decided"] = labels.counts(decided)
        stage = _Select(candidates, thresholds, bounds, settings.duplicates, labels.both_ways(decided))
        print_ = self.fingerprints("select")
        result = self._rows(stage, candidates, "pairs", "pairs", print_, made_by, quiet=True, engine=LocalEngine())
        if result["failed"]:
            again = f"select: {result['failed']} pairs show again what an earlier one shows, or people rejected them"
            self.display.say(f"{again}; see {self.folder / 'failed' / 'select'}")
        if not result["rows"]:
            reasons = count(reason for _, _, batch in batches(candidates, "reason") for reason in batch["reason"])
            raise UserError(
                f"curation kept none of {len(candidates)} candidate pairs "
                f"({', '.join(f'{reason}: {n}' for reason, n in reasons.items()) or 'there were none'}); "
                f"see {candidates.url}. Another threshold needs no new grids and no judge: diptych data recurate "
                f"{self.folder} --set same=NUMBER --out {free_name(self.folder)}"
            )
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

        own = self._input("pairs", "curate", self.fingerprints("select")) if self.recipe.draws_pairs() else None
        with self.display.stage("distill", "steps") as report:
            recipe = hashlib.sha256((self.folder / "recipe.yaml").read_bytes()).hexdigest()
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
            from diptych.evaluate import relight

            with self.display.stage("relight", "images") as report:
                relight.evaluate(self.recipe, self.folder, report, self.engine, **self._drawn_before())
            result["relight"] = self.recipe.evaluate.relight
        from diptych.evaluate.report import run_report as page

        with self.display.stage("report", "pages") as progress:
            page.write(self.recipe, self.folder)
            progress(1, 1)
        return result

    def _drawn_before(self) -> dict[str, Any]:
        """Where else pictures of this evaluation may have been drawn already."""
        return {"source": self.source.folder} if self.source is not None else {}

    # ---- identity

    def _model(self, name: str, role: str) -> str:
        return models.fingerprint(models.resolve(name, role))

    def _screens(self) -> dict[str, str]:
        """The weights of the classifiers that screen panels, by the screen's name."""
        screens = self.recipe.curate.screens
        return {c.name: self._model(c.model, "screen") for c in screens.classifiers} if screens else {}

    def fingerprints(self, stage: str) -> str:
        """What makes a stage's rows: its settings, its models, and, through its input's own fingerprint, all before."""
        recipe = self.recipe
        settings: list[str]
        if stage == "write":
            from diptych.stages.write.stage import words_digest

            task = hashlib.sha256(self.task.model_dump_json(exclude=TRAINING_KEYS).encode()).hexdigest()
            words = words_digest(recipe)
            settings = [recipe.fingerprint("seed", "write"), task, words]
            settings += [f"worded {WORDED}"] if words or recipe.write.writer == "llm" else []
        elif stage == "paint":
            teacher = self._model(recipe.teacher, "teacher")
            settings = [self.fingerprints("write"), recipe.fingerprint("paint", "device", "threads"), teacher]
        elif stage == "curate":
            judge = self._model(recipe.curate.judge, "curator")
            settings = [self.fingerprints("paint"), recipe.fingerprint("curate"), judge, *self._screens().values()]
            settings += [f"aligned {ALIGNED}"] if self.task.geometry == "aligned" else []
        else:
            settings = [self.fingerprints("curate"), recipe.fingerprint("curate.thresholds")]
            if decided := labels.applied(self.folder):
                settings.append(json.dumps(sorted(labels.both_ways(decided).items())))
        return hashlib.sha256(json.dumps([stage, VERSIONS[stage], *settings]).encode()).hexdigest()


class _Select:
    """The stage that makes `pairs/` of `candidates/`."""

    name = "select"
    batch_size = 256

    def __init__(
        self,
        candidates: Dataset,
        thresholds: Thresholds,
        bounds: records.Bounds,
        repeats: Duplicates | None,
        decided: dict[str, bool],
    ) -> None:
        self.candidates, self.thresholds, self.bounds, self.repeats = candidates, thresholds, bounds, repeats
        self.decided = decided  # by people, whatever the numbers say

    def load(self) -> Work:
        """Rows to the same rows, or to nothing; a row that repeats an earlier one or was rejected by hand fails."""
        again: dict[str, duplicates.Repeat] = {}
        if self.repeats is not None:
            again = duplicates.find(self.candidates, self.repeats, self.thresholds, self.bounds)

        def one(row: Row) -> list[Row] | Failure:
            accepted = self.decided.get(row["id"])
            if accepted is not None:
                return [{**row, "kept": True, "reason": records.ACCEPTED}] if accepted else Failure(records.REJECTED)
            if row["id"] in again:
                return Failure(again[row["id"]].reason)
            return records.select([row], self.thresholds, self.bounds)

        return lambda rows: [one(row) for row in rows]


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


def count(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, most frequent first."""
    from collections import Counter

    return dict(Counter(values).most_common())


def use_threads(threads: int | None) -> None:
    """Tells torch how many CPU threads to use; if it is not loaded yet, it will read so when it is.

    So a call that has nothing to compute does not wait seconds for torch.
    """
    if threads is None:
        return
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ |= thread_variables(threads)


@contextmanager
def enter(recipe: Recipe, folder: Path, engine: Engine, trains: bool, source: Source | None = None) -> Iterator[Recipe]:
    """The folder is this run's alone inside; gives the recipe as it is frozen there. To train, what another machine has
    trained is fetched. What the recipe leaves to the machine is as `source` has it, if there is one.

    Of several processes the first locks and freezes, and the others read what it froze.
    """
    if parallel.processes() == 1:
        with lock(folder):
            frozen = freeze(recipe, folder, engine, source.recipe if source is not None else None)
            if trains:
                bring(folder, "student")
            yield frozen
        return
    from diptych.train.processes import join
    from diptych.utils.machine import pick_device

    processes, _ = join(pick_device(recipe.device))
    with ExitStack() as held:
        held.callback(parallel.leave)  # also when stopped: torch's threads must not outlive Python
        with processes.together() as first:
            if first:
                held.enter_context(lock(folder))
                freeze(recipe, folder, engine)
                bring(folder, "student")
        yield recipes.load(folder / "recipe.yaml")
