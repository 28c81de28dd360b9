"""Training: a plain diffusers-style loop compared with ours, alternating in one run.

    python benchmarks/training.py pocket [--rounds 9] [--steps 10] [--mode lora]     the pocket teacher, rendered pairs
    python benchmarks/training.py full [--rounds 3] [--steps 2]                      a random FLUX.1 (a GPU of 80 GB)

The plain loop opens the images, encodes both canvases and the captions, and takes the step, in that order. It has the
same widened transformer, adapters, precision, loss and AdamW. Ours encodes everything once before (`prepare_s` is the
time) and also averages the weights. Both use the same pairs in each round.

Results go to benchmarks/results/, with the machine named. Peak bytes are above the memory of both models at rest.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import torch

from diptych.data import records
from diptych.data.images import image_cell, open_image
from diptych.data.store import Dataset
from diptych.recipe.schema import Recipe
from diptych.run.plan.sizes import known
from diptych.student.canvas import condition_canvas, fit_image, join_panels, to_pixels
from diptych.train.loop import Trainer
from diptych.train.objective import Batch, panel_losses
from diptych.train.prepare import Material, prepare
from diptych.utils.machine import pick_precision

GOAL = 1.3  # times the plain loop's samples a second, on the CPU
PAIRS = 512
H200_RATE = 790e12
FULL = known()["black-forest-labs/FLUX.1-dev"]


class PlainLoop:
    """Encodes images and captions for every step."""

    def __init__(self, trainer: Trainer, pairs: Dataset) -> None:
        job = trainer.job
        self.job, self.options = job, job.options
        self.pipe = copy.copy(job.pipe).to(job.device)  # ours has set its text encoders aside
        self.rows = list(pairs)
        self.transformer = trainer.transformer
        self.parameters = trainer.trained.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.options.learning_rate, betas=self.options.betas, weight_decay=0.01
        )
        self.guidance = self.options.guidance if self.transformer.config.guidance_embeds else None
        self.generator = torch.Generator().manual_seed(0)

    def step(self, number: int) -> torch.Tensor:
        job, size = self.job, self.options.batch_size
        chosen = [self.rows[(number * size + i) % len(self.rows)] for i in range(size)]
        with torch.no_grad():
            reference, target = (
                torch.stack([self._pixels(row[column]) for row in chosen]) for column in ("conditioning", "image")
            )
            clean = self.pipe.encode_canvas(join_panels(reference, target))
            condition = self.pipe.encode_canvas(condition_canvas(reference))
            embeds, pooled = self.pipe.encode_text([row["caption"] for row in chosen])
        noise = torch.randn(clean.shape, generator=self.generator).to(job.device)
        sigma = torch.sigmoid(torch.randn(size, generator=self.generator)).to(job.device)
        batch = Batch(clean.float(), condition.float(), noise, sigma, embeds, pooled, canvas=job.canvas)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            left, right = panel_losses(self.transformer, batch, self.guidance)
        loss = left.mean() + right.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().cpu()

    def _pixels(self, cell: dict[str, Any]) -> torch.Tensor:
        canvas = self.job.canvas
        return to_pixels(fit_image(open_image(cell), canvas.panel_height, canvas.panel_width)).to(self.job.device)


def rendered_pairs(folder: Path, count: int, size: int) -> Dataset:
    """Pairs from the pocket renderer at `size` pixels."""
    import numpy as np
    from PIL import Image

    from diptych.pocket import captions, world
    from diptych.pocket.render import render

    data = Dataset(folder, records.schema(records.PAIR))
    rows = []
    for number in range(count):
        rng = np.random.default_rng([77, number])
        subject = world.sample_identity(rng)
        scenes = [world.sample_scene(rng) for _ in range(2)]
        panels = [Image.fromarray(render(subject, scene)).resize((size, size)) for scene in scenes]
        texts = [captions.caption(subject.kind, scene, rng) for scene in scenes]
        grid = f"g-{number:06d}"
        values: dict[str, Any] = dict.fromkeys(records.PAIR, "")
        values |= {"conditioning": image_cell(panels[0]), "image": image_cell(panels[1]), "caption": texts[1]}
        values |= {"reference_caption": texts[0], "id": records.pair_id(grid, 0, 1), "grid_id": grid}
        values |= {"task": "subject", "subject": subject.kind, "reference_panel": 0, "target_panel": 1, "seed": number}
        values |= {"similarity": 1.0, "copy_distance": 1.0, "seam": 1.0, "kept": True, "reason": "kept"}
        rows.append(values | {"evidence": "{}"})
    data.write_shard(0, rows, "benchmark")
    data.publish({"fingerprint": "benchmark"})
    return data


def compare(recipe: Recipe, pairs: Dataset, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Both loops on one model; a round of each is `steps` steps."""
    started = time.perf_counter()
    trainer = Trainer(prepare(recipe, Material.open(recipe, pairs), folder))
    prepared = time.perf_counter() - started
    plain = PlainLoop(trainer, pairs)
    device = trainer.job.device

    def ours(number: int) -> torch.Tensor:
        batches = (trainer.next_batch(trainer.step + 1).map(lambda tensor: tensor.to(device)) for _ in range(steps))
        lines = [trainer.train_step(batch) for batch in batches]
        return torch.tensor(lines[-1]["loss"])

    def theirs(number: int) -> torch.Tensor:
        return torch.stack([plain.step((number + 1) * steps + i) for i in range(steps)])[-1]

    seconds, _, peaks = measuring.alternate({"plain": theirs, "ours": ours}, rounds, device)
    samples = steps * recipe.distill.batch_size
    methods = {
        name: measuring.summary(times)
        | {
            "samples_per_second": round(samples / sorted(times)[len(times) // 2], 2),
            "peak_mib": round(peaks[name] / 2**20, 1),
        }
        for name, times in seconds.items()
    }
    tokens = trainer.job.canvas.tokens
    length = trainer.job.text.gather([""])[0].shape[1]
    # Forward, and backward through every product: of adapters the weight gradients are small.
    times = 3 if recipe.distill.mode == "full" else 2
    times += 1 if recipe.distill.gradient_checkpointing else 0
    flop = times * measuring.forward_flop(trainer.transformer.config, tokens, length) * samples
    rate = flop / methods["ours"]["median_s"]
    return {
        "steps": steps,
        "batch_size": recipe.distill.batch_size,
        "mode": recipe.distill.mode,
        "precision": trainer.options.precision,
        "parameters_trained": trainer.trained.count,
        "pairs": len(pairs),
        "prepare_s": round(prepared, 2),
        "tokens": tokens + length,
        "methods": methods,
        "speedup": round(methods["ours"]["samples_per_second"] / methods["plain"]["samples_per_second"], 3),
        "tflops": round(rate / 1e12, 3),
        "share_of_790_tflops": round(flop / methods["ours"]["median_s"] / H200_RATE, 3)
        if device.type == "cuda"
        else None,
    }


def pocket(rounds: int, steps: int, mode: str) -> dict[str, Any]:
    """The pocket teacher, as recipes/pocket.yaml trains it."""
    from diptych.pocket import world

    distill = {"mode": mode, "rank": 128, "lora_targets": "attention+mlp", "steps": 10**6, "sample_every": 0}
    recipe = Recipe.model_validate({"name": "training", "teacher": "pocket", "distill": distill})
    with tempfile.TemporaryDirectory() as scratch:
        pairs = rendered_pairs(Path(scratch) / "pairs", PAIRS, world.PANEL)
        return compare(recipe, pairs, Path(scratch) / "student", rounds, steps)


def full(rounds: int, steps: int) -> dict[str, Any]:
    """A random FLUX.1 of 12 B parameters around the pocket's encoders' shapes: LoRA, checkpointing, bfloat16."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    from diptych.utils import models

    words = models.resolve("pocket", "teacher")  # tokenizers: what they say does not matter here
    with tempfile.TemporaryDirectory() as scratch, torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        transformer = FluxTransformer2DModel.from_config(FULL["transformer"])
        clip = CLIPTextModel(CLIPTextConfig(**FULL["text_encoder"]))
        t5 = T5EncoderModel(T5Config(**FULL["text_encoder_2"]))
        vae = AutoencoderKL.from_config(FULL["vae"])
        torch.set_default_dtype(torch.float32)
        folder = Path(scratch) / "teacher"
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=clip,
            tokenizer=CLIPTokenizer.from_pretrained(words / "tokenizer"),
            text_encoder_2=t5,
            tokenizer_2=T5Tokenizer.from_pretrained(words / "tokenizer_2"),
            transformer=transformer,
        ).save_pretrained(folder)
        del transformer, clip, t5, vae
        torch.cuda.empty_cache()
        distill = {
            "mode": "lora",
            "rank": 128,
            "steps": 10**6,
            "batch_size": 4,
            "gradient_checkpointing": True,
            "precision": "bfloat16",
            "sample_every": 0,
            "validation_pairs": 0,
            "ema": 0.0,
        }
        values = {"name": "full", "teacher": str(folder), "paint": {"panel_size": 512}, "distill": distill}
        recipe = Recipe.model_validate(values)
        pairs = rendered_pairs(Path(scratch) / "pairs", 16, 512)
        return compare(recipe, pairs, Path(scratch) / "student", rounds, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("pocket", "full"))
    parser.add_argument("--rounds", type=int, help="9 for the pocket, 3 for a full size")
    parser.add_argument("--steps", type=int, help="of a round; 10 for the pocket, 2 for a full size")
    parser.add_argument(
        "--mode", choices=("lora", "full"), default="full", help="the pocket's; full as `make demo` trains"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = measuring.about(device)
    if arguments.what == "pocket":
        result = pocket(arguments.rounds or 9, arguments.steps or 10, arguments.mode)
    else:
        result = full(arguments.rounds or 3, arguments.steps or 2)
    path = measuring.write(f"training-{arguments.what}", {"about": about, **result}, arguments.out)
    for name, numbers in result["methods"].items():
        print(f"{name:<6} {numbers['samples_per_second']:>9} samples/s   peak {numbers['peak_mib']} MiB")
    goal = f" (goal {GOAL})" if device.type == "cpu" else ""
    print(f"ours is {result['speedup']} times as fast{goal}; {pick_precision('auto', device)[1]}")
    print(path)


if __name__ == "__main__":
    main()
