"""The command line. The commands are thin, in one file for each group: each checks its options, calls the function that
Python users call, and prints the result.

Nothing heavy is imported here: `diptych --help` answers at once. Results go to stdout, progress and errors to stderr.
Errors have a code of `errors.yaml`; with --json they are printed as JSON. Exit codes: 0 done, 1 failed, 2 wrong use,
130 interrupted. DIPTYCH_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from typing import Annotated

import typer

from diptych.cli import data, doctor, evaluate, generate, init, run, serve, story, weights
from diptych.cli.options import register, typer_app
from diptych.errors import UserError, describe
from diptych.utils.console import one_line, printable_json, show

app = typer_app(
    "diptych",
    help="Diffusion Self-Distillation: train a text-to-image model to take a reference image, on pairs that it "
    "generates and curates itself.",
    epilog="Try: diptych run demo. `diptych COMMAND --help` shows the options and an example.",
    pretty_exceptions_enable=False,
)
register(app, "Start", doctor.doctor, init.init, run.tasks, run.plan, run.run)
register(app, "Make pairs", run.write, run.paint, run.curate)
app.add_typer(data.app, short_help="Count, audit, select, import, and export pairs.", rich_help_panel="Make pairs")
register(app, "Train", run.distill, weights.convert)
register(app, "Generate images", generate.generate, generate.relight, story.story, generate.switches, serve.serve)
register(app, "Evaluate", evaluate.evaluate, evaluate.ablate)
register(app, "Inspect and publish", weights.trace, weights.sign, weights.push)


def _version(value: bool) -> None:
    if value:
        from diptych.utils.machine import VERSION

        show(f"diptych {VERSION}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


class _Warnings(logging.Handler):
    """Prints the warnings of diptych, one line each, on stderr."""

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

    words = sys.argv[1:] if args is None else args

    def fail(code: str, message: str, exit_code: int) -> int:
        as_json = "--json" in words
        error = {"error": {"code": code, "message": message}}
        show(printable_json(error) if as_json else f"error[{code}]: {message}", news=True)
        return exit_code

    def interrupted() -> int:
        if words[:1] == ["serve"]:
            return fail("interrupted", "The server has stopped.", 130)
        command = shlex.join(["diptych", *words])
        again = f": {command}" if command == one_line(command) else "."
        return fail("interrupted", f"Interrupted. To resume, run the same command again{again}", 130)

    try:
        result = app(args=args, prog_name="diptych", standalone_mode=False)
        # typer may already have turned Ctrl-C into this exit code.
        return interrupted() if result == 130 else result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return interrupted()
    except UserError as error:
        if debug:
            raise
        from diptych.student.runtime import parallel

        if not parallel.reports(error):
            return error.exit_code
        return fail(error.code, str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of the output ended (`diptych … | head`), which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__name__ == "Abort":
            return interrupted()
        message = getattr(error, "format_message", None)
        if message is None:
            if debug:
                raise
            # Not a mistake of the user, but one line is still enough.
            text = describe(error, 500, kind=True)
            if isinstance(error, OSError) and error.filename:
                text = f"{error.filename}: {error.strerror or error}"
            return fail("internal", f"{text} (set DIPTYCH_DEBUG=1 to see the traceback)", 1)
        context = getattr(error, "ctx", None)
        hint = f" (try: {context.command_path} --help)" if context else ""
        return fail("usage", f"{message()}{hint}", getattr(error, "exit_code", 2))


def quiet_libraries() -> None:
    """Silences the progress bars and warnings of libraries; their errors still appear."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|huggingface_hub|accelerate|peft)\b")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they warn on import
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
