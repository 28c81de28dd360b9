"""The memory that a plan counts for each phase of a training is what lives then, on FLUX.1-dev's full-size shapes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes, fake, live

from diptych.recipe import load
from diptych.recipe.schema import Distill
from diptych.run.plan import make
from diptych.run.plan.sizes import known
from diptych.student.canvas import Canvas
from diptych.student.families import shapes
from diptych.train import canvases_at_once, captions_at_once, parts
from diptych.train.export import as_loaded
from diptych.train.objective import Batch, panel_losses
from diptych.utils.machine import computing

DEV = known()["black-forest-labs/FLUX.1-dev"]
CPU, META = torch.device("cpu"), torch.device("meta")
CANVAS = Canvas(512, 512, 8)
SHALLOW, DEEP = (1, 2), (19, 38)  # double and single blocks; each is of full size
CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 128},
    "lora of every layer, nothing recomputed": {
        "rank": 512,
        "lora_targets": "attention+mlp",
        "micro_batch": 1,
        "gradient_checkpointing": False,
    },
    "lora in float32": {"rank": 16, "precision": "float32", "micro_batch": 1},
    "full": {"mode": "full", "ema": 0.99},
    "full, nothing recomputed": {"mode": "full", "micro_batch": 1, "gradient_checkpointing": False},
}


def planned(folder: Path, blocks: tuple[int, int], keys: dict[str, Any]) -> tuple[dict[str, int], Distill]:
    """The plan's bytes of each phase for FLUX.1-dev with so many blocks, few enough captions to be encoded once."""
    config = {**DEV["transformer"], "num_layers": blocks[0], "num_single_layers": blocks[1]}
    for part, values in {**DEV, "transformer": config}.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(values))
    sets = [f"distill.{key}={json.dumps(value)}" for key, value in keys.items()]
    recipe = load("flux-subject", [f"teacher={folder}", "write.count=500", "distill.batch_size=8", *sets])
    return make(recipe, run_dir=folder)["stages"]["distill"]["memory_phases"], recipe.distill


def batch(rows: int, number: torch.dtype) -> Batch:
    clean, condition, noise = (torch.empty(rows, CANVAS.tokens, 64) for _ in range(3))
    embeds, pooled = (torch.empty(rows, *size, dtype=number) for size in ((512, 4096), (768,)))
    return Batch(clean, condition, noise, torch.empty(rows), embeds, pooled, canvas=CANVAS)


def losses(transformer: Any, part: Batch, precision: str) -> torch.Tensor:
    with computing(precision, CPU):
        left, right = panel_losses(transformer, part, 1.0)
    return left.mean() + right.mean()


def build(options: Distill, blocks: tuple[int, int]) -> dict[str, Any]:
    """FLUX.1-dev's parts on the meta device, the transformer as `parts.select` readies it for a GPU."""
    config = {**DEV["transformer"], "num_layers": blocks[0], "num_single_layers": blocks[1]}
    config |= {"in_channels": 128, "out_channels": 64}
    classes = {"transformer": ("diffusers", "FluxTransformer2DModel", config)}
    classes |= {part: (library, name, dict(DEV[part])) for part, (library, name) in CLASSES.items()}
    found = {
        part: shapes.meta(library, name, {k: v for k, v in values.items() if not k.startswith("_")}).to(torch.bfloat16)
        for part, (library, name, values) in classes.items()
    }
    parts.select(found["transformer"], options, options.precision, META)
    return found


def measured(models: dict[str, Any], options: Distill, counted: LiveBytes, towers: bool) -> dict[str, int]:
    """Bytes of each phase at its most, by running it."""
    found: dict[str, int] = {}
    transformer, vae = models["transformer"], models["vae"]
    fake(vae)
    if towers:
        frozen = [p for name, p in transformer.named_parameters() if "lora_" not in name]
        loaded = 2 * sum(p.numel() for p in frozen)  # as it waits on the device
        clip, t5 = models.pop("text_encoder"), models.pop("text_encoder_2")
        fake(clip)
        fake(t5)
        with torch.no_grad(), counted.phase():
            tokens = torch.zeros(captions_at_once(512), 512, dtype=torch.long)
            t5(tokens), clip(tokens[:, :77])
        found["captions"] = loaded + counted.peak
        with torch.no_grad(), counted.phase():
            canvases = torch.empty(canvases_at_once(512, 1024), 3, 512, 1024, dtype=torch.bfloat16)
            vae.encode(canvases).latent_dist.mode()
        found["latents"] = loaded + counted.peak
        del tokens, canvases, clip, t5

    precision = options.precision
    fake(transformer)
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    learnt = [parameter for _, parameter in named]
    state = [torch.empty_like(p) for p in learnt for _ in range(3 if options.ema else 2)]  # AdamW's, the average
    number = torch.bfloat16  # text as its encoders give it
    rows = options.micro_batch or options.batch_size
    with counted.phase():
        for _ in range(2):  # the second one beside the gradients of the first
            losses(transformer, batch(rows, number), precision).backward()
    found["steps"] = counted.peak
    for parameter in learnt:
        parameter.grad = None
    with torch.no_grad(), counted.phase():
        losses(transformer, batch(rows, number), precision)
    found["validation"] = counted.peak

    transformer.disable_gradient_checkpointing()
    start = {n: torch.empty_like(p) for n, p in transformer.x_embedder.named_parameters()}
    trained = parts.Trained([name for name, _ in named], learnt, start if options.mode == "lora" else {})
    kind = "bfloat16" if options.mode == "full" and precision == "bfloat16" else "float32"
    with torch.no_grad(), as_loaded(transformer, trained), counted.phase():
        dtype = next(p.dtype for p in transformer.parameters())
        losses(transformer, batch(1, number).map(lambda tensor: tensor.to(dtype)), kind)
        vae.decode(torch.empty(1, 16, 64, 128, dtype=torch.bfloat16), return_dict=False)
    found["samples"] = counted.peak
    assert state
    return found


LATER = ("lora in float32", "full, nothing recomputed")  # in `make soak`


@pytest.fixture(autouse=True)
def _silent() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n in LATER else n for n in RECIPES])
def test_each_phase_is_planned_within_a_tenth(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, options = planned(tmp_path, SHALLOW, RECIPES[name])
    models = build(options, SHALLOW)
    with live(monkeypatch) as counted:
        found = measured(models, options, counted, towers=name == "lora")
    for phase, size in found.items():
        assert wanted[phase] == pytest.approx(size, rel=0.1), phase


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", RECIPES)
def test_each_phase_of_the_whole_model_is_planned_within_a_tenth(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, options = planned(tmp_path, DEEP, RECIPES[name])
    models = build(options, DEEP)
    with live(monkeypatch) as counted:
        found = measured(models, options, counted, towers=True)
    for phase, size in found.items():
        assert wanted[phase] == pytest.approx(size, rel=0.1), phase
