"""Preference training: a trained student learns to prefer each true target to the image from a degraded reference.

Subject fidelity optimization (SFO, arXiv 2506.03621): supervised training has only positive examples. Here, the student
that training starts from generates a *negative* for each pair. Its reference is shrunk and enlarged again, and its text
is sometimes dropped, so the negative is an image that misses the subject. Then, with the same noise for both, and e the
mean squared velocity error on the right panel,

    loss = −log sigmoid(−β · [(e(target) − e₀(target)) − (e(negative) − e₀(negative))])

where e₀ is the error of the student that training starts from (Diffusion-DPO, arXiv 2311.12908, for flow matching). It
is added to the supervised loss, which prevents the target's error from rising.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from diptych.data.records import seed_of
from diptych.student.canvas import Canvas, join_tokens, split_tokens
from diptych.train import cache, canvases_at_once
from diptych.train.cache import Latents, panels_of
from diptych.train.captions import Captions
from diptych.train.metrics import Progress, report
from diptych.train.objective import Batch
from diptych.train.processes import ALONE, Processes
from diptych.train.schedule import Bucket
from diptych.utils.io import sha256_json

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill, Preference
    from diptych.student.reference_pipeline import ReferencePipeline

FORMAT = 3  # increase it when the contents of the files change
Losses = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (batch, model) to left and right losses, (B,) each
SHARD = 64  # negatives in a file, the number that a kill can lose


def loss(
    target: torch.Tensor, negative: torch.Tensor, target_0: torch.Tensor, negative_0: torch.Tensor, beta: float
) -> torch.Tensor:
    """The preference loss of each sample, (B,), from errors (B,) of the student and (`_0`) of the initial student."""
    return -F.logsigmoid(-beta * ((target - target_0) - (negative - negative_0)))


def terms(batch: Batch, settings: Preference, anchor: Anchor, losses: Losses, model: Any) -> dict[str, torch.Tensor]:
    """Means over a batch with negatives: the `left` and `right` losses of the true targets, the `preference` loss, and
    the share of samples whose target is `preferred`."""
    assert batch.negative is not None
    # One forward pass for targets and negatives, because several processes average gradients once a pass.
    rows = len(batch.sigma)
    both = batch.map(lambda tensor: torch.cat([tensor, tensor]))
    both = replace(both, clean=torch.cat([batch.clean, batch.negative]), negative=None)
    with anchor.inside():
        _, before = losses(both)
    left, right = losses(both, model)
    (target, negative), (target_0, negative_0) = right.split(rows), before.split(rows)
    return {
        "left": left[:rows].mean(),
        "right": target.mean(),
        "preference": loss(target, negative, target_0, negative_0, settings.beta).mean(),
        "preferred": ((target - target_0) < (negative - negative_0)).float().mean(),
    }


def choose(rows: Sequence[int], latents: Latents, most: int) -> list[int]:
    """At most `most` of these rows, in order: those with the lowest hashes of their ids."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"preference {latents.samples[row].id}".encode()).digest())
    return sorted(ranked[:most])


def degrade(reference: torch.Tensor, shrink: float) -> torch.Tensor:
    """References (B, 3, h, w), their sides shrunk to a fraction and enlarged again."""
    height, width = reference.shape[-2:]
    small = F.interpolate(reference, (max(1, round(height * shrink)), max(1, round(width * shrink))), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear")


class Negatives:
    """Packed canvases [reference | negative] of rows, read from the files of `NegativeSampler`."""

    def __init__(self, rows: Sequence[int], files: Sequence[Path]) -> None:
        from safetensors import safe_open

        self._place = {row: divmod(number, SHARD) for number, row in enumerate(rows)}
        self._files = [safe_open(path, "pt") for path in files]

    def gather(self, rows: Sequence[int]) -> torch.Tensor:
        """Negatives (B, N, C), float32, of rows of one bucket."""
        places = [self._place[row] for row in rows]
        return torch.stack([self._files[file].get_tensor(str(place)) for file, place in places]).float()


@dataclass(frozen=True)
class NegativeSampler:
    """Generates negatives with the student that training starts from."""

    pipe: ReferencePipeline
    buckets: Sequence[Bucket]
    latents: Latents
    text: Captions
    options: Distill

    @property
    def preference(self) -> Preference:
        """The recipe's section, which is there."""
        assert self.options.preference is not None
        return self.options.preference

    def generate(
        self,
        rows: Sequence[int],
        folder: Path,
        key: str,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ) -> Negatives:
        """Generates the missing negatives of these rows; each process writes its share of the files in `folder`.

        `key` identifies the student's weights and the data. Files are published complete, so a killed run resumes.
        """
        options, settings = self.options, self.preference
        sampled = [options.seed or 0, options.sample_steps, options.sample_guidance]
        sampled += [settings.shrink, settings.drop_text]
        sizes = [(bucket.canvas.panel_height, bucket.canvas.panel_width) for bucket in self.buckets]
        ids = [self.latents.samples[row].id for row in rows]
        name = sha256_json([FORMAT, key, sizes, sampled, ids], sort_keys=False)[:16]
        folder = folder / f"negatives-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"part-{number:05d}.safetensors" for number in range((len(rows) + SHARD - 1) // SHARD)]
        with processes.together():
            for number, path in enumerate(files):
                part = rows[number * SHARD : (number + 1) * SHARD]
                if number % processes.count == processes.rank and not cache.is_whole(path):
                    cache.write(self._shard(part), path)
                report(progress, number * SHARD + len(part), len(rows), "generating negatives")
        return Negatives(rows, files)

    def _shard(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The negatives of a file by their place in it."""
        negatives: dict[str, torch.Tensor] = {}
        for number, bucket in enumerate(self.buckets):
            places = [place for place, row in enumerate(rows) if self.latents.samples[row].bucket == number]
            size = canvases_at_once(bucket.canvas.height, bucket.canvas.width)
            for first in range(0, len(places), size):
                some = places[first : first + size]
                tokens = self._batch([rows[place] for place in some], bucket.canvas)
                negatives |= {str(place): negative.clone() for place, negative in zip(some, tokens, strict=True)}
        return negatives

    @torch.no_grad()
    def _batch(self, rows: Sequence[int], canvas: Canvas) -> torch.Tensor:
        """Packed canvases (B, N, C): the true left panels beside negatives."""
        options, settings, pipe = self.options, self.preference, self.pipe
        device, dtype = pipe.transformer.device, pipe.transformer.dtype
        reference, _ = panels_of(pipe, self.latents, rows, canvas)
        samples = [self.latents.samples[row] for row in rows]
        seeds = [seed_of(options.seed or 0, sample.id, "negative") for sample in samples]
        texts = [sample.text(options.instructions == 1) for sample in samples]
        dropped = [seed / 2**63 < settings.drop_text for seed in seeds]
        words = self.text.gather(["" if drop else text for text, drop in zip(texts, dropped, strict=True)])
        generated = pipe(
            reference=degrade(reference.float().clamp(-1, 1), settings.shrink),
            **pipe.text_arguments(words, device, dtype),
            height=canvas.panel_height,
            width=canvas.panel_width,
            num_inference_steps=options.sample_steps,
            guidance_scale=options.sample_guidance,
            image_guidance_scale=1.0,
            text_guidance_scale=1.0,
            generator=seeds,
            output_type="latent",
            return_dict=False,
        )[0]
        left, _ = split_tokens(self.latents.gather(rows)[0], canvas)
        _, right = split_tokens(generated.float().cpu(), canvas)
        return join_tokens(left, right, canvas)


class Anchor:
    """The weights that training starts from, which can replace the model's for a while. They are swapped in place,
    because weights that are sharded over several processes are gathered from this memory."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        """`parameters` are this process's parts (`Trained.local`)."""
        self.parameters = list(parameters)
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A context in which the model has its initial weights and computes no gradients."""
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
            other = parameter.clone()
            parameter.copy_(tensor)
            tensor.copy_(other)
