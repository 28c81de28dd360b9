"""An image-embedding adapter, the baseline `adapter`: the teacher with image tokens, trained on the run's pairs.

IP-Adapter (arXiv 2308.06721) as diffusers has it for FLUX: an image encoder embeds the reference, `ImageProjection`
turns the embedding into tokens, and each double block also attends to these tokens (`FluxIPAdapterAttnProcessor`). The
teacher is frozen. The adapter is saved in the layout that `FluxPipeline.load_ip_adapter` opens:

    pipe.load_ip_adapter("runs/first/baselines/adapter", weight_name="ip_adapter.safetensors",
                         image_encoder_pretrained_model_name_or_path="CLIP_FOLDER")

It is trained by `train.loop` on a canvas of one panel, the target. The reference enters only as its embedding. The
latent cache stores that embedding in the place of a student's condition.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diptych.data.records import COLUMNS, schema, seed_of
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, describe
from diptych.evaluate import results
from diptych.evaluate.methods import common
from diptych.evaluate.methods.common import Base, noise, sample_teacher, size_of, teacher_of
from diptych.judges.embedding import EmbeddingJudge
from diptych.judges.vision import Vision, open_vision, refuse_missing
from diptych.recipe import tasks
from diptych.train.loop import Trainer, train
from diptych.train.objective import Batch, velocity_error
from diptych.train.parts import Trained
from diptych.train.prepare import Material, TrainingJob
from diptych.utils import models
from diptych.utils.io import sha256_json
from diptych.utils.machine import computing

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample
    from diptych.recipe.schema import Recipe
    from diptych.train.metrics import Progress

VERSION = 1  # raised when equal settings would give other weights
FILE, ABOUT = "ip_adapter.safetensors", "adapter.json"
TOKENS = 4  # diffusers assumes this number of image tokens
KEY = "adapter"


class ImageAdapter(Base):
    """The teacher with the adapter, which is trained first if the run has none."""

    def fingerprint(self) -> str:
        refuse_scorer(self.recipe)
        settings = self.recipe.evaluate.adapter
        if settings.path is not None:
            adapter = models.fingerprint(adapter_file(Path(settings.path)))
            encoder = models.fingerprint(models.resolve(settings.encoder, "curator"))
            return f"{adapter} {encoder} {settings.scale} on {_teacher(self.recipe)}"
        return f"{made_by(self.recipe, self.context.run_dir)} {settings.scale}"

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """Trains the adapter, unless the recipe names one or the run has one."""
        if self.recipe.evaluate.adapter.path is None:
            fit(self.recipe, self.context.run_dir)

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        pipe, encoder = self.context.opened(KEY, self._open)
        height, width = size_of(references)
        images: list[Image] = []
        # Stock FluxPipeline silently mixes the embeddings of several references, so each call has one.
        for embedding, sample, seed in zip(encoder.embed(references), samples, seeds, strict=True):
            embeds = embedding.to(pipe.device, pipe.transformer.dtype)[None, None]
            images += sample_teacher(
                pipe,
                [sample.prompt],
                height,
                width,
                noise(pipe, [seed], height, width),
                self.recipe,
                ip_adapter_image_embeds=[embeds],
                negative_ip_adapter_image_embeds=[torch.zeros_like(embeds)],
            )
        return images

    def _open(self) -> tuple[Any, Encoder]:
        settings = self.recipe.evaluate.adapter
        folder = Path(settings.path) if settings.path is not None else run_folder(self.context.run_dir)
        pipe = teacher_of(self.recipe)
        attach(pipe, read(adapter_file(folder)))
        pipe.set_ip_adapter_scale(settings.scale)
        return pipe, Encoder.load(settings.encoder, self.recipe.device)


# ---- the image encoder


@dataclass(frozen=True)
class Encoder:
    """The image encoder: a CLIP vision model with the embedding of stock FluxPipeline, or any embedding model."""

    vision: Vision
    judge: EmbeddingJudge | None

    @classmethod
    def load(cls, name: str, device: str) -> Encoder:
        """Opens a folder or hub name; `pocket` is the curating judge. UserError if files or weights are missing."""
        folder = models.resolve(name, "curator")
        config = results.find_json(folder / "config.json")
        if config is None:
            raise UserError("model_incomplete", f"The image encoder in {folder} has no readable config.json.")
        if config.get("model_type") in ("clip", "clip_vision_model"):
            vision = open_vision(name, "curator", "CLIPVisionModelWithProjection", device)
            refuse_missing(sorted(vision.missing), name)
            return cls(vision, None)
        judge = EmbeddingJudge.load(name, "curator", device)
        return cls(judge.vision, judge)

    def embed(self, images: Sequence[Image]) -> torch.Tensor:
        """Images of any size to float32 (B, D) on the CPU."""
        if self.judge is not None:
            return torch.from_numpy(self.judge.embed(images))
        rows = [self.vision.model(pixels).image_embeds for pixels in self.vision.batches(images)]
        return torch.cat(rows).float().cpu()


def refuse_scorer(recipe: Recipe) -> None:
    """UsageError if the encoder is the scoring judge, since training would then optimize for the score."""
    encoder, scorer = recipe.evaluate.adapter.encoder, recipe.evaluate.scorer
    if models.weights(models.resolve(encoder, "curator")) & models.weights(models.resolve(scorer, "scorer")):
        raise UsageError(
            "judge_conflict",
            f"evaluate.adapter.encoder ({encoder}) is the scoring judge (evaluate.scorer: {scorer}). "
            "Choose another encoder.",
        )


# ---- the adapter in a pipeline and on disk


def start(pipe: Any, width: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """An untrained adapter for embeddings of `width`, in diffusers' two groups. Its values are zero, so it changes
    nothing."""
    config = pipe.transformer.config
    joint, inner = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    projection = {"proj.weight": linear(TOKENS * joint, width), "proj.bias": torch.zeros(TOKENS * joint)}
    projection |= {"norm.weight": torch.ones(joint), "norm.bias": torch.zeros(joint)}
    attention: dict[str, torch.Tensor] = {}
    for block in range(config.num_layers):
        attention |= {f"{block}.to_k_ip.weight": linear(inner, joint), f"{block}.to_k_ip.bias": torch.zeros(inner)}
        attention |= {f"{block}.to_v_ip.weight": torch.zeros(inner, joint), f"{block}.to_v_ip.bias": torch.zeros(inner)}
    return {"image_proj": projection, "ip_adapter": attention}


def attach(pipe: Any, state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Puts an adapter on a stock FluxPipeline, which then takes embeddings. UserError for an adapter of another
    model."""
    from diptych.utils.console import quiet_bars

    try:
        with quiet_bars():
            pipe.load_ip_adapter(state, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    except (KeyError, ValueError, RuntimeError) as error:
        message = f"The adapter does not fit the teacher ({describe(error, 200)}). Use one trained on this teacher."
        raise UserError("model_mismatch", message) from error


def read(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter's file as diffusers' two groups."""
    from safetensors.torch import load_file

    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(path).items():
        group, _, key = name.partition(".")
        if group not in groups:
            raise UserError(
                "model_unsupported", f"{path} is not an IP-Adapter in diffusers' layout: it has a tensor {name}."
            )
        groups[group][key] = tensor
    return groups


def collect(transformer: Any) -> dict[str, torch.Tensor]:
    """The adapter on a transformer by the names of its file, float32 on the CPU."""
    (projection,) = transformer.encoder_hid_proj.image_projection_layers
    tensors = {f"image_proj.{k.replace('image_embeds', 'proj')}": v for k, v in projection.state_dict().items()}
    for number, block in enumerate(transformer.transformer_blocks):
        for key, value in block.attn.processor.state_dict().items():  # to_k_ip.0.weight: of the first adapter
            side, _, part = key.split(".")
            tensors[f"ip_adapter.{number}.{side}.{part}"] = value
    return {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}


def adapter_file(folder: Path) -> Path:
    """The weights file of an adapter's folder, or the file itself. UsageError if there is none."""
    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise UsageError("path_not_found", f"evaluate.adapter.path: {folder} has no {FILE}.")
    return path


def run_folder(run_dir: Path) -> Path:
    """The folder of a run's adapter."""
    return run_dir / "baselines" / KEY


# ---- training


class AdapterTrainer(Trainer):
    """The training loop for an adapter, with the loss of one panel."""

    def select(self) -> Trained:
        """Selects the projection and the new keys and values, in float32. The teacher stays frozen."""
        job = self.job
        transformer = self.transformer.to(job.device).requires_grad_(False).train()
        named: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in transformer.named_parameters():
            if "encoder_hid_proj." in name or "_ip." in name:
                parameter.data = parameter.data.float()
                named.append((name, parameter.requires_grad_(True)))
        if job.options.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return Trained([name for name, _ in named], [p for _, p in named], {})

    def losses(self, batch: Batch, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """0 for the left panel, which the canvas lacks, and the loss of the target; `batch.condition` is (B, 1, D)."""
        embeds = {"ip_adapter_image_embeds": [batch.condition]}
        with computing(self.options.precision, self.job.device):
            error = velocity_error(model or self.transformer, batch, self.guidance, attention=embeds)
        right = error.mean(dim=(1, 2))
        return torch.zeros_like(right), right

    def generate_samples(self) -> None:
        """Generates no sample sheet; the suite's images show the adapter."""


def fit(recipe: Recipe, run_dir: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Trains the adapter of a run on its pairs, or resumes; returns the content of `adapter.json`.

    UserError if the run has no pairs. Ctrl-C saves a checkpoint, as in `distill`.
    """
    folder, fingerprint = run_folder(run_dir), made_by(recipe, run_dir)
    about = results.find_json(folder / ABOUT) or {}
    if about.get("made_by") == fingerprint and (folder / FILE).is_file():
        return about
    trainer = train(prepare(recipe, run_dir, progress), progress, AdapterTrainer)
    from diptych.train import parts
    from diptych.train.cache import write_tensors

    with parts.averaged(trainer.ema, trainer.trained):
        tensors = collect(trainer.transformer)
    options = trainer.options
    about = {
        "made_by": fingerprint,
        "encoder": recipe.evaluate.adapter.encoder,
        "parameters": trainer.trained.count,
        "pairs": trainer.order.count,
        "steps": trainer.step,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "seconds": round(trainer.seconds, 1),
    }
    write_tensors(tensors, folder / FILE, {"diptych": json.dumps(about, sort_keys=True)})
    results.write_result(folder / ABOUT, about)
    return about


def prepare(recipe: Recipe, run_dir: Path, progress: Progress | None = None) -> TrainingJob:
    """Prepares the training: opens teacher and encoder, and encodes targets, references and captions."""
    from PIL import Image

    from diptych.stages.paint import panel_size
    from diptych.train import cache
    from diptych.train.captions import embed_captions
    from diptych.train.metrics import report
    from diptych.train.schedule import Bucket, split

    recipe = tasks.resolve(recipe)
    settings, folder = recipe.evaluate.adapter, run_folder(run_dir)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    pipe, precision = common.frozen_teacher(recipe)
    encoder = Encoder.load(settings.encoder, recipe.device)
    size = panel_size(pipe, recipe.paint.panel_size)
    canvas = common.canvas(pipe, size, size)
    overrides = {"steps": settings.steps, "learning_rate": settings.learning_rate}
    shift = common.shift(pipe, canvas, recipe.distill.shift)
    options = recipe.distill.model_copy(
        update={
            "seed": recipe.training_seed,
            "precision": precision,
            "shift": shift,
            "mode": "full",
            "quantize": "none",
            "left_weight": 0.0,
            "right_weight": 1.0,
            "init": None,
            "preference": None,
            "sample_every": 0,
            **{key: value for key, value in overrides.items() if value is not None},
        }
    )

    def encode(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = ((reference + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        embeds = encoder.embed([Image.fromarray(each) for each in levels])
        return common.encode_pixels(pipe, target).cpu(), embeds[:, None]

    def preparing(done: int, total: int, what: str) -> None:
        report(progress, 0, options.steps, f"{what} {done}/{total}")

    material = training_data(recipe, run_dir)
    key = f"{KEY} {_teacher(recipe)} {encoder.vision.fingerprint}"
    files = [
        cache.build(each, folder / "latents", encode, [canvas], f"{key} {each.fingerprint()}", preparing)
        for each in material.sets
    ]
    latents = cache.Latents(*files)
    captions = [sample.text(False) for sample in latents.samples]
    captions += [sample.instruction for sample in latents.samples if options.instructions and sample.instruction]
    table = embed_captions(lambda texts: common.encode_text(pipe, texts), captions, preparing)
    _, embeds = latents.gather([0])
    attach(pipe, start(pipe, embeds.shape[-1], seed_of(recipe.training_seed, KEY, "start")))
    train_rows, validation_rows = split(latents.samples, options.validation_pairs)
    return TrainingJob(
        pipe=pipe,
        buckets=[Bucket(canvas, shift)],
        options=options,
        device=pipe.device,
        latents=latents,
        text=table,
        train_rows=train_rows,
        validation_rows=validation_rows,
        folder=folder / "training",
        material=material,
        made_from={"base": made_by(recipe, run_dir)},
        name=f"{recipe.name} {KEY}",
    )


def training_data(recipe: Recipe, run_dir: Path) -> Material:
    """The training data of the run's student, which the adapter uses too. UserError if the run has no pairs."""
    if not recipe.draws_pairs():
        return Material.open(recipe, None)
    data = Dataset(run_dir / "pairs", schema(COLUMNS["pairs"]))
    if data.manifest is None:
        raise UserError(
            "run_incomplete",
            f"{run_dir} has no pairs to train an adapter on. Run `diptych curate {run_dir}/recipe.yaml "
            f"--out {run_dir}`, or set evaluate.adapter.path to a trained adapter.",
        )
    return Material.open(recipe, data)


def made_by(recipe: Recipe, run_dir: Path) -> str:
    """Fingerprint of an adapter's weights: sha256 of teacher, encoder, pairs and settings."""
    from diptych.train.checkpoint import APART, HARMLESS

    recipe = tasks.resolve(recipe)
    settings = recipe.evaluate.adapter
    skip = {*HARMLESS, *APART, "seed", "rank", "lora_targets", "left_weight", "right_weight", "init", "preference"}
    skip |= {"mode", "conditioning", "positions", "reference_attention"}
    training = recipe.distill.model_dump(mode="json", exclude=skip)
    pairs = training_data(recipe, run_dir).fingerprint()
    encoder = models.fingerprint(models.resolve(settings.encoder, "curator"))
    parts = [VERSION, training, settings.steps, settings.learning_rate, recipe.training_seed, pairs, encoder]
    parts += [_teacher(recipe), recipe.paint.panel_size, recipe.device, recipe.threads]
    return sha256_json(parts)


def _teacher(recipe: Recipe) -> str:
    return models.fingerprint(models.resolve(recipe.teacher, "teacher"))
