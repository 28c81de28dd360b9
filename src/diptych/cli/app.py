"""The command line. Thin: each command checks its words, calls the function that Python users call, prints the result.

Nothing heavy is imported here: `diptych --help` answers at once. Results go to stdout, progress and errors to stderr.
Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. DIPTYCH_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from diptych.cli import data, draw, evaluate, generate, provenance, serve
from diptych.cli.options import Address, Engine, Json
from diptych.errors import UsageError, UserError
from diptych.student.weights import directions
from diptych.utils.console import printable_json, show

app = typer.Typer(
    name="diptych",
    help="Diffusion Self-Distillation: teach a text-to-image model to take a reference image, "
    "from data it draws and curates itself.",
    epilog="Start with: diptych doctor · diptych run demo · diptych generate --help",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.command("serve", epilog="Example: diptych serve --model pocket --port 8000 --token-file tokens.txt")(serve.serve)

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

INTERRUPTED = "interrupted; run the same command to continue"


def _version(value: bool) -> None:
    if value:
        from diptych.utils.machine import VERSION

        show(f"diptych {VERSION}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of the command itself."""


def _run(
    recipe: str,
    out: str | None,
    sets: list[str] | None,
    as_json: bool,
    stages: tuple[str, ...] | None,
    engine: str = "local",
    address: str | None = None,
    source: str | None = None,
) -> None:
    from diptych import recipe as recipes
    from diptych.run.resolve import OtherRecipe
    from diptych.run.runner import STAGES, run
    from diptych.student.runtime import parallel
    from diptych.utils.console import Display, duration

    for name, value in (("--out", out), ("--from", source)):
        if value == "":
            raise UsageError(f"{name} is empty; name a folder")
    loaded = recipes.load(recipe, sets or ())
    try:
        summary = run(loaded, out, stages or STAGES, Display(quiet=as_json), engine, address, source)
    except OtherRecipe as error:
        asked = [("--set", text) for text in sets or ()] + ([("--engine", engine)] if engine != "local" else [])
        asked += [("--address", address)] if address is not None else []
        raise OtherRecipe(error.folder, error.differ, recipe, [word for pair in asked for word in pair]) from error
    if not parallel.is_first():
        return
    if as_json:
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


@app.command("run", epilog="Example: diptych run recipes/pocket.yaml --out runs/first --set write.count=500")
def run_all(
    recipe: RecipeArg,
    out: OutDir = None,
    source: From = None,
    sets: Sets = None,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Run a whole recipe: write, paint, curate, distill, evaluate, report.

    Interrupted or killed, the same command continues. The folder belongs to one recipe: another one is refused. To
    correct a recipe, run it with --from the earlier run into another --out: only what the correction changes is made.
    With --engine ray the workers of a cluster make the rows (docs/scale.md); training stays in this process.
    """
    _run(recipe, out, sets, as_json, None, engine, address, source)


@app.command("write", epilog="Example: diptych write recipes/pocket.yaml --out runs/first")
def write(
    recipe: RecipeArg,
    out: OutDir = None,
    sets: Sets = None,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Write the grid prompts only (prompts/)."""
    _run(recipe, out, sets, as_json, ("write",), engine, address)


@app.command("paint", epilog="Example: diptych paint flux-subject --out s3://bucket/run --engine ray --address auto")
def paint(
    recipe: RecipeArg,
    out: OutDir = None,
    source: From = None,
    sets: Sets = None,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Let the teacher draw the grids only (prompts/ → grids/)."""
    _run(recipe, out, sets, as_json, ("paint",), engine, address, source)


@app.command("curate", epilog="Example: diptych curate recipes/pocket.yaml --out runs/first")
def curate(
    recipe: RecipeArg,
    out: OutDir = None,
    source: From = None,
    sets: Sets = None,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Cut, judge and select pairs only (grids/ → candidates/ → pairs/)."""
    _run(recipe, out, sets, as_json, ("curate",), engine, address, source)


@app.command("distill", epilog="Example: diptych distill recipes/pocket.yaml --out runs/first")
def distill(
    recipe: RecipeArg, out: OutDir = None, source: From = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Train the student only (pairs/ → student/)."""
    _run(recipe, out, sets, as_json, ("distill",), source=source)


app.command("evaluate", epilog=evaluate.EPILOG)(
    evaluate.command(
        lambda recipe, out, sets, as_json, *engine: _run(recipe, out, sets, as_json, ("evaluate",), *engine)
    )
)


@app.command("plan", epilog="Example: diptych plan flux-subject --assume devices=8 --assume gpu_hour=2.5")
def plan(
    recipe: RecipeArg,
    out: OutDir = None,
    sets: Sets = None,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=NUMBER", help="Any assumption that the plan names. Repeatable."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="H200, H100, RTX4090 or cpu [default: as the recipe asks]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe will cost before it runs: hours, calls, tokens, money, disk, memory. Runs nothing.

    What a run in its folder has measured takes the place of what is assumed.
    """
    from diptych import recipe as recipes
    from diptych.run import plan as plans

    found = plans.make(recipes.load(recipe, sets or ()), assume or (), gpu, out)
    show(printable_json(found) if as_json else "\n".join(plans.lines(found)))


@app.command("ablate", epilog="Example: diptych ablate pocket --out runs/ablations --from runs/first")
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
    show(printable_json(found) if as_json else "\n".join(studies.lines(found)))


app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("relight", epilog=draw.RELIGHT)(draw.relight)
app.command("story", epilog=draw.STORY)(draw.story)
app.command("push", epilog=provenance.PUSH_EXAMPLE)(provenance.push)
app.command("sign", epilog=provenance.SIGN_EXAMPLE)(provenance.sign)
app.command("trace", epilog=provenance.TRACE_EXAMPLE)(provenance.trace)


def _print_directions(value: bool) -> None:
    if value:
        show(directions.table())
        raise typer.Exit()


@app.command(
    "convert",
    epilog="Example: diptych convert dsd_model student --to folded --base FLUX.1-dev · diptych convert --table",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A student: folder, file, owner/name, or `pocket`.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder; for a single file, a name with its ending.")],
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(directions.TARGETS)}; see --table.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The teacher: for a control-LoRA, or to complete a folded folder.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16 [default: as stored].")
    ] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Add the LoRA beside the weights into them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    table: Annotated[
        bool,
        typer.Option("--table", callback=_print_directions, is_eager=True, help="Print what can become what."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a student's weights between layouts, without loss; a lossy direction is refused, and why.

    Tensor by tensor: a 24 GB file needs little memory. OUT appears when it is whole.
    """
    from diptych.student.weights import convert as conversion
    from diptych.utils.console import Display

    display = Display(quiet=as_json)
    with display.stage("convert", "%") as report:
        done = conversion.convert(
            source,
            out,
            to,
            base=base,
            dtype=dtype,
            fuse_lora=fuse,
            overwrite=overwrite,
            report=lambda done, total: report(100 * done // max(total, 1), 100),
        )
    if as_json:
        show(printable_json(done))
        return
    display.say(conversion.summary(done))
    show(done["out"])


@app.command(
    "tasks", epilog="Example: diptych tasks · diptych tasks show subject > mine.yaml · diptych tasks mine.yaml"
)
def list_tasks(
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
        show(printable_json({"task": names[1], "yaml": text}) if as_json else text.rstrip("\n"))
        return
    if len(names) > 1:
        raise UsageError(f"one task at a time, not {len(names)}; `diptych tasks show NAME` prints a task's YAML")
    found = tasks.summary(*names)
    show(printable_json(found, indent=2) if as_json else "\n".join(tasks.lines(found)))


@app.command("doctor", epilog="Example: diptych doctor --json")
def doctor(
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="A teacher to examine: a folder or a hub name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do: versions, devices, memory, extras, models that ship, what fits.

    Teachers in the hub's cache, and the one of --teacher, are examined for step distillation.

    Exit code 1 if something keeps diptych from working.
    """
    from diptych.cli.doctor import examine, lines

    found = examine(teacher)
    show(printable_json(found, indent=2) if as_json else "\n".join(lines(found)))
    if found["problems"]:
        raise typer.Exit(1)


class _Warnings(logging.Handler):
    """diptych's own warnings, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        show(f"{record.levelname.lower()}: {record.getMessage()}", news=True)


def main(args: list[str] | None = None) -> None:
    """The console script: runs a command and exits with its code."""
    sys.exit(call(args))


def call(args: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors become one line on stderr."""
    logger = logging.getLogger("diptych")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))
    debug = os.environ.get("DIPTYCH_DEBUG", "") not in ("", "0")
    if not debug:
        quiet_libraries()
    try:
        result = app(args=args, standalone_mode=False)
        # typer may turn Ctrl-C into this exit code before it gets here.
        return _say(INTERRUPTED, 130) if result == 130 else result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _say(INTERRUPTED, 130)
    except UserError as error:
        if debug:
            raise
        from diptych.student.runtime import parallel

        if not parallel.says(error):
            return error.exit_code
        return _say(f"error: {error}", error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`diptych … | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__name__ == "Abort":
            return _say(INTERRUPTED, 130)
        message = getattr(error, "format_message", None)
        if message is None:
            if debug:
                raise
            # Not a mistake of the user's. One line all the same, and how to see where it came from.
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'no message'}"
            if isinstance(error, OSError) and error.filename:
                text = f"{error.filename}: {error.strerror or error}"
            return _say(f"error: {text} (DIPTYCH_DEBUG=1 shows where)", 1)
        context = getattr(error, "ctx", None)
        hint = f" (try: {context.command_path} --help)" if context else ""
        return _say(f"error: {message()}{hint}", getattr(error, "exit_code", 2))


def quiet_libraries() -> None:
    """Keeps the bars and the chatter of the libraries below off the terminal; errors still come through."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|huggingface_hub|accelerate|peft)\b")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they warn when something merely imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _say(text: str, code: int) -> int:
    show(text, news=True)
    return code


if __name__ == "__main__":
    main()
