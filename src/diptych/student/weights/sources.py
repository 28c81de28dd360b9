"""What a model's path holds: its layout, its weights as a folded student whose tensors are still on disk, and the other
parts of its pipeline.

`open_source` is the one reader of every layout. Loading reads all its tensors; converting writes them one by one. Parts
(VAE, scheduler, text encoders, tokenizers) are taken from the model's folder where it has them, else from the base.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diptych import recipe as recipes
from diptych.errors import UsageError, UserError, describe
from diptych.student import settings
from diptych.student.settings import TRANSFORMER_FOLDERS, Settings
from diptych.student.weights import files, single_file
from diptych.student.weights.fold import INPUT, Folded, some, stock_config
from diptych.student.weights.lora_file import RELEASED_LORA, SUFFIXES, account, is_lora
from diptych.student.weights.tensors import Stored, held, open_safetensors
from diptych.utils import models
from diptych.utils.opening import INDEX, refuse_code, variant_of

# part: (library, class) unless the folder's model_index.json names another; text parts may be absent.
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}
NEEDED = ("scheduler", "vae")
# What the text encoders' part of an all-in-one file holds beside what FLUX uses of them.
_UNUSED = re.compile(r"^(transformer\.)?(logit_scale|text_projection(\.weight)?|spiece_model)$|position_ids$")
WEIGHTS = {"diffusers": files.WEIGHTS_FILE, "transformers": "model.safetensors"}


@dataclass(frozen=True)
class Source:
    """A student's weights as they lie on disk."""

    layout: str  # a layout of `directions.yaml`
    folded: Folded  # `state_dict` holds `Stored`s; of a control-LoRA, the teacher's, widened. `config` has its settings
    lora: Path | None  # the LoRA file that belongs to it
    place: Path  # the folder or file that holds the transformer's weights
    parts: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)  # of an all-in-one file: what else it holds
    scaled: bool = False  # the weights were in scaled fp8, and are dequantized

    @property
    def tensors(self) -> dict[str, Stored]:
        return self.folded.state_dict


def resolve(model: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """(path, base's folder) of a model by name; a built-in model brings its own base, and a run's LoRA its teacher."""
    name = str(model)
    path = models.resolve(name, "student")
    if base is None and (run := models.run_of(name)) is not None and lora_alone(path) is not None:
        base = recipes.load(run / "recipe.yaml").teacher
    if base is None:
        return path, models.resolve(name, "teacher") if name in models.BUILT_IN else None
    base_folder = models.resolve(str(base), "teacher")
    if not base_folder.is_dir():
        raise UsageError(
            f"the base {base} is a file; give the teacher's folder: it also brings the VAE and the scheduler"
        )
    return path, base_folder


def open_source(model: Path, base: Path | None, dtype: torch.dtype | None = None) -> Source:
    """The student at `model`, its tensors cast to `dtype` when read; UserError or UsageError if there is none.

    `base` is the teacher's folder: needed by a control-LoRA, and asked for what a single file cannot say of itself.
    """
    layout, place, lora = locate(model, base)
    found = read_settings(model, base)
    parts: dict[str, dict[str, Stored]] = {}
    scaled = False
    if layout in ("file", "gguf"):
        folded, parts, scaled = single_file.open_file(place, base, dtype)
    elif layout == "control-lora":
        assert base is not None and lora is not None
        folded = _beneath(place, lora, dtype, found)
    else:
        state = {key: tensor.to(dtype) for key, tensor in files.open_state(place).items()}
        layout = "released" if files.is_released(state) else "folded"
        folded = files.fold_stored(state, files.read_config(place), files.read_split(place), str(place))
    if found != Settings() or settings.KEY in folded.config:  # weights that say nothing stay as they are
        folded = replace(folded, config={**folded.config, settings.KEY: found.values()})
    return Source(layout, folded, lora, place, parts, scaled)


def read_settings(model: Path, base: Path | None) -> Settings:
    """What the student at `model` needs to be run right, without its weights: what they say of themselves, else what
    lies beside them, else, for a model that says nothing, what its base says. UserError if that is not valid."""
    layout, place, lora = "control-lora", model, lora_alone(model)
    if lora is None:
        layout, place, lora = locate(model, base)
    place = lora if layout == "control-lora" and lora is not None else place
    said: dict[str, Any] = {}
    if layout == "folded":
        said = files.read_config(place)
    elif layout != "gguf":
        said = files.read_header(open_safetensors(place)[1])[0]
    places = [model, *([base] if base is not None else [])]
    return settings.resolve(said.get(settings.KEY), places, f"'{settings.KEY}' in {place}")


def locate(model: Path, base: Path | None) -> tuple[str, Path, Path | None]:
    """(layout, where the transformer's weights lie, the LoRA that belongs to them), by looking only at names and keys.

    `folded` stands for `released` too: which of the two it is, the weights say.
    """
    if model.is_file():
        if model.suffix == ".gguf":
            return "gguf", model, None
        if model.suffix not in SUFFIXES:
            raise UsageError(
                f"{model} is neither a .safetensors nor a .gguf file; give one, or the folder of a student"
            )
        if not is_lora(open_safetensors(model)[0]):
            return "file", model, None
        return "control-lora", _teacher(model, base), model
    own = model / RELEASED_LORA
    lora = own if own.is_file() else None
    for name in TRANSFORMER_FOLDERS:
        if (model / name).is_dir():
            return "folded", model / name, lora
    if lora is not None and (base is not None or not (model / "config.json").is_file()):
        return "control-lora", _teacher(model, base), lora
    if (model / "config.json").is_file():
        return "folded", model, lora
    single = next(iter(sorted(path for kind in (".gguf", *SUFFIXES) for path in model.glob(f"*{kind}"))), None)
    instead = "is the download complete?" if single is None else f"give its file, {single}"
    raise UserError(f"{model} holds no transformer/ folder, so it is no student; {instead}")


def lora_alone(model: Path) -> Path | None:
    """The LoRA file that a path is, or that is all the weights a folder has; None if there is more, or none."""
    if model.is_file():
        return model if model.suffix in SUFFIXES and is_lora(open_safetensors(model)[0]) else None
    others = [*TRANSFORMER_FOLDERS, "config.json"]
    found = model / RELEASED_LORA
    return found if found.is_file() and not any((model / name).exists() for name in others) else None


def teacher_state(base: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(tensors, config) of a teacher's transformer; UserError if it is no teacher."""
    place = transformer_folder(base)
    config = stock_config(files.read_config(place))
    if config["in_channels"] != (config.get("out_channels") or config["in_channels"]):
        raise UserError(f"{place} is widened already; the base must be the text-to-image teacher")
    return files.open_state(place), config


def transformer_folder(folder: Path) -> Path:
    """The folder that holds a pipeline's transformer: `transformer/`, `transformers/`, or `folder` itself."""
    for name in TRANSFORMER_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    if (folder / "config.json").is_file():
        return folder
    raise UserError(f"{folder} holds no transformer/ folder; is the download complete?")


def _teacher(model: Path, base: Path | None) -> Path:
    if base is None:
        raise UsageError(
            f"{model} is a LoRA, which needs the teacher that it goes on: give the teacher's folder as base"
        )
    return transformer_folder(base)


def _beneath(place: Path, lora: Path, dtype: torch.dtype | None, found: Settings) -> Folded:
    """The teacher's weights, for a LoRA with these settings: as they are if its reference comes as tokens, else with
    zero columns for the condition. UserError if the LoRA would never use them."""
    if found.conditioning == "tokens":
        state, config = teacher_state(place)
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
        return files.fold_stored(state, {**config, settings.KEY: found.values()}, None, str(place))
    if not any(f"transformer.{INPUT}" in layer.targets for layer in account(open_safetensors(lora)[0], lora)):
        raise UserError(f"{lora} does not adapt {INPUT}, so a student made from it would never see the reference")
    state, config = teacher_state(place)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    weight = state[f"{INPUT}.weight"].read()
    state[f"{INPUT}.weight"] = held(torch.cat([weight, torch.zeros_like(weight)], dim=1))
    channels = config["in_channels"]
    wide = {**config, "in_channels": 2 * channels, "out_channels": channels}
    return files.fold_stored(state, wide, None, str(place))


def find_parts(model: Path, base: Path | None) -> dict[str, Path]:
    """The folder of each part that the model's folder or the base's has."""
    roots = [root for root in (model, base) if root is not None]
    places = {part: next((r / part for r in roots if (r / part).is_dir()), None) for part in PARTS}
    return {part: place for part, place in places.items() if place is not None}


def check_parts(places: Mapping[str, Path], model: Path, base: Path | None) -> None:
    """UserError naming the needed parts that no folder has, or a base that is no FLUX pipeline."""
    if base is not None and (base / INDEX).is_file():
        name = str(files.read_json(base / INDEX).get("_class_name", ""))
        if name and (not name.startswith(("Flux", "DiptychPipeline")) or name.startswith("Flux2")):
            raise UserError(
                f"{base} is of another family: a {name}, not a FLUX.1 pipeline; "
                "give the base that this student was trained from"
            )
    if absent := [part for part in NEEDED if part not in places]:
        if base is None:
            raise UsageError(
                f"{model} is not a whole pipeline (it lacks {', '.join(absent)}); give the teacher's folder as base"
            )
        raise UserError(f"neither {model} nor the base {base} has {', '.join(absent)}; is the base complete?")
    for encoder in ("text_encoder", "text_encoder_2"):
        if encoder in places and (tokenizer := encoder.replace("text_encoder", "tokenizer")) not in places:
            raise UserError(
                f"{places[encoder].parent} has {encoder} and no {tokenizer}, which reads text for it; "
                "is the folder complete?"
            )


def look_at(part: str, place: Path) -> None:
    """UserError for a part whose weights are missing, cut short or pickled; reads the heads of its files alone."""
    files.open_state(place, WEIGHTS[class_of(part, place)[0]])


def open_part(part: str, place: Path, dtype: torch.dtype, file: Mapping[str, Stored] | None = None) -> Any:
    """One part from its folder, whole or not at all; with the weights of an all-in-one `file`, if it has them."""
    library, name = class_of(part, place)
    cls = getattr(importlib.import_module(library), name)
    refuse_code(place)
    if file is not None:
        return _from_file(part, cls, place, file, dtype)
    is_model = part in ("vae", "text_encoder", "text_encoder_2")
    options: dict[str, Any] = {"local_files_only": True}
    if is_model:
        look_at(part, place)
        options |= {"output_loading_info": True, "torch_dtype" if library == "diffusers" else "dtype": dtype}
        options |= {"use_safetensors": True, "variant": variant_of(place, WEIGHTS[library])}
    try:
        opened = cls.from_pretrained(str(place), **options)
    except ImportError as error:
        line = next((line for line in str(error).splitlines() if line.strip()), name)[:300]
        raise UserError(f"the {part} in {place} needs a package that is not installed: {line.strip()}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"the {part} in {place} cannot be opened as {name} ({describe(error)}); fetch it again"
        ) from error
    if not is_model:
        return opened
    opened, info = opened
    if missing := sorted(info.get("missing_keys", ())):
        raise UserError(f"the {part} in {place} lacks {some(missing)}; fetch that folder again")
    return opened.eval()


def _from_file(part: str, cls: Any, place: Path, state: Mapping[str, Stored], dtype: torch.dtype) -> Any:
    """A part with the file's weights and the config of the base's folder `place`; UserError unless they fit whole."""
    tensors = {key: tensor.to(dtype).read() for key, tensor in state.items()}
    if part == "vae":
        return _vae(cls, place, tensors).to(dtype).eval()
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items() if not _UNUSED.search(key)}
    model, info = cls.from_pretrained(
        None,
        config=cls.config_class.from_pretrained(str(place)),
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
    )
    faults = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ())]
    _check_fit(part, place, [*faults, *(key for key, *_ in info.get("mismatched_keys", ()))])
    return model.eval()


def _vae(cls: Any, place: Path, tensors: dict[str, torch.Tensor]) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = cls.from_config(files.read_json(place / "config.json"))
    expected = model.state_dict()
    if tensors.keys() != expected.keys():  # the latent diffusion code's keys
        try:
            renamed = convert_ldm_vae_checkpoint(dict(tensors), model.config)
        except (KeyError, AttributeError, RuntimeError, IndexError) as error:
            raise UserError(
                f"the file's VAE has keys that are not known ({error}); give the transformer alone"
            ) from error
        if len(renamed) != len(tensors):
            _check_fit("vae", place, [f"{len(tensors) - len(renamed)} keys that have no counterpart"])
        tensors = renamed
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    got = {key: tensor.shape for key, tensor in tensors.items()}
    _check_fit("vae", place, [key for key in shapes | got if shapes.get(key) != got.get(key)])
    model.load_state_dict(tensors)
    return model


def _check_fit(part: str, place: Path, odd: list[str]) -> None:
    if odd:
        raise UserError(
            f"the file's {part} does not fit {place / 'config.json'}: {some(sorted(odd))}. Nothing was loaded; give "
            "the base that this file was made from, or the transformer alone"
        )


def class_of(part: str, place: Path) -> tuple[str, str]:
    """(library, class) of a part: what model_index.json beside it says, if that is diffusers or transformers."""
    index = place.parent / INDEX
    named = files.read_json(index).get(part) if index.is_file() else None
    if isinstance(named, list) and len(named) == 2 and named[0] in ("diffusers", "transformers"):
        library, name = named
        if hasattr(importlib.import_module(library), name):
            return library, name
    return PARTS[part]


def check_family(config: Mapping[str, Any], parts: Mapping[str, Any], model: Path, base: Path | None) -> None:
    """UserError when transformer and base come from different families: their widths must meet."""
    out = config.get("out_channels") or config["in_channels"]
    pairs = [("packed VAE latents", 4 * parts["vae"].config.latent_channels, "canvas channels", out)]
    if "text_encoder_2" in parts:
        width = getattr(parts["text_encoder_2"].config, "d_model", None)
        pairs.append(("T5 embeddings", width, "joint_attention_dim", config.get("joint_attention_dim", 4096)))
    if "text_encoder" in parts:
        width = getattr(parts["text_encoder"].config, "hidden_size", None)
        pairs.append(("CLIP embeddings", width, "pooled_projection_dim", config.get("pooled_projection_dim", 768)))
    for what, have, name, want in pairs:
        if have is not None and have != want:
            raise UserError(
                f"{base or model} is of another family than {model}: its {what} are {have} wide, the transformer's "
                f"{name} is {want}; give the base that this student was trained from"
            )


def copy_parts(places: Mapping[str, Path], folder: Path, name: str) -> bool:
    """Copies parts into `folder` with a model_index.json that names this pipeline, which opens it; False if some
    lack."""
    if any(part not in places for part in NEEDED):
        return False
    import diffusers

    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    for part in PARTS:
        index[part] = list(class_of(part, places[part])) if part in places else [None, None]
        if part in places:
            files.copy_plain(places[part], folder / part, WEIGHTS[class_of(part, places[part])[0]])
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf8")
    return True
