"""How a function becomes a command, and the options that several commands share: one wording, one meaning.

A parameter of a command may be a group of options: a dataclass whose fields are options (`Loading`, `Cluster`), or
`Sampling`. typer is shown each option of the group; the command is given one object.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args, get_type_hints

import typer

from diptych.student.runtime import speed as speeds
from diptych.student.sampling import OPTIONS, Sampling, read_size
from diptych.utils.console import printable_json, show
from diptych.utils.models import BUILT_IN, with_scale


class Command(Protocol):
    """A function that is a command, with an example of its use."""

    __name__: str
    example: str

    def __call__(self, **given: Any) -> None: ...


def command(example: str) -> Callable[[Callable[..., None]], Command]:
    """Makes a function a command: `example` ends its --help, and groups among its parameters become their options."""

    def decorate(function: Callable[..., None]) -> Command:
        own = inspect.signature(function, eval_str=True).parameters.values()
        groups: dict[str, Any] = {
            each.name: each.annotation for each in own if is_dataclass(each.annotation) or each.annotation is Sampling
        }
        listed: list[inspect.Parameter] = []
        for each in own:
            listed += _options_of(groups[each.name]) if each.name in groups else [each]

        @wraps(function)
        def call(**given: Any) -> None:
            for name, kind in groups.items():
                values = {each.name: given.pop(each.name) for each in _options_of(kind)}
                given[name] = _said(values) if kind is Sampling else kind(**values)
            function(**given)

        listed = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in listed]
        call.__signature__ = inspect.Signature(listed)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {}  # the signature says it all
        call.example = f"Example: {example}"  # pyright: ignore[reportAttributeAccessIssue]
        return call  # pyright: ignore[reportReturnType]

    return decorate


def add(app: typer.Typer, commands: Sequence[Command]) -> None:
    """Puts commands into an app, under the names of their functions."""
    for each in commands:
        app.command(each.__name__.strip("_").replace("_", "-"), epilog=each.example)(each)


@cache
def _options_of(group: Any) -> list[inspect.Parameter]:
    if group is Sampling:
        defaults: dict[str, Any] = dict.fromkeys(name for name in OPTIONS if name != "null_panel")
        hints: dict[str, Any] = {name: Annotated[_shown(name), sampling_option(name)] for name in defaults}
    else:
        hints = get_type_hints(group, include_extras=True)
        defaults = {
            each.name: inspect.Parameter.empty if each.default is MISSING else each.default for each in fields(group)
        }
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, kind, default=default, annotation=hints[name]) for name, default in defaults.items()
    ]


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
    metavar = "N|WxH" if name == "size" else None
    return typer.Option(f"--{name.replace('_', '-')}", min=option.least, max=option.most, metavar=metavar, help=text)


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """What was said of how to draw; what was not is the model's own."""
    return {name: read_size(value) if name == "size" else value for name, value in values.items() if value is not None}


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps [default: the best there is].")]


@dataclass(frozen=True)
class Cluster:
    """Where rows are made."""

    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="This process, or the workers of a Ray cluster.")
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="HOST:PORT", help="The Ray cluster [default: $RAY_ADDRESS, or this machine alone]."
        ),
    ] = None


@dataclass(frozen=True)
class Scales:
    """Steps and guidance scales alone."""

    steps: Annotated[int | None, sampling_option("steps")] = None
    guidance: Annotated[float | None, sampling_option("guidance")] = None
    image_guidance: Annotated[float | None, sampling_option("image_guidance")] = None
    text_guidance: Annotated[float | None, sampling_option("text_guidance")] = None


@dataclass(frozen=True)
class Loading:
    """A student, and how it is opened."""

    model: Annotated[
        str, typer.Option("--model", help="`pocket`, a run, a student's folder or file, or owner/name.")
    ] = "pocket"
    base: Annotated[
        str | None, typer.Option("--base", help="The teacher a student without its own parts is completed from.")
    ] = None
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="PATH[:SCALE]", help="A LoRA on top. Repeatable.")
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="GIB", help="Fit into 8, 12, 16, 24, 48 or 80 GiB, or auto; see docs/memory.md."
        ),
    ] = None
    speed: Annotated[str | None, typer.Option("--speed", help=speeds.summary())] = None
    switch: Annotated[
        list[str] | None,
        typer.Option("--switch", metavar="NAME=VALUE", help=f"One switch of --speed. Repeatable. {speeds.describe()}."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Those of `Student.load`. UsageError for a misspelt speed or switch, before anything is loaded."""
        speeds.parse(self.speed, self.switch or ())
        found: dict[str, Any] = {"model": self.model, "base": self.base}
        if self.lora:
            found["lora"] = [with_scale(given) for given in self.lora]
        if self.memory is not None:
            found["memory"] = self.memory
        if self.speed is not None or self.switch:
            found |= {"speed": self.speed, "switches": self.switch or []}
        return found


def tell(result: Any, lines: Callable[[Any], Sequence[str]], as_json: bool, indent: int | None = None) -> None:
    """Prints a result: as JSON, or as the lines that it reads as."""
    show(printable_json(result, indent) if as_json else "\n".join(lines(result)))


QUANTIZERS = ("torchao", "bitsandbytes")
"""diffusers, transformers and peft import these wherever they are installed, which takes seconds and prints warnings.
The process of a command that quantizes nothing goes without."""


def _is_quantized(*places: str | None) -> bool:
    """Whether one of a model's folders may hold quantized weights; also true of a hub name, which is not there yet."""
    for place in places:
        if place is None or place in BUILT_IN:
            continue
        folder = Path(place).expanduser()
        if not folder.exists() or any(
            '"quantization_config"' in p.read_text("utf8") for p in folder.rglob("config.json")
        ):
            return True
    return False


def opened(display: Any, loading: dict[str, Any], **more: Any) -> Any:
    """`Student.load` with the arguments `loading` and `more`; says what is opened, and what a memory preset chose."""
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
