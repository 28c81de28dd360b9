"""The pocket teacher: a stock FLUX transformer with its text encoders, trained together by flow matching on VAE
latents of renders.

It learns single panels, 1×2 grids of one subject in two scenes, and aligned 1×2 grids of one scene under two lights,
from plain prompts.
The result is a `FluxPipeline` folder that stock diffusers opens. Guidance is not distilled (`guidance_embeds` is
false): it is drawn with true guidance.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.utils.io import publish
from diptych.utils.machine import computing

from . import renders, tokenizers
from . import vae as vae_training
from .trainer import Pretraining, TraitHead, mean, pick_device, resident, traits_table

HEADS = 3
HEAD = 64
TEXT_DROPOUT = 0.1
LOGIT_MEAN, LOGIT_STD = 0.3, 1.0
"""Of the noise levels in training: noisier than the middle, because a subject's shape is decided above σ = 0.5."""
DEEP = 0
"""The single block behind which the traits of each panel's subject are read."""
TRAIT_WEIGHT = 0.1
"""Of the reading's loss beside the flow matching loss."""
SINGLE_LENGTH = 20
"""Text tokens of single panels in training; now and then the full length, which is what the pipelines pad to."""


def make_transformer():
    """An untrained teacher transformer: 2 double and 4 single blocks, width 192, tokens of 2×2 latents."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae_training.LATENTS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=tokenizers.TEXT_WIDTH,
        pooled_projection_dim=tokenizers.POOLED_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` to FLUX tokens `[N, H/2·W/2, 4C]`."""
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(latents, *latents.shape)


def position_ids(height: int, width: int) -> torch.Tensor:
    """FLUX position ids of a latent of `height`×`width`: `[H/2·W/2, 3]`."""
    from diffusers import FluxPipeline

    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, torch.device("cpu"), torch.float32)


def encode(work: Path, count: int, device: str = "auto", report=print) -> None:
    """Encode the first `count` rendered pairs once, each as a canvas: `work/latents.npy`, float16 `[N, C, H, 2H]`."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(work / "vae")
    vae.eval().to(pick_device(device))
    panels, rows = renders.load(work / "pairs")
    count, side = min(count, len(rows)), panels.shape[2] // vae_training.FACTOR
    shape = (count, vae_training.LATENTS, side, 2 * side)
    with publish(work / "latents.npy") as partial:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, count, 250):
            block = np.asarray(panels[start : min(start + 250, count)])
            canvas = block.transpose(0, 2, 1, 3, 4).reshape(len(block), block.shape[2], -1, 3)
            array[start : start + len(block)] = vae_training.encode(vae, canvas).numpy()
            if start % 10000 == 0:
                report(f"encoded {start} of {count} pairs")
        array.flush()


TEXTS = ("grid", "left", "right")
"""Captions of a rendered pair: of the grid, and of each panel."""


def tokenize(both: Sequence[Any], rows: list[dict]) -> np.ndarray:
    """Token ids of all captions of some rows by the CLIP and the T5 tokenizer: int16 `[rows, TEXTS, 2 variants,
    2 encoders, MAX_LENGTH]`. A lone variant is repeated."""
    texts = [text for row in rows for name in TEXTS for text in (row[name][0], row[name][-1])]
    ids = [
        tokenizer(
            texts, padding="max_length", truncation=True, max_length=tokenizers.MAX_LENGTH, return_tensors="np"
        ).input_ids.astype(np.int16)
        for tokenizer in both
    ]
    return np.stack(ids, 1).reshape(len(rows), len(TEXTS), 2, 2, -1)


def _table(part: tuple[Any, Any, range, list[dict]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    *both, numbers, rows = part
    values, choices = traits_table(renders.plan(n)[0] for n in numbers)
    return values.numpy(), choices.numpy(), tokenize(both, rows)


def tables(work: Path, count: int, processes: int = 1) -> None:
    """Labels of the first `count` rendered pairs: the subjects' traits (`numbers.npy`, `choices.npy`;
    see `traits_table`) and all captions as token ids (`prompts.npy`; see `tokenize`)."""
    both = tokenizers.load_or_make(work / "teacher_training")
    _, rows = renders.load(work / "pairs")
    parts = [(*both, part, rows[part.start : part.stop]) for part in renders.chunks(min(count, len(rows)))]
    columns = zip(*renders.spread(_table, parts, processes), strict=True)
    for name, arrays in zip(("numbers", "choices", "prompts"), columns, strict=True):
        np.save(work / f"{name}.npy", np.concatenate(arrays))


class Teacher(torch.nn.Module):
    """The transformer and both text encoders as one module: token ids in, velocity out. `features` are the image
    tokens `[N, tokens, width]` after single block `DEEP`, of the last forward pass."""

    def __init__(self, transformer, clip, t5):
        super().__init__()
        self.transformer, self.clip, self.t5 = transformer, clip, t5
        self.features = torch.empty(0)
        transformer.single_transformer_blocks[DEEP].register_forward_hook(self._keep)

    def _keep(self, block, inputs, outputs) -> None:
        _, self.features = outputs

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        clip_ids: torch.Tensor,
        t5_ids: torch.Tensor,
        image_ids: torch.Tensor,
    ) -> torch.Tensor:
        text = self.t5(t5_ids)[0]
        pooled = self.clip(clip_ids).pooler_output
        text_ids = torch.zeros(text.shape[1], 3, device=x.device)
        return self.transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]


def panel_features(features: torch.Tensor, panels: int) -> torch.Tensor:
    """The mean of each panel's tokens, of canvases `panels` wide: `[N, tokens, D]` to `[N · panels, D]`."""
    side = round((features.shape[1] / panels) ** 0.5)
    grid = features.unflatten(1, (side, panels, side))
    return grid.mean((1, 3)).flatten(0, 1)


def loss(model, tokens: torch.Tensor, clip_ids, t5_ids, image_ids, generator: torch.Generator) -> torch.Tensor:
    """Flow matching (rectified flow): x_t = (1−σ)·x0 + σ·ε, the model predicts ε − x0; σ is logit-normal, one from each
    of as many equal parts of its distribution as there are rows, for a quieter gradient."""
    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)
    uniform = (rows + torch.rand(len(tokens), generator=generator, device=tokens.device)) / len(tokens)
    sigma = torch.sigmoid(LOGIT_MEAN + LOGIT_STD * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
    s = sigma[:, None, None]
    velocity = model((1 - s) * tokens + s * noise, sigma, clip_ids, t5_ids, image_ids)
    return (velocity.float() - (noise - tokens)).pow(2).mean()


def train(
    work: Path,
    minutes: float,
    batch: int = 64,
    rate: float = 1.2e-3,
    singles_until: float = 0.3,
    finish: bool = True,
    compile_model: bool = True,
    start: Path | None = None,
    drifted: float = 0.1,
    freeze_text: bool = False,
    device: str = "auto",
    report=print,
) -> None:
    """Train for `minutes` more: single panels only for the first `singles_until` of them, then mostly grids; the
    rate falls all along to nothing at the end if `finish`. `start` is a teacher folder to begin from where no state is.

    `drifted` is the share of rendered grids with a drifting subject that is used. A teacher repeats a subject less
    often than its training data (docs/pocket.md has the figures). `freeze_text` keeps the text encoders fixed, which
    saves a sixth of the work.
    """
    torch.manual_seed(0)
    both = tokenizers.load_or_make(work / "teacher_training")
    if start is not None and [t.get_vocab() for t in tokenizers.load_or_make(start)] != [t.get_vocab() for t in both]:
        raise ValueError(f"{start} knows other words: its text encoders would not understand these prompts")
    teacher = Teacher(make_transformer(), *tokenizers.make_encoders(*both))
    if start is not None and (skipped := load_weights(teacher, start)):
        report(f"start from random weights: {', '.join(skipped)}")
    if freeze_text:
        for encoder in (teacher.clip, teacher.t5):
            encoder.requires_grad_(False)
    place = pick_device(device)
    teacher.to(place)
    blocks = (teacher.transformer.transformer_blocks, teacher.transformer.single_transformer_blocks)
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    reading = TraitHead(HEADS * HEAD).to(place)
    modules = {"teacher": teacher, "reading": reading}
    trainer = Pretraining(work / "teacher_training", modules, rate, weight_decay=0.01, ema=0.9985, orthogonal=matrices)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae")
    _, rows = renders.load(work / "pairs")
    grids = resident(np.load(work / "latents.npy", mmap_mode="c"), place)
    rows = rows[: len(grids)]
    known = [resident(np.load(work / f"{name}.npy"), place) for name in ("numbers", "choices")]
    prompts = resident(np.load(work / "prompts.npy"), place)
    empty = resident(tokenize(both, [{name: [""] for name in TEXTS}])[0, 0, 0], place)
    taken = np.random.default_rng(0).random(len(rows)) < drifted
    legible = np.flatnonzero([bool(row["grid"][0]) and (row["same"] or taken[n]) for n, row in enumerate(rows)])
    side = grids.shape[2]
    ids = {False: position_ids(side, side).to(place), True: position_ids(side, 2 * side).to(place)}
    if compile_model:
        # Compiled by torch 2.13 for the CPU, the gradients of double blocks were not numbers.
        for block in itertools.chain(*(blocks[1:] if place.type == "cpu" else blocks)):
            block.compile(fullgraph=True, dynamic=False)
    if start is not None and trainer.step == 0:
        trainer.log(start=start.name)
    rng = np.random.default_rng(trainer.step + 1)
    generator = torch.Generator(place).manual_seed(trainer.step + 1)
    started, losses, readings, seen = time.monotonic(), {False: [], True: []}, [], time.monotonic()
    while (passed := (time.monotonic() - started) / 60) < minutes:
        grid = passed > minutes * singles_until and rng.random() < 0.8
        length = tokenizers.MAX_LENGTH if passed > minutes * singles_until else SINGLE_LENGTH
        size = batch // 2 if grid else batch
        pick = rng.choice(legible, size) if grid else rng.integers(0, len(rows), size)
        pick, variant = (torch.from_numpy(of).to(place) for of in (pick, rng.integers(0, 2, size)))
        silent = torch.from_numpy(rng.random(size) < TEXT_DROPOUT).to(place)
        latents, traits = grids[pick], [values[pick] for values in known]
        if grid:
            text, traits = prompts[pick, 0, variant], [values.flatten(0, 1) for values in traits]
        else:
            right = int(rng.integers(2))
            latents, text = latents[..., right * side : (right + 1) * side], prompts[pick, 1 + right, variant]
            traits = [values[:, right] for values in traits]
        tokens = pack((latents.float() - vae.config.shift_factor) * vae.config.scaling_factor)
        clip_ids, t5_ids = torch.where(silent[:, None, None], empty, text).long().unbind(1)
        t5_ids = t5_ids[:, :length]
        with computing("bfloat16", place):
            value = loss(teacher, tokens, clip_ids, t5_ids, ids[grid], generator)
        read = reading.loss(panel_features(teacher.features, 2 if grid else 1), *traits)
        scale = max(0.01, 1 - passed / minutes) if finish else 1.0
        trainer.update(value + TRAIT_WEIGHT * read, scale)
        losses[grid].append(value.detach())
        readings.append(read.detach())
        if trainer.step % 100 == 0:
            means = {
                name: round(mean(losses[key]), 4) for key, name in ((False, "singles"), (True, "grids")) if losses[key]
            }
            report(
                trainer.log(
                    loss=means,
                    panels=trainer.step * batch,
                    traits=round(mean(readings), 3),
                    minutes=round(passed, 1),
                    seconds_per_step=round((time.monotonic() - seen) / 100, 3),
                )
            )
            losses, readings, seen = {False: [], True: []}, [], time.monotonic()
        if trainer.step % 500 == 0:
            trainer.save()
    trainer.save()
    with trainer.averaged():
        save(work / "teacher", teacher, vae, *both)


def load_weights(teacher: Teacher, folder: Path) -> list[str]:
    """Put the weights of a `FluxPipeline` folder, such as the package's, into `teacher`. Returns the names of the
    tensors of another shape (for instance another VAE's input and output layers), which start from random weights."""
    skipped = []
    from safetensors.torch import load_file

    parts = {"transformer": teacher.transformer, "text_encoder": teacher.clip, "text_encoder_2": teacher.t5}
    for name, module in parts.items():
        (path,) = (folder / name).glob("*.safetensors")
        # Tied weights (T5 writes its embedding once) are missing under their second name.
        weights, own = load_file(path), module.state_dict()
        other = [key for key, tensor in weights.items() if key in own and own[key].shape != tensor.shape]
        missing, unexpected = module.load_state_dict({k: weights[k] for k in weights if k not in other}, strict=False)
        if unexpected or set(missing) - {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids", *other}:
            raise ValueError(f"{path} is another model: unexpected {unexpected[:3]}, missing {missing[:3]}")
        skipped += other
    return skipped


def save(folder: Path, teacher: Teacher, vae, clip_tokenizer, t5_tokenizer) -> None:
    """Write the `FluxPipeline` folder, weights in float16, and `words.json` beside them."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=teacher.clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=teacher.t5,
        tokenizer_2=t5_tokenizer,
        transformer=teacher.transformer,
    )
    pipeline.save_pretrained(folder)
    tokenizers.save(folder, clip_tokenizer, t5_tokenizer)
