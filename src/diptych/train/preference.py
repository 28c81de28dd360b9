"""Preference training: after a student is trained, prefer each true target to what a degraded reference gives.

Subject fidelity optimization (SFO, arXiv 2506.03621): supervised training shows what is right and never what is wrong.
Here the student that training starts from draws a *negative* for each pair, from a reference that was shrunk and
enlarged again, now and then without the text; so a negative is what the student draws when it misses the subject. Then,
with one noise for both, and e the mean squared velocity error on the right panel,

    loss = −log sigmoid(−β · [(e(target) − e₀(target)) − (e(negative) − e₀(negative))])

where e₀ is the error of the student that training started from (Diffusion-DPO, arXiv 2311.12908, for flow matching).
It is added to the supervised loss, which keeps the target's own error from rising.
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
from diptych.train.cache import Latents, Text, panels_of
from diptych.train.metrics import Progress, report
from diptych.train.objective import Batch
from diptych.train.processes import ALONE, Processes
from diptych.train.schedule import Bucket
from diptych.utils.io import sha256_json

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill, Preference
    from diptych.student.pipeline import DiptychPipeline

FORMAT = 3  # raised when the files say something else
Losses = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # of a batch, by the model given: left and right, (B,)
SHARD = 64  # negatives of a file: at most what a kill costs


def loss(
    target: torch.Tensor, negative: torch.Tensor, target_0: torch.Tensor, negative_0: torch.Tensor, beta: float
) -> torch.Tensor:
    """The preference loss of each sample, (B,), from errors (B,) of the student and (`_0`) of the one it started as."""
    return -F.logsigmoid(-beta * ((target - target_0) - (negative - negative_0)))


def terms(batch: Batch, wish: Preference, anchor: Anchor, losses: Losses, model: Any) -> dict[str, torch.Tensor]:
    """Means over a batch with negatives: the `left` and `right` losses of the true targets, the `preference` loss, and
    the share of samples in which the target is `preferred`."""
    assert batch.negative is not None
    # One forward pass for targets and negatives: several processes average gradients once a pass.
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
        "preference": loss(target, negative, target_0, negative_0, wish.beta).mean(),
        "preferred": ((target - target_0) < (negative - negative_0)).float().mean(),
    }


def choose(rows: Sequence[int], latents: Latents, most: int) -> list[int]:
    """At most `most` of these rows, those with the lowest hash of their id, in order."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"preference {latents.samples[row].id}".encode()).digest())
    return sorted(ranked[:most])


def degrade(reference: torch.Tensor, shrink: float) -> torch.Tensor:
    """References (B, 3, h, w), their sides shrunk to a fraction and enlarged again."""
    height, width = reference.shape[-2:]
    small = F.interpolate(reference, (max(1, round(height * shrink)), max(1, round(width * shrink))), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear")


class Negatives:
    """Packed canvases [reference | negative] of some rows, read from the files that `Drawing` made."""

    def __init__(self, rows: Sequence[int], files: Sequence[Path]) -> None:
        from safetensors import safe_open

        self._place = {row: divmod(number, SHARD) for number, row in enumerate(rows)}
        self._files = [safe_open(path, "pt") for path in files]

    def gather(self, rows: Sequence[int]) -> torch.Tensor:
        """(B, N, C) float32, of rows of one bucket."""
        places = [self._place[row] for row in rows]
        return torch.stack([self._files[file].get_tensor(str(place)) for file, place in places]).float()


@dataclass(frozen=True)
class Drawing:
    """What negatives are drawn with: the student that training starts from, and the pairs."""

    pipe: DiptychPipeline
    buckets: Sequence[Bucket]
    latents: Latents
    text: Text
    options: Distill

    @property
    def wish(self) -> Preference:
        assert self.options.preference is not None
        return self.options.preference

    def draw(
        self,
        rows: Sequence[int],
        folder: Path,
        key: str,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ) -> Negatives:
        """Draws the negatives of these rows that are not drawn yet, each process its share of the files in `folder`.

        `key` names what draws: the student's weights and the data. A file is published whole, so a killed run goes on.
        """
        options, wish = self.options, self.wish
        sampled = [options.seed or 0, options.sample_steps, options.sample_guidance, wish.shrink, wish.drop_text]
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
                report(progress, number * SHARD + len(part), len(rows), "drawing negatives")
        return Negatives(rows, files)

    def _shard(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The negatives of a file by their place in it."""
        drawn: dict[str, torch.Tensor] = {}
        for number, bucket in enumerate(self.buckets):
            places = [place for place, row in enumerate(rows) if self.latents.samples[row].bucket == number]
            size = canvases_at_once(bucket.canvas.height, bucket.canvas.width)
            for first in range(0, len(places), size):
                some = places[first : first + size]
                tokens = self._batch([rows[place] for place in some], bucket.canvas)
                drawn |= {str(place): negative.clone() for place, negative in zip(some, tokens, strict=True)}
        return drawn

    @torch.no_grad()
    def _batch(self, rows: Sequence[int], canvas: Canvas) -> torch.Tensor:
        """(B, N, C): the true left panels beside negatives."""
        options, wish, pipe = self.options, self.wish, self.pipe
        device, dtype = pipe.transformer.device, pipe.transformer.dtype
        reference, _ = panels_of(pipe, self.latents, rows, canvas)
        samples = [self.latents.samples[row] for row in rows]
        seeds = [seed_of(options.seed or 0, sample.id, "negative") for sample in samples]
        silent = [seed / 2**63 < wish.drop_text for seed in seeds]
        told = ["" if quiet else s.told(options.instructions == 1) for s, quiet in zip(samples, silent, strict=True)]
        embeds, pooled = self.text.gather(told)
        drawn = pipe(
            reference=degrade(reference.float().clamp(-1, 1), wish.shrink),
            prompt_embeds=embeds.to(device, dtype),
            pooled_prompt_embeds=pooled.to(device, dtype),
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
        _, right = split_tokens(drawn.float().cpu(), canvas)
        return join_tokens(left, right, canvas)


class Anchor:
    """The weights that training started from, to be put in the model for a moment: in place, because weights that are
    spread over several processes are gathered from this memory."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        """`parameters` are this process's own parts (`Trained.own`)."""
        self.parameters = list(parameters)
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The model is the one it started as, and takes no gradients."""
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
