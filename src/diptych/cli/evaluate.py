"""The commands that compare: `evaluate` students and baselines on a suite, and `ablate` a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, ClassVar

import typer

from diptych.cli import complete
from diptych.cli.options import Cluster, Device, Json, Scales, command, print_result, require_text
from diptych.cli.run import Sets, Work, run_stages
from diptych.errors import UsageError, nearest


@dataclass(frozen=True)
class Evaluated(Scales):
    """The models and the suite: keys of an evaluation."""

    PANELS: ClassVar = {
        "Input": "suite data references prompts",
        "Models": "models baselines base",
        "Sampling": "seeds size steps guidance image_guidance text_guidance",
    }
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="NAME", help="pocket, dreambench++, dreambench, folder, or a YAML file."),
    ] = None
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="Folder with the suite's images and prompts.")
    ] = None
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="pocket, a run, a student, or owner/name; NAME=MODEL renames. Repeatable.",
            autocompletion=complete.students,
        ),
    ] = None
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="NAME", help="text_only, copy, inpaint, … (docs/baselines.md). Repeatable."),
    ] = None
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Base model for baselines and for incomplete students."),
    ] = None
    references: Annotated[
        int | None, typer.Option("--references", min=1, help="Use only N references, evenly spaced.")
    ] = None
    prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Use only N prompts for each reference.")] = (
        None
    )
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, help="Several seeds also measure diversity. Repeatable [default: 0]."),
    ] = None
    size: Annotated[int | None, typer.Option("--size", help="Image side in pixels [default: the suite's, or 512].")] = (
        None
    )
    device: Device = None


@dataclass(frozen=True)
class Judging:
    """The judge that gives the scores."""

    PANELS: ClassVar = {"Judge": "judge judge_endpoint judge_model judge_key judge_local"}
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="KIND", help="pocket, vlm, or embedding [default: what fits the suite]."),
    ] = None
    judge_endpoint: Annotated[
        str | None, typer.Option("--judge-endpoint", metavar="URL", help="OpenAI-compatible server.")
    ] = None
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", metavar="NAME", help="The server's name for its model.")
    ] = None
    judge_key: Annotated[
        str | None, typer.Option("--judge-key", metavar="ENV", help="Environment variable with the API key.")
    ] = None
    judge_local: Annotated[
        str | None, typer.Option("--judge-local", metavar="MODEL", help="A model on this machine instead of a server.")
    ] = None

    def section(self) -> dict[str, Any] | None:
        """The judge's section of an evaluation; None if no option was passed."""
        section: dict[str, Any] = {} if self.judge is None else {"kind": self.judge}
        url, model = self.judge_endpoint, self.judge_model
        if url is not None or model is not None:
            if url is None or model is None:
                missing = "--judge-endpoint URL" if url is None else "--judge-model NAME"
                raise UsageError("option_missing", f"A judge on a server also needs {missing}.")
            # The published protocol repeats an answer three times, which is pointless at temperature 0.
            section["endpoint"] = {"base_url": url, "model": model, "temperature": 1.0, "max_tokens": 512}
            if self.judge_key is not None:
                section["endpoint"]["api_key_env"] = self.judge_key
        if self.judge_local is not None:
            section |= {"local": self.judge_local, "repeats": 1}
        return section or None


@command(
    "diptych evaluate recipes/pocket.yaml --out runs/first",
    "diptych evaluate --suite pocket --model pocket --baseline text_only --baseline copy --out scores",
    "diptych evaluate --suite dreambench++ --data FOLDER --model FOLDER --base FLUX.1-dev --judge-endpoint "
    "http://localhost:8000/v1 --judge-model NAME --out scores",
    "diptych evaluate --compare a:student b:student",
    Input="recipe sets",
    Scoring="metric only force compare",
    Output="out",
)
def evaluate(
    *,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Recipe whose run is scored. Without one, pass --suite.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe or the evaluation. Repeatable."),
    ] = None,
    wanted: Evaluated,
    judge: Judging,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="NAME", help="clip-i, clip-t, dino, dinov2 (or NAME=MODEL), or none. Repeatable."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="HALF", help="Do only one half of the work: generate or score.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let a judge score pairs that it curated; the result records it.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Compare two FOLDER:METHOD: paired differences and p-values."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Output folder [default: evaluations/SUITE, or runs/NAME]."),
    ] = None,
    cluster: Cluster,
    as_json: Json = False,
) -> None:
    """Score students and baselines on a suite, or compare two.

    With a recipe, the student of its run is scored. Run an interrupted command again to resume it.
    """
    require_text(out=out)
    if compare is not None:
        from diptych.evaluate.scoring.summary import compare_folders, format_comparison

        print_result(compare_folders(*compare, Path(out) if out is not None else None), format_comparison, as_json)
    elif recipe is not None:
        passed = [key for key, value in {**asdict(wanted), "only": only, "judge": judge.judge}.items() if value]
        if passed:
            raise UsageError(
                "option_conflict",
                f"Options that a recipe sets itself: {', '.join(passed)}. Change the recipe with --set "
                "evaluate.KEY=VALUE, or leave RECIPE out to evaluate other models on a suite.",
            )
        run_stages(Work(recipe, sets, out, as_json), ("evaluate",), cluster)
    elif wanted.suite is None and out is None:
        raise UsageError("option_missing", "Missing argument RECIPE, or --suite NAME with --model MODEL.")
    else:
        folder = Path(out) if out is not None else Path("evaluations") / Path(str(wanted.suite)).stem
        keys = {**asdict(wanted), "judge": judge.section()}
        _evaluate_suite(keys, metric, folder, only, force, sets, as_json, cluster)


def _evaluate_suite(
    keys: dict[str, Any],
    metrics: list[str] | None,
    out: Path,
    only: str | None,
    force: bool,
    sets: list[str] | None,
    as_json: bool,
    cluster: Cluster,
) -> None:
    from diptych.data.places import lock
    from diptych.data.ray_engine import open_engine
    from diptych.evaluate import evaluation, harness
    from diptych.evaluate.report import suite_report
    from diptych.utils.console import Display

    if only not in (None, "generate", "score"):
        hint = nearest(str(only), ("generate", "score"))
        raise UsageError("option_invalid", f"--only {only} is not generate or score{hint}")
    made = evaluation.make(keys | {"models": evaluation.parse_models(keys["models"] or ()) or None}, out, sets or ())
    if metrics is not None:
        made = made.model_copy(update={"metrics": [] if metrics == ["none"] else metrics})
    display = Display(quiet=as_json)
    with open_engine(cluster.engine, cluster.address) as machines, lock(out):
        workers = machines.of(made.recipe())
        result = harness.evaluate(made, out, only, force, display, engine=workers)  # pyright: ignore[reportArgumentType]
        report = None if only == "generate" else suite_report.write(out)
    print_result(result, lambda result: [*harness.format_result(result), str(report or out)], as_json)
    if report is not None:
        display.next(f"open {report} in a browser")
    else:
        display.next(f"the same command with --only score, or diptych evaluate --out {quote(str(out))} --only score")


@command("diptych ablate pocket --out runs/ablations --from runs/first", Input="study base only sets", Output="out")
def ablate(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study file, or the name of a built-in study.")],
    base: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Curated run to share [default: a new one in DIR/base]."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="VARIANT", help="Run only this variant. Repeatable.")
    ] = None,
    sets: Sets = None,
    *,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder of the study.")],
    as_json: Json = False,
) -> None:
    """Train and score variants of a recipe, and compare them in a table.

    Every variant is trained with several seeds on the pairs of one run, beside baselines that train nothing. Run an
    interrupted command again to resume it. The study `pocket` (6 trained variants with 3 seeds, 4 baselines) takes
    about 100 minutes on two CPU cores: 8 to paint, 57 to train, 25 to score, 10 for per-subject tuning.
    """
    from diptych.run import ablate as studies
    from diptych.utils.console import Display

    require_text(out=out)
    result = studies.ablate(study, out, Display(quiet=as_json), base, only or (), sets or ())
    print_result(result, studies.format_table, as_json)
