"""The commands `diptych relight` and `diptych story`: one reference, several pictures that belong together."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import (
    Background,
    Base,
    Device,
    Fit,
    Guidance,
    ImageGuidance,
    Json,
    Lora,
    Memory,
    Model,
    Size,
    Speed,
    Steps,
    Switch,
    TextGuidance,
    opened,
)
from diptych.errors import UsageError
from diptych.student.runtime import speed as speeds
from diptych.utils.console import printable_json, show

RELIGHT = (
    'Example: diptych relight --reference examples/references/cat.png --light "soft golden light from the left" '
    "--out lit.png"
)
STORY = (
    'Example: diptych story --reference examples/references/cat.png --panel "a cat on the beach" --panel "a cat in a '
    'forest | Then it got lost." --panel "a cat in a cave" --panel "a cat sleeping in a kitchen | Home." '
    "--out story.pdf"
)


def relight(
    reference: Annotated[str, typer.Option("--reference", metavar="IMAGE", help="The picture that is to be relit.")],
    light: Annotated[list[str], typer.Option("--light", help="The light, in words. Repeatable: several make a strip.")],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="A .png, .webp or .jpg file; for several lights a strip, or a folder with a file for each.",
        ),
    ] = "relit.png",
    scene: Annotated[
        str, typer.Option("--scene", help="What the picture shows, for a model that is surer when told.")
    ] = "",
    mask: Annotated[
        str | None, typer.Option("--mask", metavar="IMAGE", help="White may change, black stays; of the same size.")
    ] = None,
    detail: Annotated[
        float, typer.Option("--detail", min=0, max=1, help="Share of the fine detail that is the reference's own.")
    ] = 1.0,
    task: Annotated[
        str, typer.Option("--task", metavar="NAME|FILE", help="Another task whose panels are aligned.")
    ] = "relight",
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same picture.")] = 0,
    model: Model = "pocket",
    base: Base = None,
    lora: Lora = None,
    steps: Steps = None,
    guidance: Guidance = None,
    image_guidance: ImageGuidance = None,
    text_guidance: TextGuidance = None,
    size: Size = None,
    fit: Fit = None,
    background: Background = None,
    device: Device = None,
    memory: Memory = None,
    speed: Speed = None,
    switch: Switch = None,
    as_json: Json = False,
) -> None:
    """Put a picture under another light, everything in its place.

    Several lights give a strip, from left to right. With --mask the black part stays as it is, to the pixel.
    """
    from diptych.apps import relight as relighting
    from diptych.data.images import check_image, kind_of, open_image, save_image
    from diptych.utils.console import Display

    started = time.monotonic()
    if any(not text.strip() for text in light):
        raise UsageError("--light is empty; say how the scene is lit")
    folder = Path(out) if out.endswith("/") or Path(out).is_dir() else None
    if folder is None:
        kind_of(out)
    if Path(out).exists() and Path(out).resolve() in {Path(p).resolve() for p in (reference, mask) if p}:
        raise UsageError(f"{out} is a reference itself; name another file to write")
    relighting.aligned(task)
    told = {"reference_file": Path(reference).name, "reference_sha256": check_image(reference)}
    picture, masked = open_image(reference, background=background or "white"), open_image(mask) if mask else None
    options = _options(steps, guidance, image_guidance, text_guidance, fit, background)
    display = Display(quiet=as_json)
    student = _load(display, model, base, lora, device, memory, speed, switch)
    pictures = []
    with display.stage("relight", "pictures") as report:
        for done, text in enumerate(light):
            report(done, len(light))
            pictures.append(
                student.relight(
                    picture,
                    text,
                    scene=scene,
                    task=task,
                    mask=masked,
                    detail=detail,
                    seed=seed,
                    size=_size(size),
                    **options,
                )
            )
        report(len(light), len(light))
    made = [{**image.info, **told} for image in pictures]
    if folder is not None:
        names = [_name(text, seed) for text in light]
        written = [
            save_image(image, folder / name, info) for image, name, info in zip(pictures, names, made, strict=True)
        ]
    elif len(pictures) == 1:
        written = [save_image(pictures[0], out, made[0])]
    else:
        whole = {**made[0], "light": light, "prompt": [info["prompt"] for info in made]}
        written = [save_image(relighting.strip(pictures), out, whole)]
    _tell({"out": [str(path) for path in written], "pictures": made}, started, as_json)


def story(
    reference: Annotated[str, typer.Option("--reference", metavar="IMAGE", help="The picture of the character.")],
    panel: Annotated[
        list[str] | None,
        typer.Option("--panel", metavar="TEXT", help="What a panel shows; after a | what is written. Repeatable."),
    ] = None,
    panels: Annotated[
        str | None, typer.Option("--panels", metavar="FILE", help="Or a text file of panels, one a line.")
    ] = None,
    idea: Annotated[
        str | None, typer.Option("--idea", metavar="TEXT", help="Or an idea, of which a language model writes them.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=4, max=10, help="Panels that --idea asks for.")] = 6,
    llm_endpoint: Annotated[
        str | None, typer.Option("--llm-endpoint", metavar="URL", help="Where it answers [default: $DIPTYCH_LLM_URL].")
    ] = None,
    llm_model: Annotated[
        str | None, typer.Option("--llm-model", metavar="NAME", help="Its name [default: $DIPTYCH_LLM_MODEL].")
    ] = None,
    out: Annotated[
        list[str] | None,
        typer.Option("--out", metavar="FILE", help="A .pdf, .png, .webp or .jpg. Repeatable [default: story.png]."),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Stands above the first row.")] = "",
    captions: Annotated[
        str, typer.Option("--captions", help="Where the words stand: below, inside or none.")
    ] = "below",
    font: Annotated[
        str | None, typer.Option("--font", metavar="FILE", help="A font file, for letters the built-in one lacks.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed", min=0, help="Of the first panel, counting up; or one for each. Repeatable [default: 0]."
        ),
    ] = None,
    model: Model = "pocket",
    base: Base = None,
    lora: Lora = None,
    steps: Steps = None,
    guidance: Guidance = None,
    image_guidance: ImageGuidance = None,
    text_guidance: TextGuidance = None,
    size: Size = None,
    fit: Fit = None,
    background: Background = None,
    device: Device = None,
    memory: Memory = None,
    speed: Speed = None,
    switch: Switch = None,
    as_json: Json = False,
) -> None:
    """Draw a page of 4 to 10 panels of one character.

    Each panel's seed is told at the end: to draw one panel anew, give every panel's --seed and change that one.
    """
    from diptych.apps import story as stories
    from diptych.data.images import check_image, kind_of
    from diptych.utils.console import Display

    started = time.monotonic()
    if sum(bool(given) for given in (panel, panels, idea)) != 1:
        raise UsageError("give the panels in one way: --panel TEXT (repeated), --panels FILE, or --idea TEXT")
    names = out or ["story.png"]
    for name in names:
        if not name.lower().endswith(".pdf"):
            kind_of(name)
    told = {"reference_file": Path(reference).name, "reference_sha256": check_image(reference)}
    seeds: int | list[int] = list(seed) if seed else 0
    display = Display(quiet=as_json)
    if idea:
        found = _written(idea, count, llm_endpoint, llm_model, display)
    else:
        found = stories.read_panels(panels) if panels else [stories.read_panel(text) for text in panel or ()]
    stories.check(found, seeds, captions)
    font_of = stories.font_for((title, *(one.caption for one in found)), font)
    options = {**_options(steps, guidance, image_guidance, text_guidance, fit, background), "size": _size(size)}
    student = _load(display, model, base, lora, device, memory, speed, switch)
    with display.stage("story", "panels") as report:
        page = stories.story(
            student,
            reference,
            found,
            seed=seeds,
            title=title,
            captions=captions,  # pyright: ignore[reportArgumentType] (checked above)
            font=font_of,
            on_panel=report,
            **options,
        )
    page.provenance |= told
    written = [str(page.save(name)) for name in names]
    for number, (one, own) in enumerate(zip(page.panels, page.seeds, strict=True), 1):
        display.say(f"panel {number:>2}  --seed {own}  {one.prompt}")
    _tell({"out": written, "provenance": page.provenance}, started, as_json)


def _written(idea: str, count: int, url: str | None, model: str | None, display: Any) -> Any:
    from diptych.apps import enhance
    from diptych.apps.story import write_panels
    from diptych.llm.cache import Cache

    endpoint = enhance.endpoint_of(url, model, "--llm-endpoint")
    if endpoint is None:
        raise UsageError(
            f"--idea needs a language model: --llm-endpoint URL and --llm-model NAME (or {enhance.URL} and "
            f"{enhance.MODEL}); or write the panels yourself, --panel TEXT"
        )
    display.say(f"asking {endpoint.model} for {count} panels")
    with Cache(enhance.CACHE.expanduser()) as cache:
        return write_panels(idea, count, endpoint, cache)


def _options(
    steps: int | None,
    guidance: float | None,
    image_guidance: float | None,
    text_guidance: float | None,
    fit: str | None,
    background: str | None,
) -> dict[str, Any]:
    """What was said of how to draw; what was not is the model's own."""
    said = {
        "steps": steps,
        "guidance": guidance,
        "image_guidance": image_guidance,
        "text_guidance": text_guidance,
        "fit": fit,
        "background": background,
    }
    return {name: value for name, value in said.items() if value is not None}


def _size(text: str | None) -> Any:
    from diptych.student.sampling import read_size

    return None if text is None else read_size(text)


def _load(
    display: Any,
    model: str,
    base: str | None,
    lora: list[str] | None,
    device: str | None,
    memory: str | None,
    speed: str | None,
    switch: list[str] | None,
) -> Any:
    from diptych.utils.models import with_scale

    speeds.parse(speed, switch or ())  # a misspelt one is told before anything is loaded
    loading = {"model": model, "base": base, "device": device, "memory": memory, "speed": speed}
    return opened(display, loading, lora=[with_scale(one) for one in lora or ()], switches=switch or ())


def _name(light: str, seed: int) -> str:
    """A file's name from its light; a digest tells apart what letters and digits alone do not."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in light).split())[:60] or "light"
    return f"{slug}-{hashlib.sha256(light.encode()).hexdigest()[:6]}-{seed}.png"


def _tell(found: dict[str, Any], started: float, as_json: bool) -> None:
    if as_json:
        show(printable_json({**found, "seconds": round(time.monotonic() - started, 2)}))
        return
    for path in found["out"]:
        show(path)
