"""The commands of a recipe: `run` and its stages `write`, `paint`, `curate` and `distill`; `plan` and `tasks`."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import join
from typing import Annotated, Any, ClassVar

import typer

from diptych.cli import complete
from diptych.cli.options import Cluster, Json, command, print_result, require_text
from diptych.errors import UsageError
from diptych.utils.console import printable_json, show
from diptych.utils.paths import is_remote

RecipeArg = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="Recipe file, name of a built-in recipe, or run folder.", autocompletion=complete.recipes
    ),
]
OutDir = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Run folder or s3:// address [default: runs/NAME, or RECIPE if it is a run folder].",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, such as distill.steps=200. Repeatable."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="Earlier run to reuse: stages that the recipe leaves unchanged.",
        autocompletion=complete.runs,
    ),
]
HourPrice = Annotated[
    float | None,
    typer.Option(
        "--hour-price", metavar="X", min=0, help="Price of an hour of the machines; the progress shows the cost so far."
    ),
]
LOCAL = Cluster()


@dataclass(frozen=True)
class Work:
    """A recipe, the changes to it, and the folder of its run."""

    PANELS: ClassVar = {"Input": "recipe sets", "Output": "out as_json"}
    recipe: RecipeArg
    sets: Sets = None
    out: OutDir = None
    as_json: Json = False


def run_stages(
    work: Work,
    stages: tuple[str, ...] | None,
    cluster: Cluster = LOCAL,
    source: str | None = None,
    hour_price: float | None = None,
) -> None:
    """Runs `stages` of a recipe, or all of them, and prints the summary and what can follow."""
    from diptych import recipe as recipes
    from diptych.run.resolve import OtherRecipe
    from diptych.run.runner import STAGES, run
    from diptych.student.runtime import parallel
    from diptych.utils.console import Display, duration

    require_text(out=work.out, **{"from": source})
    sets = work.sets or ()
    loaded, display = recipes.load(work.recipe, sets), Display(quiet=work.as_json)
    out = work.out if work.out is not None else recipes.run_of(work.recipe)
    engine, address = cluster.engine, cluster.address
    try:
        summary = run(loaded, out, stages or STAGES, display, engine, address, source, hour_price)
    except OtherRecipe as error:
        options = [("--set", text) for text in sets] + ([("--engine", engine)] if engine != "local" else [])
        options += [("--address", address)] if address is not None else []
        words = [word for pair in options for word in pair]
        raise OtherRecipe(error.folder, error.differ, work.recipe, words) from error
    if not parallel.is_first():
        return
    if work.as_json:
        show(printable_json(summary))
        return
    for name, result in summary["stages"].items():
        counts = ", ".join(
            f"{result[key]} {key}"
            for key in ("rows", "failed", "pairs", "steps")
            if result.get(key) or (key in ("rows", "pairs") and key in result)
        )
        show(f"{name:<9} {duration(result['seconds']):>7}  {counts}")
    show(summary.get("report") or summary["run"])
    display.next(*_next_steps(summary, loaded))


def _next_steps(summary: dict[str, Any], recipe: Any) -> list[str]:
    """What follows the last stage of a run: the next stage, or the report and an image of the student."""
    last, folder = next(reversed(summary["stages"])), summary["run"]
    if follower := {"write": "paint", "paint": "curate", "curate": "distill"}.get(last):
        return [f"diptych {follower} {join((f'{folder}/recipe.yaml', '--out', folder))}"]
    steps = [f"open {summary['report']} in a browser"] if last == "evaluate" and "report" in summary else []
    if "student" in summary and not is_remote(folder):
        reference = "examples/references/cat.png" if recipe.teacher == "pocket" else "IMAGE"
        lit = recipe.task == "relight"
        words = ("--light", "soft golden light from the left") if lit else ("--prompt", "a cat in a forest")
        command = ("--model", folder, "--reference", reference, *words, "--out", "image.png")
        steps.append(f"diptych {'relight' if lit else 'generate'} {join(command)}")
    return steps


@command("diptych run recipes/pocket.yaml --out runs/first --set write.count=500", Input="source")
def run(work: Work, source: From = None, *, hour_price: HourPrice = None, cluster: Cluster) -> None:
    """Run a whole recipe: write, paint, curate, distill, evaluate.

    Run an interrupted command again to resume it. A folder belongs to one recipe. To correct a recipe, run it with
    --from the earlier run and another --out: only the stages that the correction affects run again. With --engine ray,
    the workers of a cluster make the rows (docs/scale.md); training stays in this process.
    """
    run_stages(work, None, cluster, source, hour_price)


@command("diptych write recipes/pocket.yaml --out runs/first")
def write(work: Work, cluster: Cluster) -> None:
    """Write the grid prompts only (prompts/)."""
    run_stages(work, ("write",), cluster)


@command("diptych paint flux-subject --out s3://bucket/run --engine ray --address auto", Input="source")
def paint(work: Work, source: From = None, *, hour_price: HourPrice = None, cluster: Cluster) -> None:
    """Generate the grids with the teacher only (prompts/ → grids/)."""
    run_stages(work, ("paint",), cluster, source, hour_price)


@command("diptych curate recipes/pocket.yaml --out runs/first", Input="source")
def curate(work: Work, source: From = None, *, hour_price: HourPrice = None, cluster: Cluster) -> None:
    """Cut grids and select pairs only (grids/ → candidates/ → pairs/)."""
    run_stages(work, ("curate",), cluster, source, hour_price)


@command("diptych distill recipes/pocket.yaml --out runs/first", Input="source")
def distill(work: Work, source: From = None, hour_price: HourPrice = None) -> None:
    """Train the student only (pairs/ → student/)."""
    run_stages(work, ("distill",), source=source, hour_price=hour_price)


@command("diptych plan flux-subject --assume devices=8 --assume gpu_hour=2.5", Assumptions="assume gpu")
def plan(
    work: Work,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=X", help="Change an assumption that the plan names. Repeatable."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="H200, H100, RTX4090, or cpu [default: the recipe's]."),
    ] = None,
) -> None:
    """Estimate what a recipe will cost; nothing runs.

    The plan lists hours, calls, tokens, money, disk, and memory. Measurements of a run in the output folder replace
    the assumptions.
    """
    from diptych import recipe as recipes
    from diptych.run import plan as plans

    result = plans.make(recipes.load(work.recipe, work.sets or ()), assume or (), gpu, work.out)
    print_result(result, plans.format_plan, work.as_json)


@command("diptych tasks", "diptych tasks show subject > mine.yaml", "diptych tasks mine.yaml", Input="words vocabulary")
def tasks(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK",
            help="Name of a task or a task file to check; `show NAME` prints its YAML.",
            autocompletion=complete.tasks,
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option("--vocabulary", metavar="NAME", help="Also check that this vocabulary or file can write TASK."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks, check a task file, or print a task's YAML."""
    from diptych.recipe import tasks
    from diptych.stages.write import vocabulary as vocabularies

    names = list(words or ())
    if names[:1] == ["show"]:
        if len(names) != 2:
            raise UsageError(
                "option_missing",
                f"`show` needs the name of one task, for example: diptych tasks show {tasks.names()[-1]}",
            )
        text = tasks.source(names[1])
        print_result({"task": names[1], "yaml": text}, lambda result: [result["yaml"].rstrip("\n")], as_json)
        return
    if len(names) > 1:
        raise UsageError(
            "option_invalid",
            f"{len(names)} tasks were given. Pass one; `diptych tasks show NAME` prints a task's YAML.",
        )
    chosen = [tasks.load(name) for name in names or tasks.names()]
    if vocabulary is not None:
        if not names:
            raise UsageError("option_missing", "--vocabulary checks one task: diptych tasks FILE --vocabulary NAME")
        vocabularies.grids(vocabularies.load(vocabulary), chosen[0], chosen[0].layout().panels)
    fitting = [vocabularies.fitting(task, vocabulary) for task in chosen]
    print_result(tasks.summary(chosen, fitting), tasks.format_summary, as_json, indent=2)
