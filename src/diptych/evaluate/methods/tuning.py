"""Per-subject tuning, the baseline `tuned`: a small LoRA of the teacher for each subject, trained on its one reference.

DreamBooth (arXiv 2208.12242) with one image and without a rare token: the caption is "a KIND", and the data are crops
and mirror images of the reference. Optionally there are images of the kind that the teacher generates first (prior
preservation). Latents and text are computed once, so a step is one forward and backward pass of the transformer.

The learning rate is constant, so one training passes every number of steps of the sweep. Each is saved as an ordinary
LoRA, `baselines/tuned/SUBJECT/RATE-STEPS/pytorch_lora_weights.safetensors`, that `FluxPipeline.load_lora_weights`
opens. Its time is in `tuned.json` beside it, and in the run's log as `tuned`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import places as log
from diptych.data.records import seed_of
from diptych.evaluate.methods import common
from diptych.evaluate.methods.common import Base, Context, Method, noise, sample_teacher, size_of
from diptych.utils import models
from diptych.utils.io import publish, sha256, sha256_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample

VERSION = 1  # raised when equal settings would give other weights
FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
SMALLEST = 0.75  # side of a random crop, as a share of the reference's
KEY = "tuned"


def sweep(context: Context) -> dict[str, Method]:
    """A method for every learning rate with every number of steps, by name."""
    settings = context.recipe.evaluate.tuning
    made = (Tuned(context, rate, steps) for rate in settings.learning_rates for steps in sorted(set(settings.steps)))
    return {method.name: method for method in made}


def class_word(sample: Sample) -> str:
    """The word for a sample's subject in training: its kind, if the prompt names it, else "character"."""
    named = re.search(rf"\b{re.escape(sample.kind)}\b", sample.prompt, re.IGNORECASE)
    return sample.kind if named else "character"


class Tuned(Base):
    """The teacher with the LoRA of each subject, after `steps` steps at the learning rate `rate`."""

    def __init__(self, context: Context, rate: float, steps: int) -> None:
        super().__init__(context)
        self.rate, self.steps = rate, steps
        self.settings = context.recipe.evaluate.tuning

    @property
    def name(self) -> str:
        return f"{KEY}-{self.rate:g}-{self.steps}"

    def fingerprint(self) -> str:
        return f"{self.name} {self._settings_hash()}"

    def _settings_hash(self) -> str:
        """Hash of what decides a subject's weights besides rate, steps and the subject."""
        recipe, settings = self.recipe, self.settings.model_dump(exclude={"learning_rates", "steps"})
        levels = recipe.distill.model_dump(include={"timestep_density", "logit_mean", "logit_std", "shift", "guidance"})
        teacher = models.fingerprint(models.resolve(recipe.teacher, "teacher"))
        sampling = [recipe.evaluate.steps, recipe.evaluate.true_guidance] if settings["prior"] else []
        parts = [VERSION, settings, levels, teacher, sampling, recipe.training_seed, recipe.distill.precision]
        return sha256_json([*parts, recipe.device, recipe.threads], sort_keys=False)[:16]

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """Trains the subjects that have no weights yet, with all steps of the sweep at this rate."""
        for reference, sample in zip(references, samples, strict=True):
            if not (self._folder(reference, sample, self.steps) / FILE).exists():
                self._tune(reference, sample)

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        tuner = self.context.opened(KEY, lambda: Tuner(self.context))
        height, width = size_of(references)
        folders = [self._folder(*each, self.steps) for each in zip(references, samples, strict=True)]
        images: dict[int, Image] = {}
        for folder in dict.fromkeys(folders):
            rows = [row for row, other in enumerate(folders) if other == folder]
            tuner.load(folder / FILE)
            latents = noise(tuner.pipe, [seeds[row] for row in rows], height, width)
            prompts = [samples[row].prompt for row in rows]
            generated = sample_teacher(tuner.pipe, prompts, height, width, latents, self.recipe)
            images |= dict(zip(rows, generated, strict=True))
        return [images[row] for row in range(len(samples))]

    def _folder(self, reference: Image, sample: Sample, steps: int) -> Path:
        """The folder of a subject's weights. Another reference or another caption is another subject."""
        digest = sha256(f"{self._settings_hash()} {class_word(sample)}".encode() + reference.tobytes())
        subject = f"{sample.split}-{sample.identity:03d}-{digest[:12]}"
        return self.context.run_dir / "baselines" / KEY / subject / f"{self.rate:g}-{steps}"

    def _tune(self, reference: Image, sample: Sample) -> None:
        tuner = self.context.opened(KEY, lambda: Tuner(self.context))
        seed = seed_of(self.recipe.training_seed, f"{sample.split} {sample.identity}", KEY)
        for steps, seconds in tuner.train(reference, f"a {class_word(sample)}", self.rate, seed):
            folder = self._folder(reference, sample, steps)
            tuner.save(folder, {"steps": steps, "learning_rate": self.rate, "seconds": round(seconds, 3)})
            name = f"{KEY}-{self.rate:g}-{steps}"
            subject = f"{sample.split} {sample.identity}"
            log.append(self.context.run_dir, KEY, method=name, subject=subject, seconds=round(seconds, 3))


class Tuner:
    """The teacher with one LoRA, which holds the weights of one subject at a time."""

    def __init__(self, context: Context) -> None:
        import torch
        from peft import LoraConfig

        from diptych.train import parts

        self.recipe = context.recipe
        self.settings = self.recipe.evaluate.tuning
        self.pipe, self.precision = common.frozen_teacher(self.recipe)
        self.device = self.pipe.device
        transformer = self.transformer = self.pipe.transformer
        targets = parts.lora_targets(transformer, self.settings.lora_targets, "evaluate.tuning.lora_targets")
        rank = self.settings.rank
        self.config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.recipe.training_seed, KEY, "start"))
            transformer.add_adapter(self.config, adapter_name=parts.ADAPTER)
        named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
        for _, parameter in named:
            parameter.data = parameter.data.float()
        self.trained = parts.Trained([name for name, _ in named], [p for _, p in named], {})
        self.start = {name: tensor.clone() for name, tensor in self.trained.tensors().items()}

    def train(self, reference: Image, caption: str, rate: float, seed: int) -> Iterator[tuple[int, float]]:
        """Trains on one image, from the start. Yields (steps, seconds so far) at each number of steps of the sweep,
        with the weights in place. The caller's time in between is not counted."""
        import torch

        from diptych.train.objective import Batch, velocity_error
        from diptych.utils.machine import computing

        settings, spent, started = self.settings, 0.0, time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        canvas = common.canvas(self.pipe, reference.height, reference.width)
        clean = common.encode_pixels(self.pipe, views(reference, settings.crops, generator)).float()
        prior = self._prior(caption, canvas, seed) if settings.prior else None
        text = common.encode_text(self.pipe, [caption])
        guidance = self.recipe.distill.guidance if self.transformer.config.guidance_embeds else None
        self.trained.put(self.start)
        optimizer = torch.optim.AdamW(self.trained.parameters, lr=rate)
        self.transformer.train()
        for step in range(1, max(settings.steps) + 1):
            batch = clean[torch.randint(len(clean), (settings.batch_size,), generator=generator)]
            if prior is not None:
                rows = torch.randint(len(prior), (settings.batch_size,), generator=generator)
                batch = torch.cat([batch, prior[rows]])
            sigma = self._sigma(len(batch), canvas, generator)
            noise = torch.randn(batch.shape, generator=generator).to(self.device)
            embeds = (text[0].expand(len(batch), -1, -1), text[1].expand(len(batch), -1))
            without_reference = batch[:, :0]
            step_batch = Batch(batch, without_reference, noise, sigma.to(self.device), *embeds, canvas=canvas)
            with computing(self.precision, self.device):
                error = velocity_error(self.transformer, step_batch, guidance)
            error.mean(dim=(1, 2)).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.trained.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in settings.steps:
                spent += time.perf_counter() - started
                yield step, spent
                started = time.perf_counter()

    def _sigma(self, count: int, canvas: Any, generator: torch.Generator) -> torch.Tensor:
        """Noise levels (B,), sampled as in `distill`."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        from diptych.train.objective import shifted

        distill = self.recipe.distill
        scheme = "logit_normal" if distill.timestep_density == "logit_normal" else "none"
        level = compute_density_for_timestep_sampling(
            scheme, count, distill.logit_mean, distill.logit_std, generator=generator
        )
        return shifted(level, common.shift(self.pipe, canvas, distill.shift))

    def _prior(self, caption: str, canvas: Any, seed: int) -> torch.Tensor:
        """Latents (prior, N, C) of images that the teacher, without the subject, generates for the caption."""
        import torch

        self.trained.put({name: torch.zeros_like(t) if "lora_B" in name else t for name, t in self.start.items()})
        seeds = [seed_of(seed, KEY, f"prior {number}") for number in range(self.settings.prior)]
        height, width, size = canvas.panel_height, canvas.panel_width, self.recipe.evaluate.batch_size
        images: list[torch.Tensor] = []
        for first in range(0, len(seeds), size):
            latents = noise(self.pipe, seeds[first : first + size], height, width)
            prompts = [caption] * len(latents)
            images += sample_teacher(self.pipe, prompts, height, width, latents, self.recipe, output_type="latent")
        return torch.stack(images).float()

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Publishes the weights as a LoRA file that stock diffusers loads, with `about` in `tuned.json`."""
        from diffusers import FluxPipeline
        from peft import get_peft_model_state_dict

        from diptych.train import parts

        state = get_peft_model_state_dict(self.transformer, adapter_name=parts.ADAPTER)
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in self.config.to_dict().items()}
        with publish(folder) as partial:
            FluxPipeline.save_lora_weights(
                partial,
                transformer_lora_layers={key: value.detach().cpu() for key, value in state.items()},
                transformer_lora_adapter_metadata=config,
            )
            (partial / "tuned.json").write_text(json.dumps(about) + "\n", "utf8")

    def load(self, path: Path) -> None:
        """Loads the weights of a file that `save` wrote."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        from diptych.train import parts

        state = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
        set_peft_model_state_dict(self.transformer, state, adapter_name=parts.ADAPTER)
        self.transformer.eval()


def views(reference: Image, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pixels (count, 3, h, w) in [-1, 1]: the reference, its mirror image, then random crops of both, all resized to
    its size."""
    import torch
    from PIL import Image as Images
    from PIL import ImageOps

    from diptych.student.canvas import to_pixels

    both = [reference.convert("RGB"), ImageOps.mirror(reference.convert("RGB"))]
    images = both[:count]
    width, height = reference.size
    while len(images) < count:
        side, x, y = torch.rand(3, generator=generator).tolist()
        share = SMALLEST + (1 - SMALLEST) * side
        left, top = x * (1 - share) * width, y * (1 - share) * height
        box = (left, top, left + share * width, top + share * height)
        images.append(both[len(images) % 2].resize((width, height), Images.Resampling.BICUBIC, box=box))
    return torch.stack([to_pixels(image) for image in images])


def seconds_per_subject(run_dir: Path) -> dict[str, float]:
    """Mean training seconds of a subject by method, from the run's log."""
    spent: dict[str, dict[str, float]] = {}
    for event in log.read(run_dir):
        if event.get("event") == KEY:
            spent.setdefault(event["method"], {})[event["subject"]] = event["seconds"]
    return {name: round(sum(by.values()) / len(by), 3) for name, by in spent.items()}
