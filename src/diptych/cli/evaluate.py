"""`diptych evaluate`: a run's last stage, a suite for any models, the comparison of two. Thin, like `cli.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import Address, Engine, Json
from diptych.errors import UsageError
from diptych.utils.console import printable_json, show

RunRecipe = Callable[[str, str | None, list[str] | None, bool, str, str | None], None]
EPILOG = (
    "Example: diptych evaluate recipes/pocket.yaml --out runs/first · diptych evaluate --suite pocket --model pocket "
    "--baseline text_only --baseline copy --out scores · diptych evaluate --suite dreambench++ --data FOLDER --model "
    "FOLDER --base FLUX.1-dev --judge-endpoint http://localhost:8000/v1 --judge-model NAME --out scores · diptych "
    "evaluate --compare a:student b:student"
)


def command(run_recipe: RunRecipe) -> Callable[..., None]:
    """The command; `run_recipe` runs the stage of a recipe."""

    def evaluate(
        recipe: Annotated[
            str | None, typer.Argument(metavar="RECIPE", help="Its run is scored (its last stage); else --suite.")
        ] = None,
        suite: Annotated[
            str | None,
            typer.Option("--suite", metavar="NAME", help="pocket, dreambench++, dreambench, folder, or a YAML file."),
        ] = None,
        data: Annotated[
            str | None, typer.Option("--data", metavar="FOLDER", help="The suite's pictures and prompts.")
        ] = None,
        model: Annotated[
            list[str] | None,
            typer.Option("--model", metavar="[NAME=]MODEL", help="`pocket`, a run, a student, owner/name. Repeatable."),
        ] = None,
        baseline: Annotated[
            list[str] | None,
            typer.Option("--baseline", metavar="NAME", help="text_only, copy, inpaint, … Repeatable."),
        ] = None,
        base: Annotated[
            str | None,
            typer.Option("--base", help="The teacher: for baselines, and students without parts of their own."),
        ] = None,
        out: Annotated[
            str | None, typer.Option("--out", metavar="DIR", help="The folder [default: evaluations/SUITE; runs/NAME].")
        ] = None,
        only: Annotated[str | None, typer.Option("--only", help="generate or score: one half of the work.")] = None,
        references: Annotated[int | None, typer.Option("--references", min=1, help="So many, spread evenly.")] = None,
        prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="So many for each reference.")] = None,
        seed: Annotated[
            list[int] | None,
            typer.Option("--seed", min=0, help="Repeatable; several also give diversity [default: 0]."),
        ] = None,
        steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Sampling steps.")] = None,
        guidance: Annotated[float | None, typer.Option("--guidance", min=0, help="Distilled guidance.")] = None,
        image_guidance: Annotated[
            float | None, typer.Option("--image-guidance", min=0, help="Strength of the reference.")
        ] = None,
        text_guidance: Annotated[
            float | None, typer.Option("--text-guidance", min=0, help="Strength of the prompt.")
        ] = None,
        size: Annotated[int | None, typer.Option("--size", help="Pixels a side [default: the suite's, 512].")] = None,
        device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps [default: the best].")] = None,
        judge: Annotated[
            str | None,
            typer.Option("--judge", help="Who gives CP and PF: pocket, vlm or embedding [default: what fits]."),
        ] = None,
        judge_endpoint: Annotated[
            str | None, typer.Option("--judge-endpoint", metavar="URL", help="An OpenAI-compatible server.")
        ] = None,
        judge_model: Annotated[
            str | None, typer.Option("--judge-model", metavar="NAME", help="The server's name for its model.")
        ] = None,
        judge_key: Annotated[
            str | None, typer.Option("--judge-key", metavar="ENV", help="The environment variable with its key.")
        ] = None,
        judge_local: Annotated[
            str | None, typer.Option("--judge-local", metavar="MODEL", help="Or a model on this machine.")
        ] = None,
        metric: Annotated[
            list[str] | None,
            typer.Option("--metric", metavar="NAME[=MODEL]", help="clip-i, clip-t, dino, dinov2; or none. Repeatable."),
        ] = None,
        sets: Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="KEY=VALUE", help="Any key of the recipe, or of evaluation.yaml. Repeatable."
            ),
        ] = None,
        force: Annotated[
            bool, typer.Option("--force", help="Let a judge score what it curated; the result says so.")
        ] = False,
        compare: Annotated[
            tuple[str, str] | None,
            typer.Option("--compare", metavar="A B", help="FOLDER:METHOD twice: paired differences and p-values."),
        ] = None,
        engine: Engine = "local",
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Score students: a recipe's own, or any models and baselines on a suite, with a report; or compare two.

        Killed, the same command draws and scores only what is missing.
        """
        asked: dict[str, Any] = {
            "suite": suite,
            "data": data,
            "base": base,
            "baselines": baseline,
            "references": references,
            "prompts": prompts,
            "seeds": seed,
            "steps": steps,
            "guidance": guidance,
            "image_guidance": image_guidance,
            "text_guidance": text_guidance,
            "size": size,
            "device": device,
        }
        if out == "":
            raise UsageError("--out is empty; name a folder")
        said = [key for key, value in {**asked, "models": model, "only": only, "judge": judge}.items() if value]
        if compare is not None:
            _compare(compare, out, as_json)
        elif recipe is not None:
            if said:
                raise UsageError(
                    f"{', '.join(said)}: a recipe says what is evaluated (--set evaluate.KEY=VALUE); leave RECIPE out "
                    "to evaluate other models on a suite"
                )
            run_recipe(recipe, out, sets, as_json, engine, address)
        elif suite is None and out is None:
            raise UsageError("missing argument 'RECIPE', or --suite NAME with --model MODEL")
        else:
            asked["judge"] = _judge(judge, judge_endpoint, judge_model, judge_key, judge_local) or None
            asked["metrics"] = metric
            folder = Path(out) if out is not None else Path("evaluations") / Path(str(suite)).stem
            _suite(asked, model, folder, only, force, sets, as_json, engine, address)

    return evaluate


def _judge(kind: str | None, url: str | None, model: str | None, key: str | None, local: str | None) -> dict[str, Any]:
    """The judge's section, of what was said of it."""
    found: dict[str, Any] = {}
    if kind is not None:
        found["kind"] = kind
    if url is not None or model is not None:
        if url is None or model is None:
            raise UsageError("a vision-language judge needs both --judge-endpoint URL and --judge-model NAME")
        # As published; three answers at temperature 0 are one and the same.
        found["endpoint"] = {"base_url": url, "model": model, "temperature": 1.0, "max_tokens": 512}
        if key is not None:
            found["endpoint"]["api_key_env"] = key
    if local is not None:
        found |= {"local": local, "repeats": 1}
    return found


def _suite(
    asked: dict[str, Any],
    models: list[str] | None,
    out: Path,
    only: str | None,
    force: bool,
    sets: list[str] | None,
    as_json: bool,
    engine: str,
    address: str | None,
) -> None:
    from diptych.data.engine import open_engine
    from diptych.data.places import lock
    from diptych.evaluate import config, harness
    from diptych.evaluate.report import suite_report
    from diptych.utils.console import Display

    if only not in (None, "generate", "score"):
        raise UsageError(f"--only {only}: is generate or score")
    metrics = asked.pop("metrics")
    whole = asked | {"models": config.named(models or ()) or None}
    made = config.make(whole, out, sets or ())
    if metrics is not None:
        made = made.model_copy(update={"metrics": [] if metrics == ["none"] else metrics})
    display = Display(quiet=as_json)
    with open_engine(engine, address) as machines, lock(out):
        workers = machines.of(made.recipe())
        found = harness.evaluate(made, out, only, force, display, engine=workers)  # pyright: ignore[reportArgumentType]
        report = None if only == "generate" else suite_report.write(out)
    if as_json:
        show(printable_json(found))
        return
    for line in harness.format_result(found):
        show(line)
    show(report or out)


def _compare(pair: tuple[str, str], out: str | None, as_json: bool) -> None:
    from diptych.evaluate.scoring.summary import compare_folders, format_comparison

    found = compare_folders(*pair, Path(out) if out is not None else None)
    show(printable_json(found) if as_json else "\n".join(format_comparison(found)))
