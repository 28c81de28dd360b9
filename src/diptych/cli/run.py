"""The commands of a recipe: `run` and its stages `write`, `paint`, `curate`, `distill` and `evaluate`; `plan`, `ablate`
and `tasks`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import Cluster, Json, Scales, command, tell
from diptych.errors import UsageError
from diptych.utils.console import printable_json, show

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships.")]
OutDir = Annotated[
    str | None, typer.Option("--out", metavar="DIR", help="The run's folder, or s3://… [default: runs/NAME].")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, for instance distill.steps=200. Repeatable."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="An earlier run: every stage that this recipe leaves as it was is taken over from it, not made again.",
    ),
]
LOCAL = Cluster()


@dataclass(frozen=True)
class Work:
    """A recipe, the folder of its run, and what is changed in it."""

    recipe: RecipeArg
    out: OutDir = None
    sets: Sets = None
    as_json: Json = False


def _run(work: Work, stages: tuple[str, ...] | None, cluster: Cluster = LOCAL, source: str | None = None) -> None:
    from diptych import recipe as recipes
    from diptych.run.resolve import OtherRecipe
    from diptych.run.runner import STAGES, run
    from diptych.student.runtime import parallel
    from diptych.utils.console import Display, duration

    for name, value in (("--out", work.out), ("--from", source)):
        if value == "":
            raise UsageError(f"{name} is empty; name a folder")
    loaded, sets = recipes.load(work.recipe, work.sets or ()), work.sets or ()
    engine, address = cluster.engine, cluster.address
    try:
        summary = run(loaded, work.out, stages or STAGES, Display(quiet=work.as_json), engine, address, source)
    except OtherRecipe as error:
        asked = [("--set", text) for text in sets] + ([("--engine", engine)] if engine != "local" else [])
        asked += [("--address", address)] if address is not None else []
        words = [word for pair in asked for word in pair]
        raise OtherRecipe(error.folder, error.differ, work.recipe, words) from error
    if not parallel.is_first():
        return
    if work.as_json:
        show(printable_json(summary))
        return
    for name, result in summary["stages"].items():
        counts = ", ".join(
            f"{result[key]} {word}"
            for key, word in (("rows", "rows"), ("failed", "failed"), ("pairs", "pairs"), ("steps", "steps"))
            if result.get(key) or (key in ("rows", "pairs") and key in result)
        )
        show(f"{name:<9} {duration(result['seconds']):>7}  {counts}")
    show(summary.get("report") or summary["run"])


@command("diptych run recipes/pocket.yaml --out runs/first --set write.count=500")
def run(work: Work, cluster: Cluster, source: From = None) -> None:
    """Run a whole recipe: write, paint, curate, distill, evaluate, report.

    Interrupted or killed, the same command continues. The folder belongs to one recipe: another one is refused. To
    correct a recipe, run it with --from the earlier run into another --out: only what the correction changes is made.
    With --engine ray the workers of a cluster make the rows (docs/scale.md); training stays in this process.
    """
    _run(work, None, cluster, source)


@command("diptych write recipes/pocket.yaml --out runs/first")
def write(work: Work, cluster: Cluster) -> None:
    """Write the grid prompts only (prompts/)."""
    _run(work, ("write",), cluster)


@command("diptych paint flux-subject --out s3://bucket/run --engine ray --address auto")
def paint(work: Work, cluster: Cluster, source: From = None) -> None:
    """Let the teacher draw the grids only (prompts/ → grids/)."""
    _run(work, ("paint",), cluster, source)


@command("diptych curate recipes/pocket.yaml --out runs/first")
def curate(work: Work, cluster: Cluster, source: From = None) -> None:
    """Cut, judge and select pairs only (grids/ → candidates/ → pairs/)."""
    _run(work, ("curate",), cluster, source)


@command("diptych distill recipes/pocket.yaml --out runs/first")
def distill(work: Work, source: From = None) -> None:
    """Train the student only (pairs/ → student/)."""
    _run(work, ("distill",), source=source)


@command("diptych plan flux-subject --assume devices=8 --assume gpu_hour=2.5")
def plan(
    work: Work,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=NUMBER", help="Any assumption that the plan names. Repeatable."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="H200, H100, RTX4090 or cpu [default: as the recipe asks]."),
    ] = None,
) -> None:
    """Say what a recipe will cost before it runs: hours, calls, tokens, money, disk, memory. Runs nothing.

    What a run in its folder has measured takes the place of what is assumed.
    """
    from diptych import recipe as recipes
    from diptych.run import plan as plans

    found = plans.make(recipes.load(work.recipe, work.sets or ()), assume or (), gpu, work.out)
    tell(found, plans.lines, work.as_json)


@command("diptych ablate pocket --out runs/ablations --from runs/first")
def ablate(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study's file, or the name of one that ships.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The study's folder.")],
    base: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="A curated run to share [default: one is made in DIR/base]."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="VARIANT", help="Run this variant. Repeatable.")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train and score variants of a recipe with several seeds on one run's data, and put them into one table.

    Baselines that train nothing stand beside them. Nothing is painted, judged or trained twice. Interrupted, the same
    command continues. The study `pocket` (6 trained variants with 3 seeds, 4 baselines) takes about 100 minutes of two
    CPU cores: 8 of painting, 57 of training, 25 of scoring, 10 of per-subject tuning.
    """
    from diptych.run import ablate as studies
    from diptych.utils.console import Display

    if out == "":
        raise UsageError("--out is empty; name a folder")
    found = studies.ablate(study, out, Display(quiet=as_json), base, only or (), sets or ())
    tell(found, studies.lines, as_json)


@command("diptych tasks · diptych tasks show subject > mine.yaml · diptych tasks mine.yaml")
def tasks(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[show] NAME|FILE", help="A task that ships, or a task file to check."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks that ship; or check one, and say what it holds; or `show` its YAML, to be copied and changed."""
    from diptych.recipe import tasks

    names = list(words or ())
    if names[:1] == ["show"]:
        if len(names) != 2:
            raise UsageError(f"name one task to show, for instance: diptych tasks show {tasks.names()[-1]}")
        text = tasks.source(names[1])
        tell({"task": names[1], "yaml": text}, lambda found: [found["yaml"].rstrip("\n")], as_json)
        return
    if len(names) > 1:
        raise UsageError(f"one task at a time, not {len(names)}; `diptych tasks show NAME` prints a task's YAML")
    tell(tasks.summary(*names), tasks.format_summary, as_json, indent=2)


@dataclass(frozen=True)
class Evaluated(Scales):
    """What is evaluated, on what: the keys of an evaluation."""

    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="NAME", help="pocket, dreambench++, dreambench, folder, or a YAML file."),
    ] = None
    data: Annotated[str | None, typer.Option("--data", metavar="FOLDER", help="The suite's pictures and prompts.")] = (
        None
    )
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="[NAME=]MODEL", help="`pocket`, a run, a student, owner/name. Repeatable."),
    ] = None
    baselines: Annotated[
        list[str] | None, typer.Option("--baseline", metavar="NAME", help="text_only, copy, inpaint, … Repeatable.")
    ] = None
    base: Annotated[
        str | None, typer.Option("--base", help="The teacher: for baselines, and students without parts of their own.")
    ] = None
    references: Annotated[
        int | None, typer.Option("--references", min=1, help="Use only N references, evenly spaced.")
    ] = None
    prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Use only N prompts for each reference.")] = (
        None
    )
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, help="Repeatable; several also give diversity [default: 0]."),
    ] = None
    size: Annotated[int | None, typer.Option("--size", help="Pixels a side [default: the suite's, 512].")] = None
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps [default: the best].")] = None


@dataclass(frozen=True)
class Judge:
    """Who gives the scores."""

    judge: Annotated[
        str | None, typer.Option("--judge", help="Who gives CP and PF: pocket, vlm or embedding [default: what fits].")
    ] = None
    judge_endpoint: Annotated[
        str | None, typer.Option("--judge-endpoint", metavar="URL", help="An OpenAI-compatible server.")
    ] = None
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", metavar="NAME", help="The server's name for its model.")
    ] = None
    judge_key: Annotated[
        str | None, typer.Option("--judge-key", metavar="ENV", help="The environment variable with its key.")
    ] = None
    judge_local: Annotated[
        str | None, typer.Option("--judge-local", metavar="MODEL", help="Or a model on this machine.")
    ] = None

    def section(self) -> dict[str, Any] | None:
        """The judge's section of an evaluation, of what was said of it."""
        found: dict[str, Any] = {} if self.judge is None else {"kind": self.judge}
        url, model = self.judge_endpoint, self.judge_model
        if url is not None or model is not None:
            if url is None or model is None:
                raise UsageError("a vision-language judge needs both --judge-endpoint URL and --judge-model NAME")
            # As published; three answers at temperature 0 are one and the same.
            found["endpoint"] = {"base_url": url, "model": model, "temperature": 1.0, "max_tokens": 512}
            if self.judge_key is not None:
                found["endpoint"]["api_key_env"] = self.judge_key
        if self.judge_local is not None:
            found |= {"local": self.judge_local, "repeats": 1}
        return found or None


@command(
    "diptych evaluate recipes/pocket.yaml --out runs/first · diptych evaluate --suite pocket --model pocket "
    "--baseline text_only --baseline copy --out scores · diptych evaluate --suite dreambench++ --data FOLDER --model "
    "FOLDER --base FLUX.1-dev --judge-endpoint http://localhost:8000/v1 --judge-model NAME --out scores · diptych "
    "evaluate --compare a:student b:student"
)
def evaluate(
    *,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Its run is scored (its last stage); else --suite.")
    ] = None,
    wanted: Evaluated,
    judge: Judge,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="The folder [default: evaluations/SUITE; runs/NAME].")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="generate or score: one half of the work.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME[=MODEL]", help="clip-i, clip-t, dino, dinov2; or none. Repeatable."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe, or of evaluation.yaml. Repeatable."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let a judge score what it curated; the result says so.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="FOLDER:METHOD twice: paired differences and p-values."),
    ] = None,
    cluster: Cluster,
    as_json: Json = False,
) -> None:
    """Score students: a recipe's own, or any models and baselines on a suite, with a report; or compare two.

    Killed, the same command draws and scores only what is missing.
    """
    if out == "":
        raise UsageError("--out is empty; name a folder")
    if compare is not None:
        from diptych.evaluate.scoring.summary import compare_folders, format_comparison

        tell(compare_folders(*compare, Path(out) if out is not None else None), format_comparison, as_json)
    elif recipe is not None:
        if said := [key for key, value in {**asdict(wanted), "only": only, "judge": judge.judge}.items() if value]:
            raise UsageError(
                f"{', '.join(said)}: a recipe says what is evaluated (--set evaluate.KEY=VALUE); leave RECIPE out "
                "to evaluate other models on a suite"
            )
        _run(Work(recipe, out, sets, as_json), ("evaluate",), cluster)
    elif wanted.suite is None and out is None:
        raise UsageError("missing argument 'RECIPE', or --suite NAME with --model MODEL")
    else:
        folder = Path(out) if out is not None else Path("evaluations") / Path(str(wanted.suite)).stem
        asked = {**asdict(wanted), "judge": judge.section()}
        _suite(asked, metric, folder, only, force, sets, as_json, cluster)


def _suite(
    asked: dict[str, Any],
    metrics: list[str] | None,
    out: Path,
    only: str | None,
    force: bool,
    sets: list[str] | None,
    as_json: bool,
    cluster: Cluster,
) -> None:
    from diptych.data.engines import open_engine
    from diptych.data.places import lock
    from diptych.evaluate import evaluation, harness
    from diptych.evaluate.report import suite_report
    from diptych.utils.console import Display

    if only not in (None, "generate", "score"):
        raise UsageError(f"--only {only}: is generate or score")
    made = evaluation.make(asked | {"models": evaluation.named(asked["models"] or ()) or None}, out, sets or ())
    if metrics is not None:
        made = made.model_copy(update={"metrics": [] if metrics == ["none"] else metrics})
    display = Display(quiet=as_json)
    with open_engine(cluster.engine, cluster.address) as machines, lock(out):
        workers = machines.of(made.recipe())
        found = harness.evaluate(made, out, only, force, display, engine=workers)  # pyright: ignore[reportArgumentType]
        report = None if only == "generate" else suite_report.write(out)
    tell(found, lambda found: [*harness.format_result(found), str(report or out)], as_json)
