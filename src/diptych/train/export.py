"""The student's folder as a training leaves it: weights and model card.

In mode full the weights are a diffusers pipeline; in mode lora, a control-LoRA file. Stock diffusers takes a trained
input layer only as an adapter, so that file holds its change as one of rank 2C: A is the identity, B the change of the
weight, B's bias the change of the bias. That is exact; but two products in the place of one round otherwise, so
pictures drawn while training lasts are drawn in that form too (`as_loaded`). A student of tokens conditioning has no
trained input layer: its file is an ordinary LoRA of the teacher.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import yaml

from diptych.data.records import in_force
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.student.settings import OWN_CLASS
from diptych.train import parts
from diptych.train.parts import ADAPTER, INPUT_LAYER, Trained
from diptych.train.prepare import TRAINING, Material, start, student_settings
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.documents import parse_json
from diptych.utils.machine import VERSION

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill, Recipe
    from diptych.student.pipeline import DiptychPipeline

ORIGIN = "origin.json"
INDEX = "model_index.json"
CONDITIONING = {
    "diptych": "the reference is the left panel of the canvas",
    "tokens": "the reference's clean tokens are appended to the target's",
    "channel": "the reference is joined to the target panel, channel by channel",
}
COLUMNS = {"zeros": "zeros", "teacher": "the teacher's own for a picture"}


def write(
    pipe: DiptychPipeline,
    trained: Trained,
    ema: Any | None,
    recipe: Recipe,
    provenance: dict[str, Any],
    card: str,
    out: Path,
) -> None:
    """The student folder, with the averaged weights if there is an average; whole or not at all."""
    from safetensors import SafetensorError

    from diptych.student.settings import KEY

    temporary = out / TRAINING / ".export"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with parts.averaged(ema, trained):
            if recipe.distill.mode == "full":
                from diptych import student

                with quiet_bars():
                    student.save(pipe, temporary)
            else:
                registered = {"config": {KEY: pipe.settings.values()}}
                save_lora(pipe.transformer, trained, recipe.distill.rank, temporary, provenance | registered)
        (temporary / "README.md").write_text(card, "utf8")
        (temporary / ORIGIN).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", "utf8")
        _publish(temporary, out)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write the student to {out}: {reason}; its last checkpoint is whole: "
            "make room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def assembled(recipe: Recipe, options: Distill, weights: dict[str, torch.Tensor]) -> tuple[DiptychPipeline, Trained]:
    """A student on the CPU with these trained weights: what several processes held in parts."""
    cpu = torch.device("cpu")
    pipe = start(recipe, cpu)
    trained = parts.select(pipe.transformer, options, "float32", cpu)
    trained.put(weights)
    return pipe, trained


def _publish(written: Path, out: Path) -> None:
    """Moves a whole student into `out`, beside `training/`; the index that makes it one comes last."""
    (out / INDEX).unlink(missing_ok=True)
    for path in sorted(written.iterdir(), key=lambda p: p.name == INDEX):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)


# The LoRA file


def save_lora(transformer: Any, trained: Trained, rank: int, folder: Path, metadata: dict[str, Any]) -> Path:
    """The LoRA of the current weights as `pytorch_lora_weights.safetensors`, with its adapter metadata.

    Stock `FluxControlPipeline.from_pretrained(teacher).load_lora_weights(folder)` widens the teacher itself and draws
    what the student draws; for a student that is not widened, `FluxKontextPipeline` does. `metadata` goes into the
    file's header, as JSON under `diptych`.
    """
    from diffusers import FluxControlPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import save_file

    adapter = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    state: dict[str, Any] = {key: value.detach().float().cpu() for key, value in adapter.items() if ".lora_" in key}
    layers = sorted({key.partition(".lora_")[0] for key in state})
    whole: dict[str, Any] = {}
    if trained.start:
        # One file has biases on all adapters or on none (peft's `lora_bias` is one switch): the others' are zero.
        for layer in layers:
            state[f"{layer}.lora_B.bias"] = torch.zeros(state[f"{layer}.lora_B.weight"].shape[0])
        change = _change(transformer.get_submodule(INPUT_LAYER), trained)
        columns = change["weight"].shape[1]
        state[f"{INPUT_LAYER}.lora_A.weight"] = torch.eye(columns)
        state[f"{INPUT_LAYER}.lora_B.weight"] = change["weight"].cpu()
        state[f"{INPUT_LAYER}.lora_B.bias"] = change["bias"].cpu()
        layers.append(INPUT_LAYER)
        whole = {"rank_pattern": {INPUT_LAYER: columns}, "alpha_pattern": {INPUT_LAYER: columns}, "lora_bias": True}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, **whole).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    FluxControlPipeline.save_lora_weights(
        folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=config
    )
    path = folder / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), "diptych": json.dumps(metadata, sort_keys=True)}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    _sort_header(path)
    return path


def _sort_header(path: Path) -> None:
    """safetensors writes its metadata keys in a random order; sorted, the same weights are the same file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it start at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@contextmanager
def as_loaded(transformer: Any, trained: Trained) -> Iterator[None]:
    """The transformer with its adapters as `save_lora`'s file gives them to a pipeline, all in the base's precision.

    Where every weight is trained there is nothing to change.
    """
    if not trained.adapters:
        yield
        return
    layer = transformer.get_submodule(INPUT_LAYER)
    dtype = next(p.dtype for p in transformer.parameters() if not p.requires_grad and p.is_floating_point())
    learnt = [parameter.data for parameter in trained.parameters]
    if trained.start:
        transformer.set_submodule(INPUT_LAYER, _Beside(trained.start, _change(layer, trained), dtype))
    try:
        for parameter in trained.parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(trained.parameters, learnt, strict=True):
            parameter.data = data
        transformer.set_submodule(INPUT_LAYER, layer)


class _Beside(torch.nn.Module):
    """The input layer as it was, and its change as an adapter beside it."""

    def __init__(self, start: dict[str, torch.Tensor], change: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.start = {name: tensor.to(dtype) for name, tensor in start.items()}
        self.change = {name: tensor.to(dtype) for name, tensor in change.items()}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, **self.start) + F.linear(tokens, **self.change)


def _change(layer: torch.nn.Module, trained: Trained) -> dict[str, torch.Tensor]:
    """What training has added to the input layer's weight and bias, float32."""
    return {name: (p.detach() - trained.start[name]).float() for name, p in layer.named_parameters()}


# The model card


def model_card(recipe: Recipe, numbers: dict[str, Any], material: Material) -> str:
    """README.md with the hub's front matter. `numbers` is `distill.summary`'s."""
    lora = recipe.distill.mode == "lora"
    licence, terms = models.licence_of(recipe.teacher, models.resolve(recipe.teacher, "teacher"))
    front = {
        **licence,
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "base_model": recipe.teacher,
        "base_model_relation": "adapter" if lora else "finetune",
        "tags": ["diptych", "diffusion-self-distillation", "flux", *(["lora"] if lora else [])],
    }
    if "/" not in recipe.teacher or Path(recipe.teacher).exists():
        # The hub would look a local path up and refuse the card.
        del front["base_model"], front["base_model_relation"]
    validation = numbers["validation"]
    distill = recipe.distill
    started = "in that student" if distill.init else COLUMNS[distill.condition_init]
    entry = {"its columns began as": started}
    layer = ", and the input layer"
    if distill.conditioning == "tokens":
        entry, layer = (
            {"positions, attention of the reference": f"{distill.positions}, {distill.reference_attention}"},
            "",
        )
    rows = {
        "task": recipe.task,
        "base": recipe.distill.init or recipe.teacher,
        "conditioning": CONDITIONING[recipe.distill.conditioning],
        **entry,
        "mode": f"LoRA, rank {recipe.distill.rank}{layer}" if lora else "all weights",
        "parameters trained": f"{numbers['parameters']:,}",
        "pairs trained on / held out": f"{numbers['pairs']:,} / {numbers['validation_pairs']:,}",
        "steps × batch": f"{numbers['steps']:,} × {recipe.distill.batch_size} ({numbers['epochs']:g} epochs)",
        "weights of step": f"{numbers['exported']:,}",
        "learning rate": f"{recipe.distill.learning_rate:g}",
        "precision": numbers["precision"],
        **_losses(numbers["loss"], distill.conditioning),
        "validation loss": "none held out" if validation is None else f"{validation['loss']:.4f}",
        "seed": recipe.training_seed,
        "seconds of training": f"{numbers['seconds']:,.0f}",
        "diptych": VERSION,
    }
    stock = student_settings(recipe, None).pipeline_class
    use = 'Student.load(FOLDER).generate(reference, "…", seed=0)'
    if lora and stock == OWN_CLASS:
        use = f'Student.load(FOLDER, base="{recipe.teacher}").generate(reference, "…", seed=0)'
    elif lora:
        use = f'pipe = {stock}.from_pretrained("{recipe.teacher}"); pipe.load_lora_weights(FOLDER)'
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {recipe.name}",
            "",
            "A Diffusion Self-Distillation student (arXiv 2411.18616): a text-to-image model that also takes a "
            "reference image. It was trained by diptych"
            f"{' on pairs that its own teacher drew' if list(material.sets) == [material.own] else ''}.",
            "",
            f"`{use}`",
            "",
            "## Training",
            "",
            *_table(rows),
            "",
            "## Data",
            "",
            *_data(recipe, material),
            "",
            "## Licence",
            "",
            terms,
            "",
        ]
    )


def _losses(loss: dict[str, float], conditioning: str) -> dict[str, str]:
    if conditioning == "tokens":
        return {"loss": f"{loss['right']:.4f}"}
    return {"loss, left / right panel": f"{loss['left']:.4f} / {loss['right']:.4f}"}


def _data(recipe: Recipe, material: Material) -> list[str]:
    """What it was trained on, and how the run's own pairs were chosen."""
    lines: list[str] = []
    own = material.own
    if own is not None and own in material.sets:
        tests, limits = in_force(recipe)
        chosen = f"; a pair was kept if {_and(tests)}" if tests else ""
        kept = curation(own) if tests else {}
        lines += [
            f"Drawn by the teacher itself{chosen}.",
            "",
            *_table({"pairs": f"{len(own):,}", **limits, **kept}),
            "",
        ]
    data = zip(material.sets, material.weights, strict=True)
    others = {each.url: f"{len(each):,} pairs, weight {weight:g}" for each, weight in data if each is not own}
    if others:
        lines += ["Made elsewhere; look up their licences before you publish.", "", *_table(others), ""]
    return lines[:-1]


def _and(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def curation(pairs: Dataset) -> dict[str, Any]:
    """How many candidates curation saw and which share it kept, where the run's folder still has them."""
    if "://" in pairs.url:
        return {}
    candidates = Dataset(Path(pairs.url).parent / "candidates")
    manifest = candidates.manifest
    if not manifest or not manifest["rows"]:
        return {}
    return {"candidates": f"{manifest['rows']:,}", "kept": f"{len(pairs) / manifest['rows']:.1%}"}


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
