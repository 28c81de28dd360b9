"""The commands that generate images with a student: `generate`, `relight`, and `switches`, which lists the settings of
`--speed`. `story` is in a file of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, ClassVar

import typer

from diptych.cli import complete
from diptych.cli.options import (
    Cluster,
    Device,
    Json,
    Loading,
    Show,
    command,
    load_student,
    print_result,
    require_text,
    show_images,
)
from diptych.errors import UsageError, UserError
from diptych.student.runtime import speed as speeds
from diptych.student.sampling import SEED, Sampling
from diptych.utils.console import printable_json, show
from diptych.utils.io import sha256

LLM_URL_HELP = "OpenAI-compatible server [default: $DIPTYCH_LLM_URL]."
LLM_MODEL_HELP = "The server's name for its model [default: $DIPTYCH_LLM_MODEL]."


@dataclass(frozen=True)
class Enhancing:
    """Whether prompts are extended, and by which model."""

    PANELS: ClassVar = {"Prompt enhancement": "enhance enhance_endpoint enhance_model"}
    enhance: Annotated[
        bool, typer.Option("--enhance", help="Extend the prompt with a vision-language model that sees the reference.")
    ] = False
    enhance_endpoint: Annotated[str | None, typer.Option("--enhance-endpoint", metavar="URL", help=LLM_URL_HELP)] = None
    enhance_model: Annotated[str | None, typer.Option("--enhance-model", metavar="NAME", help=LLM_MODEL_HELP)] = None


@command(
    'diptych generate --model pocket --reference examples/references/cat.png --prompt "a cat on the moon" '
    "--out cat.png --seed 1",
    Input="reference prompt batch seed",
    Output="out preview",
)
def generate(
    *,
    reference: Annotated[
        list[str] | None,
        typer.Option("--reference", metavar="PATH", help="Image of your subject, or a folder of images. Repeatable."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Description of the whole new image. Repeatable.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="FILE", help="JSONL file; each line has reference, prompt, seed, and options."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", min=0, help=f"{SEED} Repeatable [default: 0].")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="PNG, WebP, or JPEG file [default: diptych.png]. For several images: a folder, or a pattern with "
            "{reference}, {prompt}, {seed}, {row}.",
        ),
    ] = None,
    preview: Annotated[
        str | None, typer.Option("--preview", metavar="FILE", help="Image file that shows the image in progress.")
    ] = None,
    loading: Loading,
    sampling: Sampling,
    enhancing: Enhancing,
    cluster: Cluster,
    device: Device = None,
    shown: Show = None,
    as_json: Json = False,
) -> None:
    """Generate images of your subject in new scenes.

    Every reference is combined with every prompt and every seed. Run the command again to generate only what is
    missing. Failed images are listed in DIR/failed.jsonl. With torchrun, several GPUs generate each image together;
    with --engine ray, each worker generates its share of the images.
    """
    from diptych.apps import batch as batches
    from diptych.data.images import kind_of
    from diptych.data.ray_engine import open_engine
    from diptych.student.runtime import parallel
    from diptych.utils.console import Display

    started = time.monotonic()
    if batch is None and not (reference and prompt):
        missing = "--prompt" if reference else "--reference"
        raise UsageError("option_missing", f"Missing option {missing}. Pass it, or --batch FILE.")
    for text in prompt or ():
        if not text.strip():
            raise UsageError("text_empty", "--prompt is empty. Describe the new image.")
    require_text(out=out)
    if preview is not None:
        kind_of(preview)
    shared = {"reference": reference or None, "prompt": prompt or None, "seed": seed or None, **sampling}
    plan = batches.plan(shared, batch, out)
    student = {**loading.arguments(), "device": device}
    several = parallel.processes() > 1
    if cluster.engine != "local" and (several or preview is not None):
        raise UsageError(
            "option_conflict",
            f"--engine {cluster.engine} generates images in other processes. Leave out torchrun and --preview.",
        )
    display = Display(quiet=as_json or not parallel.is_first())
    if enhancing.enhance:
        plan = _enhanced(plan, enhancing, loading, several, display)

    def load() -> Any:
        return load_student(display, student, parallel=several)

    try:
        with open_engine(cluster.engine, cluster.address) as machines:
            progress = Path(preview) if preview else None
            options = {"writes": parallel.is_first(), "preview": progress, "engine": machines}
            outcome = batches.generate(plan, student, load, display, **options)
    finally:
        if several:
            parallel.leave()
    if parallel.is_first():
        if not as_json:
            show_images([str(path) for path, _ in outcome.generated], shown)
        _report_images(plan, outcome, round(time.monotonic() - started, 2), display, as_json)


def _enhanced(plan: Any, enhancing: Enhancing, loading: Loading, several: bool, display: Any) -> Any:
    """The plan with its prompts extended to at most the length that the model reads. Without an endpoint the plan
    stays as it is, and one line says so."""
    from diptych.apps import enhance
    from diptych.llm.cache import Cache

    if several:
        raise UsageError("option_conflict", "--enhance does not work under torchrun. Pass the long prompt itself.")
    endpoint = enhance.endpoint_of(enhancing.enhance_endpoint, enhancing.enhance_model)
    if endpoint is None:
        show(enhance.OFF, news=True)
        return plan
    length = enhance.length_of(loading.model, loading.base)
    with Cache(enhance.CACHE.expanduser()) as cache, display.stage("enhance", "prompts") as report:
        return enhance.apply(plan, endpoint, cache, report, length)


def _report_images(plan: Any, outcome: Any, seconds: float, display: Any, as_json: bool) -> None:
    """Prints the files on stdout and the counts on stderr. UserError if images failed."""
    from diptych.apps.batch import FAILED, format_counts

    images = [{"out": str(path), "provenance": provenance} for path, provenance in outcome.generated]
    if as_json:
        skipped = [str(path) for path in outcome.skipped]
        several = {"pictures": images, "skipped": skipped, "failed": outcome.failed, "seconds": seconds}
        show(printable_json(several if plan.folder is not None else {**images[0], "seconds": seconds}))
    else:
        for image in images:
            show(image["out"])
        display.say(f"{format_counts(outcome)}, {seconds:.1f} s")
        if images:
            print_next(display, images[0]["out"], "another --seed makes another image")
    if outcome.failed and plan.folder is not None:  # a single image raises its error itself
        raise UserError(
            "rows_failed",
            f"{len(outcome.failed)} of {len(plan.requests)} images failed. The reasons are in {plan.folder / FAILED}. "
            "Run the same command to try them again.",
        )


@command(
    'diptych relight --reference examples/references/cat.png --light "soft golden light from the left" --out lit.png',
    Input="reference light scene mask task seed",
    Output="out",
    Sampling="detail",
)
def relight(
    *,
    reference: Annotated[str, typer.Option("--reference", metavar="IMAGE", help="Image to relight.")],
    light: Annotated[
        list[str], typer.Option("--light", help="Description of the light. Repeatable: several lights make a strip.")
    ],
    scene: Annotated[str, typer.Option("--scene", help="Description of the image, for models that need one.")] = "",
    mask: Annotated[
        str | None,
        typer.Option("--mask", metavar="IMAGE", help="Mask of the same size: white may change, black does not."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Task with aligned panels: a name or a YAML file.",
            autocompletion=complete.tasks,
        ),
    ] = "relight",
    seed: Annotated[int, typer.Option("--seed", min=0, help=SEED)] = 0,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="PATH",
            help="PNG, WebP, or JPEG file. For several lights: a file for the strip, or a folder with a file for each.",
        ),
    ] = "relit.png",
    loading: Loading,
    sampling: Sampling,
    detail: Annotated[
        float,
        typer.Option("--detail", min=0, max=1, help="Share of the fine detail that is copied from the reference."),
    ] = 1.0,
    device: Device = None,
    shown: Show = None,
    as_json: Json = False,
) -> None:
    """Put an image under another light; everything stays in place.

    Several lights make a strip, from left to right. With --mask, the black part stays the same in every pixel.
    """
    from diptych.apps import relight as relighting
    from diptych.data.images import check_image, kind_of, open_image, save_image
    from diptych.utils.console import Display

    started = time.monotonic()
    if any(not text.strip() for text in light):
        raise UsageError("text_empty", "--light is empty. Describe how the scene is lit.")
    folder = Path(out) if out.endswith("/") or Path(out).is_dir() else None
    if folder is None:
        kind_of(out)
    if Path(out).exists() and Path(out).resolve() in {Path(p).resolve() for p in (reference, mask) if p}:
        raise UsageError("output_collision", f"--out {out} is the reference or the mask. Choose another file.")
    relighting.aligned(task)
    origin = {"reference_file": Path(reference).name, "reference_sha256": check_image(reference)}
    image = open_image(reference, background=sampling.get("background") or "white")
    masked = open_image(mask) if mask else None
    display = Display(quiet=as_json)
    student = load_student(display, {**loading.arguments(), "device": device})
    images = []
    with display.stage("relight", "images") as report:
        for done, text in enumerate(light):
            report(done, len(light))
            options = {"scene": scene, "task": task, "mask": masked, "detail": detail, "seed": seed}
            images.append(student.relight(image, text, **options, **sampling))
        report(len(light), len(light))
    records = [{**each.info, **origin} for each in images]
    if folder is not None:
        paths = [folder / _file_name(text, seed) for text in light]
        written = [save_image(*each) for each in zip(images, paths, records, strict=True)]
    elif len(images) == 1:
        written = [save_image(images[0], out, records[0])]
    else:
        whole = {**records[0], "light": light, "prompt": [record["prompt"] for record in records]}
        written = [save_image(relighting.strip(images), out, whole)]
    files = [str(path) for path in written]
    print_written({"out": files, "pictures": records}, started, shown, as_json)
    print_next(display, files[0], "another --seed makes another image")


def print_next(display: Any, path: str, change: str) -> None:
    traced = "" if path.lower().endswith(".pdf") else f"; diptych trace {quote(path)} shows what it came from"
    display.next(f"{change}{traced}")


def _file_name(light: str, seed: int) -> str:
    """A file name made from the light. Its hash keeps lights apart that differ only in other characters."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in light).split())[:60] or "light"
    return f"{slug}-{sha256(light)[:6]}-{seed}.png"


def print_written(result: dict[str, Any], started: float, shown: bool | None, as_json: bool) -> None:
    if not as_json:
        show_images(result["out"], shown)
    timed = {**result, "seconds": round(time.monotonic() - started, 2)}
    print_result(timed, lambda result: result["out"], as_json)


@command("diptych switches")
def switches(as_json: Json = False) -> None:
    """List the speed presets and every setting of --switch.

    A lossy setting changes images beyond float rounding; its measured cost in quality is listed with it.
    """
    print_result({"presets": speeds.presets(), "switches": speeds.switches()}, speeds.format_switches, as_json, 2)
