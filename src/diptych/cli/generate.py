"""The commands that draw with a student: `generate`, `relight` and `story`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import Cluster, Device, Json, Loading, command, opened, tell
from diptych.errors import UsageError, UserError
from diptych.student.sampling import Sampling
from diptych.utils.console import printable_json, show
from diptych.utils.io import sha256


@dataclass(frozen=True)
class Enhancing:
    """Whether prompts are filled out, and by which model."""

    enhance: Annotated[
        bool, typer.Option("--enhance", help="Let a vision-language model fill the prompt out from the reference.")
    ] = False
    enhance_endpoint: Annotated[
        str | None,
        typer.Option("--enhance-endpoint", metavar="URL", help="Where it answers [default: $DIPTYCH_LLM_URL]."),
    ] = None
    enhance_model: Annotated[
        str | None, typer.Option("--enhance-model", metavar="NAME", help="Its name [default: $DIPTYCH_LLM_MODEL].")
    ] = None


@command(
    'diptych generate --model pocket --reference examples/references/cat.png --prompt "a cat on the moon" '
    "--out cat.png --seed 1"
)
def generate(
    *,
    reference: Annotated[
        list[str] | None,
        typer.Option("--reference", metavar="IMAGE|DIR", help="The picture of your subject, or a folder. Repeatable."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What the new picture shows, the whole of it. Repeatable.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", metavar="FILE", help="JSONL: one object a line, with reference, prompt, seed, options."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="A .png, .webp or .jpg file, replaced if it is there [default: diptych.png]. For several pictures a "
            "folder, or names with {reference}, {prompt}, {seed}, {row}; what is there already is kept.",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, help="The same seed gives the same picture. Repeatable [default: 0]."),
    ] = None,
    preview: Annotated[
        str | None, typer.Option("--preview", metavar="FILE", help="A picture file that shows what is being drawn.")
    ] = None,
    loading: Loading,
    sampling: Sampling,
    enhancing: Enhancing,
    cluster: Cluster,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw your subject in new scenes: every reference with every prompt with every seed.

    Run again, it draws only what is missing; a picture that fails is named in DIR/failed.jsonl, and the rest goes on.
    Under `torchrun --nproc-per-node N -m diptych generate …`, N GPUs draw each picture together; with --engine ray
    each worker of a cluster draws pictures of its own.
    """
    from diptych.apps import batch as batches
    from diptych.data.engines import open_engine
    from diptych.data.images import kind_of
    from diptych.student.runtime import parallel
    from diptych.utils.console import Display

    started = time.monotonic()
    if batch is None and not (reference and prompt):
        raise UsageError(f"missing option '--{'prompt' if reference else 'reference'}' (or --batch FILE)")
    if any(not text.strip() for text in prompt or ()):
        raise UsageError("--prompt is empty; say what the new picture shows")
    if out == "":
        raise UsageError("--out is empty; name a file or a folder")
    if preview is not None:
        kind_of(preview)
    asked = {"reference": reference or None, "prompt": prompt or None, "seed": seed or None, **sampling}
    plan = batches.plan(asked, batch, out)
    student = {**loading.arguments(), "device": device}
    several = parallel.processes() > 1
    if cluster.engine != "local" and (several or preview is not None):
        raise UsageError(
            f"--engine {cluster.engine} draws whole pictures in other processes: without torchrun and --preview"
        )
    display = Display(quiet=as_json or not parallel.is_first())
    if enhancing.enhance:
        plan = _enhanced(plan, enhancing, loading, several, display)

    def load() -> Any:
        return opened(display, student, parallel=several)

    try:
        with open_engine(cluster.engine, cluster.address) as machines:
            shown = Path(preview) if preview else None
            options = {"writes": parallel.is_first(), "preview": shown, "engine": machines}
            outcome = batches.draw(plan, student, load, display, **options)
    finally:
        if several:
            parallel.leave()
    if parallel.is_first():
        _tell_pictures(plan, outcome, round(time.monotonic() - started, 2), display, as_json)


def _enhanced(plan: Any, enhancing: Enhancing, loading: Loading, several: bool, display: Any) -> Any:
    """The plan with its prompts filled out, as long as the model that draws reads; as it is, and one line that says so,
    where there is no endpoint."""
    from diptych.apps import enhance
    from diptych.llm.cache import Cache

    if several:
        raise UsageError("--enhance asks in one process; without torchrun, or with the longer prompt written out")
    endpoint = enhance.endpoint_of(enhancing.enhance_endpoint, enhancing.enhance_model)
    if endpoint is None:
        show(enhance.OFF, news=True)
        return plan
    length = enhance.length_of(loading.model, loading.base)
    with Cache(enhance.CACHE.expanduser()) as cache, display.stage("enhance", "prompts") as report:
        return enhance.apply(plan, endpoint, cache, report, length)


def _tell_pictures(plan: Any, outcome: Any, seconds: float, display: Any, as_json: bool) -> None:
    """What `generate` has to say at its end: the files on stdout, the counts on stderr, failures as its exit code."""
    from diptych.apps.batch import FAILED, counted

    drawn = [{"out": str(path), "provenance": provenance} for path, provenance in outcome.drawn]
    if as_json:
        skipped = [str(path) for path in outcome.skipped]
        several = {"pictures": drawn, "skipped": skipped, "failed": outcome.failed, "seconds": seconds}
        told = several if plan.folder is not None else {**drawn[0], "seconds": seconds}
        show(printable_json(told))
    else:
        for picture in drawn:
            show(picture["out"])
        display.say(f"{counted(outcome)}, {seconds:.1f} s")
    if outcome.failed and plan.folder is not None:  # one picture with a name of its own fails as itself
        raise UserError(
            f"{len(outcome.failed)} of {len(plan.requests)} pictures failed: {plan.folder / FAILED} says why; "
            "the same command tries them again"
        )


@command(
    'diptych relight --reference examples/references/cat.png --light "soft golden light from the left" --out lit.png'
)
def relight(
    *,
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
    loading: Loading,
    sampling: Sampling,
    device: Device = None,
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
    picture, masked = (
        open_image(reference, background=sampling.get("background") or "white"),
        open_image(mask) if mask else None,
    )
    display = Display(quiet=as_json)
    student = opened(display, {**loading.arguments(), "device": device})
    pictures = []
    with display.stage("relight", "pictures") as report:
        for done, text in enumerate(light):
            report(done, len(light))
            options = {"scene": scene, "task": task, "mask": masked, "detail": detail, "seed": seed}
            pictures.append(student.relight(picture, text, **options, **sampling))
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


@command(
    'diptych story --reference examples/references/cat.png --panel "a cat on the beach" --panel "a cat in a '
    'forest | Then it got lost." --panel "a cat in a cave" --panel "a cat sleeping in a kitchen | Home." '
    "--out story.pdf"
)
def story(
    *,
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
    loading: Loading,
    sampling: Sampling,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw a page of 4 to 10 panels of one character.

    The seed of each panel is printed at the end. To replace one panel, repeat the command with all seeds and
    change that one.
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
    student = opened(display, {**loading.arguments(), "device": device})
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
            **sampling,
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


def _name(light: str, seed: int) -> str:
    """A file's name from its light; a digest tells apart what letters and digits alone do not."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in light).split())[:60] or "light"
    return f"{slug}-{sha256(light)[:6]}-{seed}.png"


def _tell(found: dict[str, Any], started: float, as_json: bool) -> None:
    tell({**found, "seconds": round(time.monotonic() - started, 2)}, lambda found: found["out"], as_json)
