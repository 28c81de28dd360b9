"""The command `init`: a first recipe from four questions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli import complete
from diptych.cli.options import Json, command, print_result
from diptych.errors import UsageError, UserError
from diptych.utils.console import Display, show


@command(
    "diptych init",
    "diptych init mine.yaml --teacher FLUX.1-dev --task subject --gpu 8xH100 --budget 3d",
    Answers="teacher task gpu budget",
    Output="file force",
)
def init(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="Recipe to write [default: my-TASK.yaml].")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="Model to train: pocket, a folder, or a hub name.",
            autocompletion=complete.teachers,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="TASK", help="Meaning of a pair; see `diptych tasks`.", autocompletion=complete.tasks
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="Where it runs: cpu, RTX4090, H100, H200, or several: 8xH100."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Time that the run may take: 30min, 2h, or 3d.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a first recipe: four questions, or an option for each.

    The number of prompts and of training steps follows from the budget. On a terminal, the command asks what no option
    answers. Elsewhere it uses the defaults: pocket, subject, cpu, and 15min, or H200 and 3d for other teachers.
    """
    from diptych.recipe import tasks
    from diptych.run import draft as drafts
    from diptych.run.plan.report import duration

    if file is not None and Path(file).exists() and not force:
        raise _exists(file)
    asks = sys.stdin.isatty() and sys.stderr.isatty() and not as_json
    if asks and None in (teacher, task, gpu, budget):
        show("A recipe in four answers. Enter takes the one in brackets; Ctrl-C stops.", news=True)

    def answer(given: str | None, question: str, default: str, check: Callable[[str], Any]) -> str:
        while given is None and asks:
            text = str(typer.prompt(question, default=default, err=True)).strip()
            try:
                check(text)
            except UserError as error:
                show(error, news=True)
            else:
                return text
        return given if given is not None else default

    question = "1/4 Teacher: the model to train (pocket, FLUX.1-dev, a folder, or OWNER/NAME)"
    teacher = drafts.read_teacher(answer(teacher, question, "pocket", drafts.read_teacher))
    model, small = teacher, teacher == drafts.POCKET
    question = f"2/4 Task: what a pair shows ({', '.join(tasks.names())}, or a task file)"
    task = answer(task, question, "subject", lambda text: drafts.read_task(text, model))
    question = "3/4 Where will it run (cpu, RTX4090, H100, H200, or several: 8xH100)"
    gpu = answer(gpu, question, "cpu" if small else "H200", drafts.read_hardware)
    question = "4/4 Budget: how long may it take (30min, 2h, 3d)"
    budget = answer(budget, question, "15min" if small else "3d", drafts.read_budget)

    path = Path(file or f"my-{Path(task).stem}.yaml")
    text, plan = drafts.draft(teacher, task, gpu, drafts.read_budget(budget), _name(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("w" if force else "x", encoding="utf8") as stream:
            stream.write(text)
    except FileExistsError:
        raise _exists(str(path)) from None
    counts, steps = plan["counts"], plan["stages"]["distill"]["steps"]
    print_result({"recipe": str(path), "plan": plan}, lambda result: [result["recipe"]], as_json)
    display = Display(quiet=as_json)
    display.say(
        f"{counts['prompts']:,} prompts, about {counts['kept']:,} pairs, {steps:,} training steps: "
        f"{duration(plan['totals']['wall_hours'])} of computing on {gpu}"
    )
    device, number = drafts.read_hardware(gpu)
    more = "" if (device, number) == ("cpu", 1) else f" --gpu {device} --assume devices={number}"
    display.next(f"diptych plan {path}{more} lists every cost; diptych run {path} runs it in runs/{_name(path)}")


def _exists(file: str) -> UsageError:
    return UsageError("output_exists", f"{file} exists. Choose another name, or pass --force to replace it.")


def _name(path: Path) -> str:
    """The name of the recipe in a file: letters, digits, `_`, `-` and `.`."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "-" for c in path.stem).lstrip("_-.")
    return name or "recipe"
