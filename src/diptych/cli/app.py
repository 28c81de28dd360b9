"""The command line, assembled: the commands are thin, in one file for each group. Each checks its options, calls the
function that Python users call, and prints the result.

Nothing heavy is imported here: `diptych --help` answers at once. Results go to stdout, progress and errors to stderr.
Errors have a code of `errors.yaml`; with --json they are printed as JSON. Exit codes: 0 done, 1 failed, 2 wrong use,
130 interrupted. DIPTYCH_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from diptych.cli import data, doctor, generate, run, serve, weights
from diptych.cli.options import add
from diptych.errors import UserError
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
add(app, (serve.serve, run.run, run.write, run.paint, run.curate, run.distill, run.evaluate, run.plan, run.ablate))
add(app, (generate.generate, generate.relight, generate.story, weights.push, weights.sign, weights.trace))
add(app, (weights.convert, run.tasks, doctor.doctor))

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

    def fail(code: str, message: str, exit_code: int) -> int:
        as_json = "--json" in (sys.argv[1:] if args is None else args)
        error = {"error": {"code": code, "message": message}}
        show(printable_json(error) if as_json else f"error[{code}]: {message}", news=True)
        return exit_code

    def interrupted() -> int:
        show(INTERRUPTED, news=True)
        return 130

    try:
        result = app(args=args, standalone_mode=False)
        # typer may turn Ctrl-C into this exit code before it gets here.
        return interrupted() if result == 130 else result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return interrupted()
    except UserError as error:
        if debug:
            raise
        from diptych.student.runtime import parallel

        if not parallel.says(error):
            return error.exit_code
        return fail(error.code, str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`diptych … | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__name__ == "Abort":
            return interrupted()
        message = getattr(error, "format_message", None)
        if message is None:
            if debug:
                raise
            # Not a mistake of the user's. One line all the same, and how to see where it came from.
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'no message'}"
            if isinstance(error, OSError) and error.filename:
                text = f"{error.filename}: {error.strerror or error}"
            return fail("internal", f"{text} (DIPTYCH_DEBUG=1 shows where)", 1)
        context = getattr(error, "ctx", None)
        hint = f" (try: {context.command_path} --help)" if context else ""
        return fail("usage", f"{message()}{hint}", getattr(error, "exit_code", 2))


def quiet_libraries() -> None:
    """Keeps the bars and the chatter of the libraries below off the terminal; errors still come through."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|huggingface_hub|accelerate|peft)\b")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they warn when something merely imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
