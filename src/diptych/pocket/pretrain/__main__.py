"""Train the pocket world's models, step by step, in one work folder.

    python -m diptych.pocket.pretrain pairs             # render what they learn from
    python -m diptych.pocket.pretrain vae --minutes 20
    python -m diptych.pocket.pretrain latents
    python -m diptych.pocket.pretrain teacher --minutes 60
    python -m diptych.pocket.pretrain decoder --teacher runs/pretrain/teacher
    python -m diptych.pocket.pretrain judges --minutes 15
    python -m diptych.pocket.pretrain export            # float16, into the package

The student is not trained here: `diptych run recipes/pocket.yaml` distils it from the teacher's own grids, and
`export --student RUN` ships it.
Every step can be stopped and started again.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from diptych.utils.machine import processor

from .. import captions, world
from ..render import render

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
Work = Annotated[Path, typer.Option(help="Work folder: renders, states, models.")]
Device = Annotated[str, typer.Option(help="`auto` takes the GPU if there is one; cpu, cuda, cuda:1, …")]
Processes = Annotated[int, typer.Option(help="Processes that render and tokenize; 0: as many as cores.")]
WORK = Path("runs/pretrain")
WEIGHTS = Path(__file__).parents[1] / "weights"
ROLES = ("curator", "scorer", "reader")
LIMIT = 25 * 2**20
"""Bytes: all weights together."""
EXAMPLES = 20261121
"""The seed namespace of the example references: training seeds are small numbers."""


def _say(line: str) -> None:
    print(line, flush=True)


@app.command()
def pairs(work: Work = WORK, count: int = 160000, processes: Processes = 0) -> None:
    """Render pairs of panels with their captions."""
    from . import renders
    from .trainer import cores

    renders.make(work / "pairs", count, processes=processes or cores(), report=_say)


@app.command()
def vae(
    work: Work = WORK,
    minutes: float = 20,
    batch: int = 32,
    rate: float = 2e-3,
    start: Path | None = None,
    device: Device = "auto",
) -> None:
    """Train the VAE. `--start` begins from a VAE's folder where the work folder holds no state."""
    from . import vae as step

    step.train(work, minutes, batch, rate, start, device, report=_say)


@app.command()
def latents(work: Work = WORK, count: int = 160000, device: Device = "auto", processes: Processes = 0) -> None:
    """Encode all renders once, with their captions and what is known of their subjects."""
    from . import teacher as step
    from .trainer import cores

    step.tables(work, count, processes or cores())
    step.encode(work, count, device, report=_say)


@app.command()
def teacher(
    work: Work = WORK,
    minutes: float = 60,
    batch: int = 64,
    rate: float = 1.2e-3,
    singles_until: float = 0.3,
    finish: bool = True,
    compile: bool = True,
    start: Path | None = None,
    drifted: float = 0.1,
    freeze_text: bool = False,
    device: Device = "auto",
) -> None:
    """Train the teacher and its text encoders. `--no-finish` keeps the rate up, for another sitting; `--start` begins
    from a teacher's folder (the package's, say) where the work folder holds no state; `--drifted` is the share of the
    inconsistent grids to learn from; `--freeze-text` trains the transformer alone."""
    from . import teacher as step

    step.train(
        work,
        minutes,
        batch,
        rate,
        singles_until,
        finish,
        compile,
        start,
        drifted,
        freeze_text,
        device,
        report=_say,
    )


@app.command()
def decoder(
    work: Work = WORK,
    minutes: Annotated[float, typer.Option(help="Minutes of this sitting. It ends earlier after --samples.")] = 60,
    samples: Annotated[int, typer.Option(help="Panels to train on, all sittings together.")] = 20000,
    batch: Annotated[int, typer.Option(help="Panels in a batch.")] = 12,
    rate: Annotated[float, typer.Option(help="Learning rate at the start. It falls to nothing over --samples.")] = 6e-4,
    teacher: Annotated[
        Path, typer.Option(help="Teacher folder: its VAE is trained further, its errors are learned from.")
    ] = WEIGHTS / "teacher",
    device: Device = "auto",
) -> None:
    """Train the decoder of a teacher's VAE to decode latents that are slightly off, as generated latents are. The
    encoder stays bit for bit, so teachers, students and pairs stay valid. Needs `pairs`; writes `WORK/decoder`. The
    same command resumes a training that was stopped."""
    from . import decoder as step

    step.train(work, teacher, minutes, samples, batch, rate, device, report=_say)


@app.command()
def judges(
    work: Work = WORK,
    minutes: float = 15,
    roles: str = "curator scorer reader",
    count: int = 15000,
    rate: float = 2e-3,
    start: Path | None = None,
    average: Path | None = None,
    only_new: bool = False,
    batch: int = 128,
    device: Device = "auto",
    processes: Processes = 0,
) -> None:
    """Train the curator, the scorer and the attribute reader, each on its own third of the renders. `--start`
    begins from the judges of that folder (the package's, say) where the work folder holds no state, `--average` saves
    the mean with that folder's. `--only-new` trains the reader's labels that the start lacks, and nothing else."""
    from . import judges as step
    from .trainer import cores

    options: dict = {"batch": batch, "rate": rate, "start": start, "average": average, "device": device}
    options["only_new"] = only_new
    for role in roles.split():
        step.train(work, role, minutes, count, **options, processes=processes or cores(), report=_say)


def halve(source: Path, target: Path, names: tuple[str, ...] | None = None) -> None:
    """Copy a model folder (or the files of it that `names` lists), its floating-point safetensors as float16."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in sorted(source.rglob("*")):
        goal = target / path.relative_to(source)
        if path.is_dir() or (names is not None and str(path.relative_to(source)) not in names):
            continue
        goal.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            tensors = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in load_file(path).items()}
            save_file(tensors, goal, metadata=metadata)
        else:
            shutil.copyfile(path, goal)


def encoder_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of the encoder's tensors in a VAE's weights file, as float16."""
    from safetensors.torch import load_file

    return {
        name: tensor.half().numpy().tobytes() for name, tensor in load_file(path).items() if name.startswith("encoder.")
    }


def _machine() -> str:
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{where}, torch {torch.__version__}"


def _thinned(lines: list[dict]) -> list[dict]:
    return lines[:: max(1, len(lines) // 60)]


def _log(folder: Path, before: dict | None) -> dict:
    """A training in numbers; `before` is what the package says of the model that it may have begun from."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    summary = {
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "curve": _thinned(lines),
        "last": lines[-1],
        "machine": _machine(),
    }
    if before and "start" in lines[0]:
        # Exported twice, the model before is still the one it began from.
        summary["before"] = before.get("before", before) if before["curve"][:1] == lines[:1] else before
    return summary


@app.command()
def export(work: Work = WORK, student: Path | None = None) -> None:
    """Copy the trained models into the package as float16, with the log of how they came to be, and with the student of
    run `--student` if given."""
    import torch

    torch.set_num_threads(2)
    log_path = WEIGHTS / "log.json"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    for role in ("teacher", *ROLES):
        if not (work / role).exists():
            continue
        shutil.rmtree(WEIGHTS / role, ignore_errors=True)
        halve(work / role, WEIGHTS / role)
        log[role] = _log(work / f"{role}_training", log.get(role))
        if role == "teacher" and (work / "vae_training").exists():
            log["vae"] = _log(work / "vae_training", log.get("vae"))
    if (work / "decoder").exists():
        shipped, weights = WEIGHTS / "teacher" / "vae", "diffusion_pytorch_model.safetensors"
        if encoder_tensors(work / "decoder" / weights) != encoder_tensors(shipped / weights):
            raise SystemExit(f"{work / 'decoder'} has another encoder than the VAE of {WEIGHTS / 'teacher'}")
        halve(work / "decoder", shipped, names=(weights,))
        log["vae"] = _log(work / "decoder_training", log.get("vae"))
    if student is not None:
        shutil.rmtree(WEIGHTS / "student", ignore_errors=True)
        lora = student / "pytorch_lora_weights.safetensors"
        if lora.exists():
            halve(lora.parent, WEIGHTS / "student", names=(lora.name, "README.md", "sampling.json"))
        else:
            halve(student / "transformer", WEIGHTS / "student" / "transformer")
            halve(student, WEIGHTS / "student", names=("README.md", "sampling.json"))
        training = student / "training"
        curve = _thinned([json.loads(line) for line in (training / "metrics.jsonl").read_text("utf8").splitlines()])
        log["student"] = json.loads((training / "summary.json").read_text()) | {"curve": curve, "machine": _machine()}
    log_path.write_text(json.dumps(log, indent=1))
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    _say(f"{total / 2**20:.1f} MiB in {WEIGHTS}")
    if total > LIMIT:
        raise SystemExit(f"more than the {LIMIT / 2**20:.0f} MiB that the package may hold")


@app.command()
def sheet(
    work: Work = WORK, out: Path = Path("teacher.png"), guidance: float = 2.5, steps: int = 20, seed: int = 0
) -> None:
    """Draw a sheet of the teacher's panels and grids, to look at: 16 single panels, 16 subject grids and 8 light grids,
    with the stock `FluxPipeline`."""
    import torch
    from diffusers import FluxPipeline
    from PIL import Image

    pipeline = FluxPipeline.from_pretrained(work / "teacher", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng([seed, 7])
    length = pipeline.tokenizer_2.model_max_length
    side = world.PANEL

    def draw(prompts: list[str], width: int) -> list[np.ndarray]:
        images = pipeline(
            prompts,
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=guidance,
            height=side,
            width=width,
            num_inference_steps=steps,
            max_sequence_length=length,
            generator=[torch.Generator().manual_seed(seed + n) for n in range(len(prompts))],
        ).images
        return [np.asarray(image) for image in images]

    def scene() -> world.Scene:
        return world.sample_scene(rng)

    kinds = [world.TRAIN_KINDS[n % len(world.TRAIN_KINDS)] for n in range(16)]
    singles = draw([captions.caption(kind, scene(), rng) for kind in kinds], side)
    grids = draw([captions.grid(kind, scene(), scene(), rng)[0] for kind in kinds], 2 * side)
    lights = []
    for kind in kinds[:8]:
        left = scene()
        lights.append(captions.light_grid(kind, left, world.relight(rng, left), rng)[0])
    lights = draw(lights, 2 * side)
    rows = [np.concatenate(singles[n : n + 8], 1) for n in (0, 8)]
    rows += [
        np.concatenate(block, 1)
        for pictures in (grids, lights)
        for block in (pictures[n : n + 4] for n in range(0, len(pictures), 4))
    ]
    picture = Image.fromarray(np.concatenate(rows, 0))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BICUBIC).save(out)


@app.command()
def references(out: Path = Path("examples/references")) -> None:
    """Draw the example references, one of every kind, held-out ones too, of subjects nothing was trained on:
    `OUT/KIND.png`."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(world.KINDS):
        rng = np.random.default_rng([EXAMPLES, number])
        scene = replace(
            world.sample_scene(rng), pose="standing", framing="medium", prop="none", weather="clear", x=0.5, tilt=0.0
        )
        direction, azimuth = (("left", 180.0), ("right", 0.0), ("above", 90.0))[number % 3]
        light = world.Light(direction=direction, azimuth=azimuth, elevation=75.0 if direction == "above" else 32.0)
        picture = render(world.sample_identity(rng, kind=kind), replace(scene, light=light))
        Image.fromarray(picture).save(out / f"{kind}.png", optimize=True)


if __name__ == "__main__":
    app()
