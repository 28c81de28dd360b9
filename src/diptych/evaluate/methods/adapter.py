"""An image-embedding adapter, the baseline `adapter`: the teacher with image tokens, trained on the run's own pairs.

IP-Adapter (arXiv 2308.06721) as diffusers has it for FLUX: an image encoder embeds the reference, `ImageProjection`
makes tokens of the embedding, and each double block attends to them beside its own attention
(`FluxIPAdapterAttnProcessor`). The teacher is frozen. What is trained is saved in the layout that
`FluxPipeline.load_ip_adapter` opens:

    pipe.load_ip_adapter("runs/first/baselines/adapter", weight_name="ip_adapter.safetensors",
                         image_encoder_pretrained_model_name_or_path="CLIP_FOLDER")

Training is `train.loop`'s, with one panel in the place of the canvas: the target is learnt, the reference is seen as
its embedding alone. The latent cache holds both, the embedding where a student's condition would be.
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
from diptych.evaluate.methods import common
from diptych.evaluate.methods.common import Base, draw, noise, open_teacher, size_of
from diptych.judges.embedding import EmbeddingJudge
from diptych.judges.vision import Vision, open_vision, refuse_missing
from diptych.recipe import tasks
from diptych.train.loop import Trainer, train
from diptych.train.objective import Batch, velocity_error
from diptych.train.parts import Trained
from diptych.train.prepare import Material, TrainingJob
from diptych.utils import models
from diptych.utils.documents import parse_json
from diptych.utils.io import sha256_json, write_atomic
from diptych.utils.machine import computing

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample
    from diptych.recipe.schema import Recipe
    from diptych.train.metrics import Progress

VERSION = 1  # raised when equal settings would give other weights
FILE, ABOUT = "ip_adapter.safetensors", "adapter.json"
TOKENS = 4  # what diffusers takes an adapter's projection for
KEY = "adapter"


class ImageAdapter(Base):
    """The teacher with the adapter on it; trained now, if it is not yet."""

    def fingerprint(self) -> str:
        refuse_scorer(self.recipe)
        settings = self.recipe.evaluate.adapter
        if settings.path is not None:
            own = models.fingerprint(adapter_file(Path(settings.path)))
            encoder = models.fingerprint(models.resolve(settings.encoder, "curator"))
            return f"{own} {encoder} {settings.scale} on {_teacher(self.recipe)}"
        return f"{made_by(self.recipe, self.context.run_dir)} {settings.scale}"

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """Trains the adapter, if the recipe names none and the run has none yet."""
        if self.recipe.evaluate.adapter.path is None:
            fit(self.recipe, self.context.run_dir)

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        pipe, encoder = self.context.opened(KEY, self._open)
        height, width = size_of(references)
        images: list[Image] = []
        # Stock FluxPipeline takes one reference a call: of several it would mix the embeddings, without a word.
        for embedding, sample, seed in zip(encoder.embed(references), samples, seeds, strict=True):
            seen = embedding.to(pipe.device, pipe.transformer.dtype)[None, None]
            images += draw(
                pipe,
                [sample.prompt],
                height,
                width,
                noise(pipe, [seed], height, width),
                self.recipe,
                ip_adapter_image_embeds=[seen],
                negative_ip_adapter_image_embeds=[torch.zeros_like(seen)],
            )
        return images

    def _open(self) -> tuple[Any, Encoder]:
        settings = self.recipe.evaluate.adapter
        folder = Path(settings.path) if settings.path is not None else place(self.context.run_dir)
        pipe = open_teacher(self.recipe)
        put(pipe, read(adapter_file(folder)))
        pipe.set_ip_adapter_scale(settings.scale)
        return pipe, Encoder.load(settings.encoder, self.recipe.device)


# ---- the image encoder


@dataclass(frozen=True)
class Encoder:
    """What sees the reference: a CLIP vision model, embedding as stock FluxPipeline would, or any embedding model."""

    vision: Vision
    judge: EmbeddingJudge | None

    @classmethod
    def load(cls, name: str, device: str) -> Encoder:
        """Opens a folder or hub name; `pocket` is the judge that curates. UserError if it is not whole."""
        folder = models.resolve(name, "curator")
        try:
            kind = parse_json((folder / "config.json").read_text("utf8")).get("model_type")
        except (OSError, ValueError) as error:
            raise UserError(f"the image encoder {folder} has no readable config.json") from error
        if kind in ("clip", "clip_vision_model"):
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
    """UsageError if the encoder is the judge that scores: it would be trained to please it."""
    encoder, scorer = recipe.evaluate.adapter.encoder, recipe.evaluate.scorer
    if models.weights(models.resolve(encoder, "curator")) & models.weights(models.resolve(scorer, "scorer")):
        raise UsageError(
            f"evaluate.adapter.encoder ({encoder}) is the judge that scores (evaluate.scorer: {scorer}); "
            "choose another encoder"
        )


# ---- the adapter in a pipeline and on disk


def start(pipe: Any, width: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter for embeddings of `width` that changes nothing yet: its values are zero. diffusers' two groups."""
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


def put(pipe: Any, state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Puts an adapter on a stock FluxPipeline, to be given embeddings. UserError if it is another model's."""
    from diptych.utils.console import quiet_bars

    try:
        with quiet_bars():
            pipe.load_ip_adapter(state, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"this adapter does not fit the teacher ({describe(error, 200)})") from error


def read(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter's file as diffusers' two groups."""
    from safetensors.torch import load_file

    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(path).items():
        group, _, key = name.partition(".")
        if group not in groups:
            raise UserError(f"{path} holds {name}, and is no IP-Adapter as diffusers saves them")
        groups[group][key] = tensor
    return groups


def collect(transformer: Any) -> dict[str, torch.Tensor]:
    """The adapter on a transformer by the names of its file, float32 on the CPU."""
    (projection,) = transformer.encoder_hid_proj.image_projection_layers
    found = {f"image_proj.{k.replace('image_embeds', 'proj')}": v for k, v in projection.state_dict().items()}
    for number, block in enumerate(transformer.transformer_blocks):
        for key, value in block.attn.processor.state_dict().items():  # to_k_ip.0.weight: of the first adapter
            side, _, part = key.split(".")
            found[f"ip_adapter.{number}.{side}.{part}"] = value
    return {key: value.detach().float().cpu().contiguous() for key, value in found.items()}


def adapter_file(folder: Path) -> Path:
    """The weights in an adapter's folder (or the file itself). UsageError if there are none."""
    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise UsageError(f"evaluate.adapter.path: {folder} holds no {FILE}")
    return path


def place(run_dir: Path) -> Path:
    """Where a run keeps its adapter."""
    return run_dir / "baselines" / KEY


# ---- training


class AdapterTrainer(Trainer):
    """The training loop, for an adapter: what is trained is the adapter, and the loss is that of one panel."""

    def select(self) -> Trained:
        """The projection and the new keys and values, in float32; the teacher stays as it is."""
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
        """0 for the left panel, which is not drawn, and the loss of the target; `batch.condition` is (B, 1, D)."""
        seen = {"ip_adapter_image_embeds": [batch.condition]}
        with computing(self.options.precision, self.job.device):
            error = velocity_error(
                model or self.transformer,
                batch.clean,
                batch.noise,
                batch.sigma,
                (batch.prompt_embeds, batch.pooled),
                self.img_ids[batch.canvas],
                self.guidance,
                attention=seen,
            )
        right = error.mean(dim=(1, 2))
        return torch.zeros_like(right), right

    def generate_samples(self) -> None:
        """None: the suite's pictures show what it can."""


def fit(recipe: Recipe, run_dir: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Trains the adapter of a run on its pairs, or goes on with it; what it is, as `adapter.json` says it.

    UserError if the run has no pairs yet. Ctrl-C saves a checkpoint, as in `distill`.
    """
    folder, wanted = place(run_dir), made_by(recipe, run_dir)
    try:
        about = parse_json((folder / ABOUT).read_text("utf8"))
        if about["made_by"] == wanted and (folder / FILE).is_file():
            return about
    except (OSError, ValueError, KeyError):
        pass
    trainer = train(prepare(recipe, run_dir, progress), progress, AdapterTrainer)
    from diptych.train import parts
    from diptych.train.cache import write_tensors

    with parts.averaged(trainer.ema, trainer.trained):
        tensors = collect(trainer.transformer)
    options = trainer.options
    about = {
        "made_by": wanted,
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
    write_atomic(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
    return about


def prepare(recipe: Recipe, run_dir: Path, progress: Progress | None = None) -> TrainingJob:
    """Everything up to the first step: teacher and encoder opened, targets, references and captions encoded."""
    from PIL import Image

    from diptych.train import cache
    from diptych.train.metrics import report
    from diptych.train.schedule import Bucket, split

    recipe = tasks.resolve(recipe)
    settings, folder = recipe.evaluate.adapter, place(run_dir)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    pipe, precision = common.frozen_teacher(recipe)
    encoder = Encoder.load(settings.encoder, recipe.device)
    size = common.panel_size(pipe, recipe.paint.panel_size)
    canvas = common.canvas(pipe, size, size)
    own = {"steps": settings.steps, "learning_rate": settings.learning_rate}
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
            **{key: value for key, value in own.items() if value is not None},
        }
    )

    def encode(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = ((reference + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        seen = encoder.embed([Image.fromarray(each) for each in levels])
        return common.encode_pixels(pipe, target).cpu(), seen[:, None]

    def preparing(done: int, total: int, what: str) -> None:
        report(progress, 0, options.steps, f"{what} {done}/{total}")

    material = learnt_from(recipe, run_dir)
    key = f"{KEY} {_teacher(recipe)} {encoder.vision.fingerprint}"
    files = [
        cache.build(each, folder / "latents", encode, [canvas], f"{key} {each.fingerprint()}", preparing)
        for each in material.sets
    ]
    latents = cache.Latents(*files)
    captions = [sample.text(False) for sample in latents.samples]
    captions += [sample.instruction for sample in latents.samples if options.instructions and sample.instruction]
    table = cache.embed_captions(lambda texts: common.encode_text(pipe, texts), captions, preparing)
    _, seen = latents.gather([0])
    put(pipe, start(pipe, seen.shape[-1], seed_of(recipe.training_seed, KEY, "start")))
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


def learnt_from(recipe: Recipe, run_dir: Path) -> Material:
    """What the run's student learns from, and the adapter too."""
    return Material.open(recipe, own_pairs(run_dir) if recipe.draws_pairs() else None)


def own_pairs(run_dir: Path) -> Dataset:
    """The run's pairs. UserError if there are none yet."""
    data = Dataset(run_dir / "pairs", schema(COLUMNS["pairs"]))
    if data.manifest is None:
        raise UserError(
            f"{run_dir} has no pairs to train an adapter on; first: diptych curate {run_dir}/recipe.yaml "
            f"--out {run_dir}, or name a trained one with evaluate.adapter.path"
        )
    return data


def made_by(recipe: Recipe, run_dir: Path) -> str:
    """What decides an adapter's weights: sha256 of teacher, encoder, pairs and settings."""
    from diptych.train.checkpoint import APART, HARMLESS

    recipe = tasks.resolve(recipe)
    settings = recipe.evaluate.adapter
    skip = {*HARMLESS, *APART, "seed", "rank", "lora_targets", "left_weight", "right_weight", "init", "preference"}
    skip |= {"mode", "conditioning", "positions", "reference_attention"}
    said = recipe.distill.model_dump(mode="json", exclude=skip)
    pairs = learnt_from(recipe, run_dir).fingerprint()
    encoder = models.fingerprint(models.resolve(settings.encoder, "curator"))
    parts = [VERSION, said, settings.steps, settings.learning_rate, recipe.training_seed, pairs, encoder]
    parts += [_teacher(recipe), recipe.paint.panel_size, recipe.device, recipe.threads]
    return sha256_json(parts)


def _teacher(recipe: Recipe) -> str:
    return models.fingerprint(models.resolve(recipe.teacher, "teacher"))
