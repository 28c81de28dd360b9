"""The command `diptych generate`: every reference with every prompt with every seed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.options import (
    Address,
    Background,
    Base,
    Device,
    Engine,
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
from diptych.errors import UsageError, UserError
from diptych.student.runtime import speed as speeds
from diptych.utils.console import printable_json, show

EXAMPLE = (
    'Example: diptych generate --model pocket --reference examples/references/cat.png --prompt "a cat on the moon" '
    "--out cat.png --seed 1"
)


def generate(
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
    model: Model = "pocket",
    base: Base = None,
    lora: Lora = None,
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
    steps: Steps = None,
    guidance: Guidance = None,
    image_guidance: ImageGuidance = None,
    text_guidance: TextGuidance = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="What not to show; needs image or text guidance above 1.")
    ] = None,
    enhance: Annotated[
        bool,
        typer.Option("--enhance", help="Let a vision-language model fill the prompt out from the reference."),
    ] = False,
    enhance_endpoint: Annotated[
        str | None,
        typer.Option("--enhance-endpoint", metavar="URL", help="Where it answers [default: $DIPTYCH_LLM_URL]."),
    ] = None,
    enhance_model: Annotated[
        str | None, typer.Option("--enhance-model", metavar="NAME", help="Its name [default: $DIPTYCH_LLM_MODEL].")
    ] = None,
    size: Size = None,
    fit: Fit = None,
    background: Background = None,
    preview: Annotated[
        str | None, typer.Option("--preview", metavar="FILE", help="A picture file that shows what is being drawn.")
    ] = None,
    device: Device = None,
    memory: Memory = None,
    speed: Speed = None,
    switch: Switch = None,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Draw your subject in new scenes: every reference with every prompt with every seed.

    Run again, it draws only what is missing; a picture that fails is named in DIR/failed.jsonl, and the rest goes on.
    Under `torchrun --nproc-per-node N -m diptych generate …`, N GPUs draw each picture together; with --engine ray
    each worker of a cluster draws pictures of its own.
    """
    from diptych.apps import batch as batches
    from diptych.data.engine import open_engine
    from diptych.data.images import kind_of
    from diptych.student.runtime import parallel
    from diptych.utils.console import Display
    from diptych.utils.models import with_scale

    started = time.monotonic()
    if batch is None and not (reference and prompt):
        raise UsageError(f"missing option '--{'prompt' if reference else 'reference'}' (or --batch FILE)")
    if any(not text.strip() for text in prompt or ()):
        raise UsageError("--prompt is empty; say what the new picture shows")
    if out == "":
        raise UsageError("--out is empty; name a file or a folder")
    if preview is not None:
        kind_of(preview)
    asked: dict[str, Any] = {
        "reference": reference or None,
        "prompt": prompt or None,
        "seed": seed or None,
        "steps": steps,
        "guidance": guidance,
        "image_guidance": image_guidance,
        "text_guidance": text_guidance,
        "negative_prompt": negative_prompt,
        "size": size,
        "fit": fit,
        "background": background,
    }
    plan = batches.plan(asked, batch, out)
    loading: dict[str, Any] = {"model": model, "base": base, "device": device}
    if lora:
        loading["lora"] = [with_scale(given) for given in lora]
    if memory is not None:
        loading["memory"] = memory
    if speed is not None or switch:
        speeds.parse(speed, switch or ())  # a misspelt one is told before anything is loaded
        loading |= {"speed": speed, "switches": switch or []}
    several = parallel.processes() > 1
    if engine != "local" and (several or preview is not None):
        raise UsageError(f"--engine {engine} draws whole pictures in other processes: without torchrun and --preview")
    display = Display(quiet=as_json or not parallel.is_first())
    if enhance:
        plan = _enhanced(plan, enhance_endpoint, enhance_model, (model, base), several, display)

    def load() -> Any:
        return opened(display, loading, parallel=several)

    try:
        with open_engine(engine, address) as machines:
            shown = Path(preview) if preview else None
            options = {"writes": parallel.is_first(), "preview": shown, "engine": machines}
            outcome = batches.draw(plan, loading, load, display, **options)
    finally:
        if several:
            parallel.leave()
    if parallel.is_first():
        _tell_pictures(plan, outcome, round(time.monotonic() - started, 2), display, as_json)


def _enhanced(
    plan: Any, url: str | None, asked: str | None, draws: tuple[str, str | None], several: bool, display: Any
) -> Any:
    """The plan with its prompts filled out by the model that is `asked`, as long as the one that `draws` reads; as it
    is, and one line that says so, where there is no endpoint."""
    from diptych.apps import enhance
    from diptych.llm.cache import Cache

    if several:
        raise UsageError("--enhance asks in one process; without torchrun, or with the longer prompt written out")
    endpoint = enhance.endpoint_of(url, asked)
    if endpoint is None:
        show(enhance.OFF, news=True)
        return plan
    length = enhance.length_of(*draws)
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
