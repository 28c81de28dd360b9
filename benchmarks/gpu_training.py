"""Training steps at full size on one GPU: seconds, share of the matrix rate, and the peak against the plan (`gpu.py`).

The real `Trainer` on a random FLUX.1 of 12 B parameters made on the device, with random latents and text in memory: a
LoRA of rank 128 on the attention, bfloat16, gradient checkpointing, a batch of 4 pairs of 512 pixels.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
import torch
from inference import H200_RATE
from training import FULL

from diptych.recipe.schema import Recipe
from diptych.run import plan
from diptych.train import parts
from diptych.train.cache import CachedPair
from diptych.train.loop import Trainer
from diptych.train.prepare import TrainingJob
from diptych.train.schedule import ahead, choose
from diptych.utils import models

PAIRS, STEPS = 32, 3


class Rows:
    """Random latents in memory that replace the cache on disk."""

    def __init__(self, count: int, shape: tuple[int, int]) -> None:
        self.samples = [CachedPair(f"p-{number}", f"g-{number}", "") for number in range(count)]
        self.counts, self._shape = [count], shape
        self._both = [torch.randn(count, *shape) for _ in range(2)]

    def shape(self, _: int) -> tuple[int, int]:
        return self._shape

    def gather(self, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return tuple(side[list(rows)] for side in self._both)


class Words:
    """The same random embeddings for every caption."""

    def __init__(self, tokens: int, width: int, pooled: int, dtype: torch.dtype) -> None:
        self._both = torch.randn(1, tokens, width).to(dtype), torch.randn(1, pooled).to(dtype)

    def gather(self, captions: Sequence[str]) -> tuple[torch.Tensor, ...]:
        return tuple(each.repeat_interleave(len(captions), dim=0) for each in self._both)


def run(sheet: measuring.Sheet, device: torch.device, small: bool) -> None:
    rate = measuring.matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32, 8192 >> 5 * small)
    sheet.note(matrix_tflops=round(rate / 1e12, 2))
    kept: dict[str, Any] = {}

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def plain() -> dict[str, Any]:
            kept["trainer"] = trainer = opened("none", device, small, folder / "plain")
            return timed(trainer, "none", rate, small)

        def eight_bits() -> dict[str, Any]:
            trainer: Trainer = kept["trainer"]
            was = trainer.optimizer
            was.state.clear()
            eight = trainer.options.model_copy(update={"optimizer": "adamw8bit"})
            trainer.optimizer = parts.optimizer(trainer.trained.parameters, eight)
            try:
                return timed(trainer, "none", rate, small, optimizer="adamw8bit")
            finally:
                trainer.optimizer = was

        def compiled() -> dict[str, Any]:
            trainer: Trainer = kept["trainer"]
            trainer.transformer.compile_repeated_blocks()
            return timed(trainer, "none", rate, small)

        def quantized() -> dict[str, Any]:
            kept.clear()
            return timed(opened("nf4", device, small, folder / "nf4"), "nf4", rate, small)

        sheet.line("lora128", plain)
        if device.type == "cuda":
            sheet.line("lora128 adamw8bit", eight_bits, needs=6)
        if device.type == "cuda":
            sheet.line("lora128 compiled blocks", compiled, needs=25)
            sheet.line("lora128 on nf4", quantized, needs=10)


def recipe_of(quantize: str, small: bool, optimizer: str = "adamw") -> Recipe:
    distill = {
        "mode": "lora",
        "rank": 8 if small else 128,
        "quantize": quantize,
        "optimizer": optimizer,
        "steps": 10**6,
        "batch_size": 4,
        "gradient_checkpointing": True,
        "precision": "float32" if small else "bfloat16",
        "sample_every": 0,
        "instructions": 0.0,
        "validation_pairs": 0,
        "ema": 0.0,
    }
    teacher, side = ("pocket", 32) if small else ("black-forest-labs/FLUX.1-dev", 512)
    return Recipe.model_validate(
        {
            "name": "gpu",
            "teacher": teacher,
            "write": {"count": 8},  # few enough that all text is encoded once, as here
            "paint": {"panel_size": side},
            "distill": distill,
        }
    )


def opened(quantize: str, device: torch.device, small: bool, folder: Path) -> Trainer:
    """The trainer of the recipe, whose teacher has random weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.runtime.quantize import quantize as put
    from diptych.student.weights.fold import widen

    recipe = recipe_of(quantize, small)
    options = recipe.distill.model_copy(update={"seed": 0})
    dtype = torch.float32 if options.precision == "float32" else torch.bfloat16
    configs = FULL
    if small:
        place = models.resolve("pocket", "teacher")
        configs = {part: json.loads((place / part / "config.json").read_text()) for part in ("transformer", "vae")}
    teacher = measuring.random_weights(
        lambda: FluxTransformer2DModel.from_config(configs["transformer"]), device, dtype
    )
    with torch.device(device):
        vae: Any = AutoencoderKL.from_config(configs["vae"])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = DiptychPipeline(scheduler, vae.to(dtype), widen(teacher))
    del teacher
    if quantize != "none":
        put(pipe.transformer, quantize, device, dtype)
    buckets = choose(pipe, [], recipe.paint.panel_size, 1.0)
    config = pipe.transformer.config
    rows: Any = Rows(PAIRS, (buckets[0].canvas.tokens, config.in_channels // 2))
    words: Any = Words(16 if small else 512, config.joint_attention_dim, config.pooled_projection_dim, dtype)
    material: Any = SimpleNamespace(weights=[1.0])
    return Trainer(TrainingJob(pipe, buckets, options, device, rows, words, list(range(PAIRS)), [], folder, material))


def timed(trainer: Trainer, quantize: str, rate: float, small: bool, optimizer: str = "adamw") -> dict[str, Any]:
    """Runs one step to warm up, then measures `STEPS` steps."""
    device, batch = trainer.job.device, trainer.options.batch_size
    batches: Any = ahead(trainer.next_batch, range(trainer.step + 1, trainer.options.steps + 1), device)

    def steps(count: int) -> list[dict[str, Any]]:
        return [trainer.train_step(each) for each in islice(batches, count)]

    first, warm, first_peak, _ = measuring.clocked(lambda: steps(1), device)
    lines, seconds, peak, rest = measuring.clocked(lambda: steps(STEPS), device)
    batches.close()
    planned = plan.make(recipe_of(quantize, small, optimizer), gpu=None if small else "H200")["stages"]["distill"]
    flop = planned["flops_per_sample"] * batch * STEPS
    forward = measuring.forward_flop(
        trainer.transformer.config, trainer.job.canvas.tokens, trainer.job.text.gather([""])[0].shape[1]
    )
    planned_bytes = sum(planned["memory_of"].values())
    measured = max(first_peak, peak)
    return {
        "batch_size": batch,
        "step_s": round(seconds / STEPS, 4),
        "steps_s": [line["seconds"] for line in lines],
        "warm_s": round(warm, 2),
        "samples_per_second": round(batch * STEPS / seconds, 3),
        "tflops": round(flop / seconds / 1e12, 2),
        "share": round(flop / seconds / rate, 3),
        "share_of_790_tflops": round(flop / seconds / H200_RATE, 3),
        "share_of_790_tflops_without_recomputing": round(2 * forward * batch * STEPS / seconds / H200_RATE, 3),
        "peak_gib": round(measured / 2**30, 2),
        "rest_gib": round(rest / 2**30, 2),
        "planned_gib": round(planned_bytes / 2**30, 2),
        "planned_of_gib": {name: round(each / 2**30, 2) for name, each in planned["memory_of"].items()},
        "planned_over_measured": round(planned_bytes / measured, 4) if measured else None,
        "parameters_trained": trainer.trained.count,
        "loss": [line["loss"] for line in (*first, *lines)],
    }
