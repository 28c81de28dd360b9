"""The command `story`: a page of panels of one character."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.generate import LLM_MODEL_HELP, LLM_URL_HELP, print_next, print_written
from diptych.cli.options import Device, Json, Loading, Show, command, load_student
from diptych.errors import UsageError
from diptych.student.sampling import Sampling


@command(
    'diptych story --reference examples/references/cat.png --panel "a cat on the beach" --panel "a cat in a '
    'forest | Then it got lost." --panel "a cat in a cave" --panel "a cat sleeping in a kitchen | Home." '
    "--out story.pdf",
    Input="reference panel panels seed",
    Layout="title captions font",
    Output="out",
    **{"Panels by a language model": "idea count llm_endpoint llm_model"},
)
def story(
    *,
    reference: Annotated[str, typer.Option("--reference", metavar="IMAGE", help="Image of the character.")],
    panel: Annotated[
        list[str] | None,
        typer.Option("--panel", help="Description of a panel, then its caption after a |. Repeatable."),
    ] = None,
    panels: Annotated[
        str | None, typer.Option("--panels", metavar="FILE", help="Text file with a panel on each line.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed", min=0, help="Seed of the first panel, then counting up; or one for each. Repeatable [default: 0]."
        ),
    ] = None,
    out: Annotated[
        list[str] | None,
        typer.Option("--out", metavar="FILE", help="PDF, PNG, WebP, or JPEG. Repeatable [default: story.png]."),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Title above the first row.")] = "",
    captions: Annotated[
        str, typer.Option("--captions", metavar="WHERE", help="Where captions go: below, inside, or none.")
    ] = "below",
    font: Annotated[
        str | None, typer.Option("--font", metavar="FILE", help="Font with letters that the built-in one lacks.")
    ] = None,
    idea: Annotated[
        str | None, typer.Option("--idea", help="Idea from which a language model writes the panels.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=4, max=10, help="Number of panels for --idea.")] = 6,
    llm_endpoint: Annotated[str | None, typer.Option("--llm-endpoint", metavar="URL", help=LLM_URL_HELP)] = None,
    llm_model: Annotated[str | None, typer.Option("--llm-model", metavar="NAME", help=LLM_MODEL_HELP)] = None,
    loading: Loading,
    sampling: Sampling,
    device: Device = None,
    shown: Show = None,
    as_json: Json = False,
) -> None:
    """Generate a page of 4 to 10 panels of one character.

    The seed of each panel is printed at the end. To replace one panel, repeat the command with all seeds and
    change that one.
    """
    from diptych.apps import story as stories
    from diptych.data.images import check_image, kind_of
    from diptych.utils.console import Display

    started = time.monotonic()
    ways = [f"--{name}" for name, value in (("panel", panel), ("panels", panels), ("idea", idea)) if value]
    if not ways:
        raise UsageError("option_missing", "No panels. Pass --panel TEXT several times, --panels FILE, or --idea TEXT.")
    if len(ways) > 1:
        raise UsageError("option_conflict", f"{' and '.join(ways)} are different ways to give panels. Use one of them.")
    names = out or ["story.png"]
    for name in names:
        if not name.lower().endswith(".pdf"):
            kind_of(name)
    origin = {"reference_file": Path(reference).name, "reference_sha256": check_image(reference)}
    seeds: int | list[int] = list(seed) if seed else 0
    display = Display(quiet=as_json)
    if idea:
        described = _write_panels(idea, count, llm_endpoint, llm_model, display)
    else:
        described = stories.read_panels(panels) if panels else [stories.read_panel(text) for text in panel or ()]
    stories.check(described, seeds, captions)
    font_of = stories.font_for((title, *(each.caption for each in described)), font)
    student = load_student(display, {**loading.arguments(), "device": device})
    with display.stage("story", "panels") as report:
        page = stories.story(
            student,
            reference,
            described,
            seed=seeds,
            title=title,
            captions=captions,  # pyright: ignore[reportArgumentType] (checked above)
            font=font_of,
            on_panel=report,
            **sampling,
        )
    page.provenance |= origin
    written = [str(page.save(name)) for name in names]
    for number, (each, used) in enumerate(zip(page.panels, page.seeds, strict=True), 1):
        display.say(f"panel {number:>2}  --seed {used}  {each.prompt}")
    print_written({"out": written, "provenance": page.provenance}, started, shown, as_json)
    print_next(display, written[0], "to replace one panel, repeat the command with all seeds and change that one")


def _write_panels(idea: str, count: int, url: str | None, model: str | None, display: Any) -> Any:
    from diptych.apps import enhance
    from diptych.apps.story import write_panels
    from diptych.llm.cache import Cache

    endpoint = enhance.endpoint_of(url, model, "--llm-endpoint")
    if endpoint is None:
        raise UsageError(
            "option_missing",
            f"--idea needs a language model. Pass --llm-endpoint URL and --llm-model NAME (or set {enhance.URL} and "
            f"{enhance.MODEL}), or write the panels with --panel TEXT.",
        )
    display.say(f"requesting {count} panels from {endpoint.model}")
    with Cache(enhance.CACHE.expanduser()) as cache:
        return write_panels(idea, count, endpoint, cache)
