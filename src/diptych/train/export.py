"""The student's folder that a training writes: weights and model card.

In mode full the weights are a diffusers pipeline, in mode lora a control-LoRA file. Stock diffusers loads a trained
input layer only as an adapter, so that file has its change as an adapter of rank 2C: A is the identity, B the change of
the weight, and B's bias the change of the bias. That is exact, but two products round differently than one. Images
generated during training therefore use that form too (`as_loaded`). A student with `conditioning: tokens` has no
trained input layer: its file is an ordinary LoRA of the teacher.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import yaml

from diptych.data.store import Dataset
from diptych.data.verdicts import in_force
from diptych.errors import UserError
from diptych.student.families import family_in
from diptych.student.families.flux1 import FLUX1
from diptych.student.settings import OWN_CLASS
from diptych.student.weights.files import HEADER_KEY
from diptych.student.weights.lora_file import HEADER, RELEASED_LORA
from diptych.student.weights.tensors import held, write_safetensors
from diptych.train import parts
from diptych.train.metrics import reference_warning
from diptych.train.parts import ADAPTER, Trained
from diptych.train.prepare import TRAINING, Material, start, student_settings
from diptych.utils import licenses, models
from diptych.utils.console import quiet_bars
from diptych.utils.io import publish
from diptych.utils.machine import VERSION
from diptych.utils.opening import class_of

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill, Recipe
    from diptych.student.reference_pipeline import ReferencePipeline

ORIGIN = "origin.json"
INDEX = "model_index.json"
CONDITIONING = {
    "diptych": "the reference is the left panel of the canvas",
    "tokens": "the reference's clean tokens are appended to the target's",
    "channel": "the reference is joined to the target panel, channel by channel",
}
COLUMNS = {"zeros": "zeros", "teacher": "the teacher's columns for an image"}


def write(
    pipe: ReferencePipeline,
    trained: Trained,
    ema: Any | None,
    recipe: Recipe,
    provenance: dict[str, Any],
    card: str,
    out: Path,
) -> None:
    """Writes the student folder, with the averaged weights if there is an average, completely or not at all."""
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
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            "path_unwritable",
            f"Cannot write the student to {out}: {reason}. The last checkpoint is complete; free some space and run "
            "the same command again.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def assembled(recipe: Recipe, options: Distill, weights: dict[str, torch.Tensor]) -> tuple[ReferencePipeline, Trained]:
    """A student on the CPU with these trained weights, which were sharded over several processes."""
    cpu = torch.device("cpu")
    pipe = start(recipe, cpu)
    trained = parts.select(pipe.transformer, options, "float32", cpu)
    trained.put(weights)
    return pipe, trained


def _publish(written: Path, out: Path) -> None:
    """Moves a complete student into `out`, beside `training/`. Its index, which makes it a pipeline, comes last."""
    (out / INDEX).unlink(missing_ok=True)
    for path in sorted(written.iterdir(), key=lambda p: p.name == INDEX):
        with publish(out / path.name) as partial:
            path.rename(partial)


# The LoRA file


def save_lora(transformer: Any, trained: Trained, rank: int, folder: Path, metadata: dict[str, Any]) -> Path:
    """Writes the LoRA of the current weights, `pytorch_lora_weights.safetensors`, with its adapter metadata.

    Stock `FluxControlPipeline.from_pretrained(teacher).load_lora_weights(folder)` widens the teacher and generates what
    the student generates; for a student that is not widened, `FluxKontextPipeline` does. `metadata` goes into the
    file's header, as JSON under `diptych`.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    adapter = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    state: dict[str, Any] = {key: value.detach().float().cpu() for key, value in adapter.items() if ".lora_" in key}
    layers = sorted({key.partition(".lora_")[0] for key in state})
    more: dict[str, Any] = {}
    if trained.start:
        # All adapters of a file have a bias, or none has (peft's `lora_bias` is one switch). The others' are zero.
        for layer in layers:
            state[f"{layer}.lora_B.bias"] = torch.zeros(state[f"{layer}.lora_B.weight"].shape[0])
        layer = trained.input_layer
        change = _change(transformer.get_submodule(layer), trained)
        columns = change["weight"].shape[1]
        state[f"{layer}.lora_A.weight"] = torch.eye(columns)
        state[f"{layer}.lora_B.weight"] = change["weight"].cpu()
        state[f"{layer}.lora_B.bias"] = change["bias"].cpu()
        layers.append(layer)
        more = {"rank_pattern": {layer: columns}, "alpha_pattern": {layer: columns}, "lora_bias": True}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, **more).to_dict()
    # Exactly as diffusers' `save_lora_weights` writes it, but with sorted keys, so that equal weights give equal bytes.
    plain = {f"transformer.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    header = {HEADER: json.dumps(plain, indent=2, sort_keys=True), HEADER_KEY: json.dumps(metadata, sort_keys=True)}
    header["format"] = "pt"
    path = folder / RELEASED_LORA
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {f"transformer.{key}": held(tensor) for key, tensor in state.items()}, header)
    return path


@contextmanager
def as_loaded(transformer: Any, trained: Trained) -> Iterator[None]:
    """A context in which the transformer has its adapters in the form of `save_lora`'s file, all in the base's
    precision. In mode full, nothing changes."""
    if not trained.adapters:
        yield
        return
    layer = transformer.get_submodule(trained.input_layer)
    dtype = next(p.dtype for p in transformer.parameters() if not p.requires_grad and p.is_floating_point())
    float32 = [parameter.data for parameter in trained.parameters]
    if trained.start:
        transformer.set_submodule(trained.input_layer, _Beside(trained.start, _change(layer, trained), dtype))
    try:
        for parameter in trained.parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(trained.parameters, float32, strict=True):
            parameter.data = data
        transformer.set_submodule(trained.input_layer, layer)


class _Beside(torch.nn.Module):
    """The input layer before training, and its change as an adapter beside it."""

    def __init__(self, start: dict[str, torch.Tensor], change: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.start = {name: tensor.to(dtype) for name, tensor in start.items()}
        self.change = {name: tensor.to(dtype) for name, tensor in change.items()}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, **self.start) + F.linear(tokens, **self.change)


def _change(layer: torch.nn.Module, trained: Trained) -> dict[str, torch.Tensor]:
    """The change of the input layer's weight and bias by training, float32."""
    return {name: (p.detach() - trained.start[name]).float() for name, p in layer.named_parameters()}


# The model card


def model_card(recipe: Recipe, numbers: dict[str, Any], material: Material) -> str:
    """README.md with the hub's front matter. `numbers` is `distill.summary`'s."""
    lora = recipe.distill.mode == "lora"
    folder = models.resolve(recipe.teacher, "teacher")
    family = family_in(folder)
    license, terms = licenses.inherited(recipe.teacher, folder)
    tag = "flux" if family is FLUX1 else family.name.replace("_", "-")
    front = {
        **license,
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "base_model": recipe.teacher,
        "base_model_relation": "adapter" if lora else "finetune",
        "tags": ["diptych", "diffusion-self-distillation", tag, *(["lora"] if lora else [])],
    }
    if "/" not in recipe.teacher or Path(recipe.teacher).exists():
        # The hub would look up a local path and reject the card.
        del front["base_model"], front["base_model_relation"]
    validation = numbers["validation"]
    distill = recipe.distill
    if distill.conditioning == "tokens":
        entry = {"positions, attention of the reference": f"{distill.positions}, {distill.reference_attention}"}
        layer = ""
    else:
        entry = {"initial columns": "those of that student" if distill.init else COLUMNS[distill.condition_init]}
        layer = ", and the input layer"
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
        **_influence(validation),
        "seed": recipe.training_seed,
        "seconds of training": f"{numbers['seconds']:,.0f}",
        "diptych": VERSION,
    }
    stock = student_settings(recipe, None).pipeline_class
    if family is not FLUX1:  # the pipelines of FLUX.2 take references, those of other families do not
        stock = class_of(folder) if family.editor and distill.conditioning == "tokens" else OWN_CLASS
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
            f"{' on pairs that its teacher generated' if list(material.sets) == [material.own] else ''}.",
            "",
            f"`{use}`",
            "",
            "## Training",
            "",
            *_table(rows),
            "",
            *([warning, ""] if (warning := reference_warning(validation)) else []),
            "## Data",
            "",
            *_data(recipe, material),
            "",
            "## License",
            "",
            terms,
            "",
        ]
    )


def _losses(loss: dict[str, float], conditioning: str) -> dict[str, str]:
    if conditioning == "tokens":
        return {"loss": f"{loss['right']:.4f}"}
    return {"loss, left / right panel": f"{loss['left']:.4f} / {loss['right']:.4f}"}


def _influence(validation: dict[str, Any] | None) -> dict[str, str]:
    if validation is None or "reference_influence" not in validation:
        return {}
    return {"loss with swapped references": f"{validation['reference_influence']:+.1%}"}


def _data(recipe: Recipe, material: Material) -> list[str]:
    """The card's section on the training data, and on how the run's pairs were curated."""
    lines: list[str] = []
    own = material.own
    if own is not None and own in material.sets:
        tests, limits = in_force(recipe)
        *first, last = tests or [""]
        accepted = f"; a pair was accepted if {', '.join(first)}{' and ' if first else ''}{last}" if tests else ""
        lines += [
            f"Generated by the teacher{accepted}.",
            "",
            *_table({"pairs": f"{len(own):,}", **limits, **(_curation(own) if tests else {})}),
            "",
        ]
    data = zip(material.sets, material.weights, strict=True)
    others = {each.url: f"{len(each):,} pairs, weight {weight:g}" for each, weight in data if each is not own}
    if others:
        lines += ["Made elsewhere. Check their licenses before you publish the student.", "", *_table(others), ""]
    return lines[:-1]


def _curation(pairs: Dataset) -> dict[str, Any]:
    """The number of candidates and the share that curation accepted, if the run's folder has them."""
    if "://" in pairs.url:
        return {}
    manifest = Dataset(Path(pairs.url).parent / "candidates").manifest
    if not manifest or not manifest["rows"]:
        return {}
    return {"candidates": f"{manifest['rows']:,}", "accepted": f"{len(pairs) / manifest['rows']:.1%}"}


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
