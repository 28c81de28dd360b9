"""The pocket VAE's decoder in the package beside an earlier one, on latents of held-out renders and on generated ones.

    python benchmarks/decoder.py REVISION                        # a minute on one core
    python benchmarks/decoder.py REVISION --sheet decoders.png   # an image to look at instead
    python benchmarks/decoder.py REVISION --after runs/pretrain/decoder runs/other/decoder

REVISION is a commit whose package has the earlier decoder; the others go by the names of their folders. Writes
`results/decoder-DEVICE-DATE.json`: mean PSNR in dB against the renders, of true latents, of latents with white noise
(as a share of each channel's spread), and of latents that the teacher recovers from noise of a level σ. A sheet shows
references, and the student's images of them by all decoders, from the same latents.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch

from diptych.pocket.pretrain import decoder, renders, vae
from diptych.utils.paths import packaged

ROOT = Path(__file__).parents[1]
TEACHER = packaged("pocket/weights") / "teacher"
COUNT = 32
"""Pairs of held-out renders, the first ones of the seed that the training logs use."""
NOISES = (0, 0.1, 0.2, 0.4)
LEVELS = (0.1, 0.3, 0.5)
KINDS = ("cat", "robot", "car", "mushroom", "bird", "fish", "house", "teapot")
PROMPTS = ("a {} on the beach", "a {} in a forest, soft golden light from the left")


def earlier(revision: str, folder: Path) -> Path:
    """Copies the VAE of `revision` into `folder`."""
    inside = "src/diptych/pocket/weights/teacher/vae"
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        data = subprocess.run(
            ["git", "show", f"{revision}:{inside}/{name}"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        (folder / name).write_bytes(data)
    return folder


def opened(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)


def fingerprint(module: torch.nn.Module) -> str:
    """The first 16 digits of the sha256 of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def measured(vaes: dict[str, Any]) -> dict[str, Any]:
    """PSNR of every decoder on the same latents, of single panels, of grids, and of grids that the teacher recovers."""
    pairs = [renders.pair(n, seed=99) for n in range(COUNT)]
    panels = np.stack([panels for panels, _ in pairs])
    grids, prompts = decoder.canvases(panels), [row["grid"][0] for _, row in pairs]
    teacher = decoder.open_teacher(TEACHER, torch.device("cpu"))
    true = decoder.encode(teacher.vae, grids)
    recovered = {
        f"{level:g}": decoder.recover(teacher, true, prompts, level, steps=1, guidance=1.0, seed=0) for level in LEVELS
    }
    return {
        "panels": {name: decoder.measure(each, panels[:, 0], NOISES) for name, each in vaes.items()},
        "grids": {name: decoder.measure(each, grids, NOISES) for name, each in vaes.items()},
        "recovered": {
            name: {level: round(vae.psnr(each, latents, grids), 3) for level, latents in recovered.items()}
            for name, each in vaes.items()
        },
    }


@torch.no_grad()
def sheet(vaes: Sequence[Any], kinds: Sequence[str], seed: int = 0) -> Any:
    """Columns: `kinds`. Rows: the references, then for every prompt the student's images by each decoder."""
    from PIL import Image

    from diptych import Student
    from diptych.student.canvas import split_panels
    from diptych.student.families.base import unpack

    pipeline = Student.load("pocket").pipeline
    pipeline.set_progress_bar_config(disable=True)
    references = [Image.open(packaged("examples/references") / f"{kind}.png").convert("RGB") for kind in kinds]
    rows = [np.concatenate([np.asarray(reference) for reference in references], 1)]
    canvas, config = pipeline.canvas(), pipeline.vae.config
    for prompt in PROMPTS:
        tokens: Any = pipeline(
            [prompt.format(kind) for kind in kinds],
            reference=references,
            generator=[seed] * len(kinds),
            output_type="latent",
        ).images
        latents = unpack(tokens, canvas.size) / config.scaling_factor + config.shift_factor
        for each in vaes:
            _, right = split_panels(each.decode(latents).sample.clamp(-1, 1), canvas.panels)
            rows.append(np.concatenate(list(((right + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()), 1))
    image = Image.fromarray(np.concatenate(rows))
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit whose package has the earlier decoder")
    parser.add_argument(
        "--after", type=Path, nargs="+", default=[TEACHER / "vae"], help="VAE folders [default: the package's]"
    )
    parser.add_argument("--sheet", type=Path, help="image file to write instead of a result")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds on the sheet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sheet")
    parser.add_argument("--out", type=Path, help="another result file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        vaes = {"before": opened(earlier(given.revision, Path(scratch)))}
    vaes |= {folder.name: opened(folder) for folder in given.after}
    encoders = {fingerprint(each.encoder) for each in vaes.values()}
    if len(encoders) > 1:
        parser.error("the VAEs have different encoders, so they do not share latents")
    if given.sheet:
        sheet(list(vaes.values()), given.kinds, given.seed).save(given.sheet, optimize=True)
        print(given.sheet)
    else:
        result = {
            "about": measuring.about(torch.device("cpu")),
            "renders": COUNT,
            "encoder": encoders.pop(),
            "decoders": {name: fingerprint(each.decoder) for name, each in vaes.items()},
            **measured(vaes),
        }
        print(measuring.write("decoder", result, given.out))


if __name__ == "__main__":
    main()
