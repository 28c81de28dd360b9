"""Ships what was trained: float16 weights in `diptych/pocket/weights`, and `log.json` with steps, samples, losses
and the machine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from diptych.utils.machine import processor

from .. import captions, world

WEIGHTS = Path(__file__).parents[1] / "weights"
ROLES = ("curator", "scorer", "reader")
LIMIT = 25 * 2**20
"""Bytes: all weights together."""


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


def _machine() -> str:
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _thinned(lines: list[dict]) -> list[dict]:
    return lines[:: max(1, len(lines) // 60)]


def _log(folder: Path, before: dict | None) -> dict:
    """A training in numbers; `before` is what the package says of the model that it may have begun from."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    told = {
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "curve": _thinned(lines),
        "last": lines[-1],
        "machine": _machine(),
    }
    if before and "start" in lines[0]:
        # Exported twice, the model before is still the one it began from.
        told["before"] = before.get("before", before) if before["curve"][:1] == lines[:1] else before
    return told


def export(work: Path, student: Path | None = None, report=print) -> None:
    """Replace the package's weights with those in `work`, and with the student of run `student` if given."""
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
    report(f"{total / 2**20:.1f} MiB in {WEIGHTS}")
    if total > LIMIT:
        raise SystemExit(f"more than the {LIMIT / 2**20:.0f} MiB that the package may hold")


def sheet(folder: Path, out: Path, guidance: float = 2.5, steps: int = 20, seed: int = 0) -> None:
    """Draw 16 single panels, 16 subject grids and 8 light grids with the stock `FluxPipeline`, one picture."""
    import torch
    from diffusers import FluxPipeline
    from PIL import Image

    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
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


EXAMPLES = 20261121
"""The seed namespace of the example references: training seeds are small numbers."""


def references(folder: Path) -> None:
    """Draw a reference of every kind, held-out ones too, of subjects nothing was trained on: `folder/KIND.png`."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(world.KINDS):
        rng = np.random.default_rng([EXAMPLES, number])
        scene = replace(
            world.sample_scene(rng), pose="standing", framing="medium", prop="none", weather="clear", x=0.5, tilt=0.0
        )
        direction, azimuth = (("left", 180.0), ("right", 0.0), ("above", 90.0))[number % 3]
        light = world.Light(direction=direction, azimuth=azimuth, elevation=75.0 if direction == "above" else 32.0)
        picture = world.render(world.sample_identity(rng, kind=kind), replace(scene, light=light))
        Image.fromarray(picture).save(folder / f"{kind}.png", optimize=True)
