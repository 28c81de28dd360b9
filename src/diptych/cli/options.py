"""Options that several commands share: one wording, one meaning; and the student that they open. The names are the
field's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.student.runtime import speed as speeds
from diptych.utils.models import BUILT_IN

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Engine = Annotated[
    str, typer.Option("--engine", metavar="local|ray", help="This process, or the workers of a Ray cluster.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="HOST:PORT", help="The Ray cluster [default: $RAY_ADDRESS, or this machine alone]."
    ),
]

Model = Annotated[str, typer.Option("--model", help="`pocket`, a run, a student's folder or file, or owner/name.")]
Base = Annotated[
    str | None, typer.Option("--base", help="The teacher a student without its own parts is completed from.")
]
Lora = Annotated[list[str] | None, typer.Option("--lora", metavar="PATH[:SCALE]", help="A LoRA on top. Repeatable.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps [default: the best there is].")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="GIB", help="Fit into 8, 12, 16, 24, 48 or 80 GiB, or auto; see docs/memory.md."),
]
Speed = Annotated[str | None, typer.Option("--speed", help=speeds.summary())]
Switch = Annotated[
    list[str] | None,
    typer.Option("--switch", metavar="NAME=VALUE", help=f"One switch of --speed. Repeatable. {speeds.describe()}."),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Sampling steps.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", min=0, help="Distilled guidance, for models that have it.")
]
ImageGuidance = Annotated[
    float | None, typer.Option("--image-guidance", min=0, help="Strength of the reference; 1 is off.")
]
TextGuidance = Annotated[float | None, typer.Option("--text-guidance", min=0, help="Strength of the prompt; 1 is off.")]
Size = Annotated[
    str | None, typer.Option("--size", metavar="N|WxH", help="Pixels of a picture [default: the model's].")
]
Fit = Annotated[
    str | None, typer.Option("--fit", help="How the reference meets the size: crop, pad or contain [default: crop].")
]
Background = Annotated[
    str | None, typer.Option("--background", help="Colour under a transparent reference [default: white].")
]


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
