"""How a function becomes a command, how its help is laid out, and the options that several commands share.

A parameter of a command may be a group of options: a dataclass whose fields are options (`Loading`, `Cluster`), or
`Sampling`. typer gets each option of the group; the command gets one object.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from diptych.cli import complete
from diptych.errors import UsageError
from diptych.student.runtime import speed as speeds
from diptych.student.sampling import OPTIONS, Sampling, read_size
from diptych.utils.console import printable_json, show
from diptych.utils.models import BUILT_IN, with_scale

METAVARS = {int: "N", float: "X", str: "TEXT"}
SHARED_PANELS = {"as_json": "Output", "hour_price": "Output", "shown": "Output", "device": "Speed and memory"}


class Command(Protocol):
    """A function that is a command, with examples of its use."""

    __name__: str
    examples: tuple[str, ...]

    def __call__(self, **options: Any) -> None: ...


class GroupedHelp(TyperCommand):
    """A command whose help groups the options by `rich_help_panel`, without boxes and colors, and ends with examples
    that can be copied: long ones continue after a backslash, never within quotes."""

    def panels(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Section -> its options and arguments, each with its help."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                record = (parameter.metavar or record[0], record[1]) if is_argument else record
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Other", []).append(record)
        return panels

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_panels(formatter, self.panels(ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        examples = (self.epilog or "").splitlines()
        with formatter.section("Example" if len(examples) == 1 else "Examples"):
            for example in examples:
                words = (word.replace(" ", "\0") for word in re.findall(r'(?:[^\s"]|"[^"]*")+', example))
                text, width = " ".join(words), formatter.width - 8
                lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
                formatter.write("  " + " \\\n      ".join(lines).replace("\0", " ") + "\n")


class GroupedCommands(TyperGroup):
    """A group of commands whose help lists them by `rich_help_panel`, in the order in which they were added. Without
    arguments it prints that help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, each in self.commands.items():
            panel = getattr(each, "rich_help_panel", None) or "Commands"
            panels.setdefault(panel, []).append((name, each.get_short_help_str(limit=formatter.width)))
        _write_panels(formatter, panels)


def _write_panels(formatter: Any, panels: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Writes each panel as a section; the second columns of all of them are aligned."""
    width = max((len(first) for records in panels.values() for first, _ in records if len(first) <= 28), default=0)
    for name, records in panels.items():
        with formatter.section(name):
            formatter.write_dl([(first.ljust(width), second) for first, second in records])


def typer_app(name: str, help: str, **settings: Any) -> typer.Typer:
    """An app with grouped help, as wide as the terminal up to 120 columns."""
    context = {"max_content_width": 120}
    return typer.Typer(
        name=name, help=help, cls=GroupedCommands, context_settings=context, rich_markup_mode=None, **settings
    )


def command(*examples: str, **panels: str) -> Callable[[Callable[..., None]], Command]:
    """Makes a function a command. Parameters that are groups become their options.

    Args:
        examples: commands that end its help.
        panels: section of the help -> names of the parameters in it, separated by spaces. The options of a group are
            in the sections of its `PANELS`.
    """
    panel_of = SHARED_PANELS | {name: panel for panel, names in panels.items() for name in names.split()}

    def decorate(function: Callable[..., None]) -> Command:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        groups: dict[str, Any] = {
            each.name: each.annotation
            for each in parameters
            if is_dataclass(each.annotation) or each.annotation is Sampling
        }
        listed: list[inspect.Parameter] = []
        for each in parameters:
            listed += _options_of(groups[each.name]) if each.name in groups else [_in_panel(each, panel_of)]

        @wraps(function)
        def call(**options: Any) -> None:
            for name, kind in groups.items():
                values = {each.name: options.pop(each.name) for each in _options_of(kind)}
                options[name] = _sampling_of(values) if kind is Sampling else kind(**values)
            function(**options)

        listed = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in listed]
        call.__signature__ = inspect.Signature(listed)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {}  # typer reads the signature instead
        call.examples = examples  # pyright: ignore[reportAttributeAccessIssue]
        return call  # pyright: ignore[reportReturnType]

    return decorate


def register(app: typer.Typer, panel: str | None, *commands: Command) -> None:
    """Adds commands to a section of an app's help, under the names of their functions."""
    for each in commands:
        name, epilog = each.__name__.strip("_").replace("_", "-"), "\n".join(each.examples)
        app.command(name, cls=GroupedHelp, epilog=epilog, rich_help_panel=panel)(each)


@cache
def _options_of(group: Any) -> list[inspect.Parameter]:
    if group is Sampling:
        defaults: dict[str, Any] = dict.fromkeys(name for name in OPTIONS if name != "null_panel")
        hints: dict[str, Any] = {name: Annotated[_shown(name), sampling_option(name)] for name in defaults}
        panels: Mapping[str, str] = {"Sampling": " ".join(defaults)}
    else:
        hints, panels = get_type_hints(group, include_extras=True), group.PANELS
        defaults = {
            each.name: inspect.Parameter.empty if each.default is MISSING else each.default for each in fields(group)
        }
    panel_of = SHARED_PANELS | {name: panel for panel, names in panels.items() for name in names.split()}
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        _in_panel(inspect.Parameter(name, kind, default=default, annotation=hints[name]), panel_of)
        for name, default in defaults.items()
    ]


def _in_panel(parameter: inspect.Parameter, panel_of: Mapping[str, str]) -> inspect.Parameter:
    """The parameter, in its section of the help, with a plain metavar if it has none."""
    kind, option = get_args(parameter.annotation)
    option = copy.copy(option)
    option.rich_help_panel = panel_of[parameter.name]
    if option.metavar is None:
        option.metavar = next((METAVARS[part] for part in _parts(kind) if part in METAVARS), None)
    return parameter.replace(annotation=Annotated[kind, option])


def _parts(kind: Any) -> Iterator[Any]:
    """A type and those it consists of."""
    yield kind
    for inner in get_args(kind):
        yield from _parts(inner)


def _shown(name: str) -> Any:
    """The type of a sampling option on the command line."""
    return str | None if name == "size" else get_args(get_type_hints(Sampling, include_extras=True)[name])[0]


def sampling_option(name: str) -> Any:
    """The sampling option of a name, as typer has it."""
    option = OPTIONS[name]
    text = option.help.removesuffix(".")
    if option.choices:
        text += f": {', '.join(option.choices[:-1])} or {option.choices[-1]}"
    text += f" [default: {option.default}]." if option.default else "."
    metavar = {"size": "SIZE", "fit": "NAME", "background": "COLOR"}.get(name)
    return typer.Option(f"--{name.replace('_', '-')}", min=option.least, max=option.most, metavar=metavar, help=text)


def _sampling_of(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were passed; the model's settings replace the others."""
    return {name: read_size(value) if name == "size" else value for name, value in values.items() if value is not None}


def require_text(**options: str | None) -> None:
    """UsageError for an option that is passed but empty, for instance by a shell variable that is not set."""
    for name, value in options.items():
        if value is not None and not value.strip():
            raise UsageError("option_invalid", f"--{name.replace('_', '-')} is empty. Pass a value or leave it out.")


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, without progress.")]
Show = Annotated[
    bool | None, typer.Option("--show/--no-show", help="Show the image in the terminal [default: if stdout is one].")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, or mps [default: the fastest available].")
]


@dataclass(frozen=True)
class Cluster:
    """The machines that make the rows."""

    PANELS: ClassVar = {"Cluster": "engine address"}
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="local (this process) or ray (a Ray cluster).")
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="HOST:PORT", help="Ray cluster [default: $RAY_ADDRESS, or this machine alone]."
        ),
    ] = None


@dataclass(frozen=True)
class Scales:
    """Sampling steps and guidance scales, without the other sampling options."""

    PANELS: ClassVar = {"Sampling": "steps guidance image_guidance text_guidance"}
    steps: Annotated[int | None, sampling_option("steps")] = None
    guidance: Annotated[float | None, sampling_option("guidance")] = None
    image_guidance: Annotated[float | None, sampling_option("image_guidance")] = None
    text_guidance: Annotated[float | None, sampling_option("text_guidance")] = None


@dataclass(frozen=True)
class Loading:
    """A student and how it is loaded."""

    PANELS: ClassVar = {"Model": "model base lora", "Speed and memory": "memory speed switch"}
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Student: pocket, run, folder, file, or hub name.",
            autocompletion=complete.students,
        ),
    ] = "pocket"
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Base model that supplies the components a student lacks.",
            autocompletion=complete.teachers,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE", help="LoRA to add; FILE:0.8 scales it. Repeatable."),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="GIB", help="Memory preset: 8, 12, 16, 24, 48, 80, or auto (docs/memory.md)."),
    ] = None
    speed: Annotated[
        str | None,
        typer.Option("--speed", metavar="NAME", help="Speed preset: exact, fast, or fastest; see `diptych switches`."),
    ] = None
    switch: Annotated[
        list[str] | None,
        typer.Option(
            "--switch", metavar="NAME=VALUE", help="A single speed setting; see `diptych switches`. Repeatable."
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Student.load`. UsageError for an unknown speed or switch, before anything is loaded."""
        speeds.parse(self.speed, self.switch or ())
        arguments: dict[str, Any] = {"model": self.model, "base": self.base}
        if self.lora:
            arguments["lora"] = [with_scale(path) for path in self.lora]
        if self.memory is not None:
            arguments["memory"] = self.memory
        if self.speed is not None or self.switch:
            arguments |= {"speed": self.speed, "switches": self.switch or []}
        return arguments


def print_result(result: Any, format: Callable[[Any], Sequence[str]], as_json: bool, indent: int | None = None) -> None:
    """Prints a result as JSON, or as the lines that `format` makes of it."""
    show(printable_json(result, indent) if as_json else "\n".join(format(result)))


SHOWN = 4  # images in the terminal


def show_images(paths: Sequence[str], wanted: bool | None) -> None:
    """Shows the first images side by side in the terminal, if it can; see `utils.terminal`.

    `wanted` is `--show`: None shows them only if stdout is a terminal, and True also elsewhere.
    """
    from diptych.utils import terminal

    name = terminal.protocol(os.environ)
    files = [path for path in paths if not path.lower().endswith(".pdf")][:SHOWN]
    if wanted is False or not files or (wanted is None and (name is None or not sys.stdout.isatty())):
        return
    from diptych.apps.relight import strip
    from diptych.data.images import open_image

    images = [open_image(path).convert("RGB") for path in files]
    height = max(image.height for image in images)
    images = [image.resize((round(image.width * height / image.height), height)) for image in images]
    size = shutil.get_terminal_size()
    columns, rows = min(size.columns - 1, 40 * len(images)), max(4, min(size.lines - 4, 20))
    print(terminal.encode(strip(images), name or "blocks", columns, rows, os.environ), end="", flush=True)


QUANTIZERS = ("torchao", "bitsandbytes")
"""diffusers, transformers and peft import these wherever they are installed, which takes seconds and prints warnings.
A command that quantizes nothing hides them."""


def _is_quantized(*models: str | None) -> bool:
    """Whether a model's folder may hold quantized weights; also true for a hub name that is not downloaded yet."""
    for model in models:
        if model is None or model in BUILT_IN:
            continue
        folder = Path(model).expanduser()
        if not folder.exists() or any(
            '"quantization_config"' in p.read_text("utf8") for p in folder.rglob("config.json")
        ):
            return True
    return False


def load_student(display: Any, loading: dict[str, Any], **more: Any) -> Any:
    """`Student.load` with the arguments `loading` and `more`. Prints the model and what a memory preset chose."""
    display.say(f"loading {loading['model']}")
    needless = loading.get("memory") is None and not _is_quantized(loading["model"], loading["base"])
    if needless and "diffusers" not in sys.modules:
        for package in QUANTIZERS:
            sys.modules.setdefault(package, None)  # pyright: ignore[reportArgumentType] (Python's "not importable")
    from diptych.apps.student import Student

    student = Student.load(**loading, **more, progress_bar=False)
    if student.pipeline.runtime.memory is not None:
        display.say(student.pipeline.runtime.memory.reason)
    return student
