"""What a model's path has: its layout, its weights as a folded student whose tensors are still on disk, and the other
parts of its pipeline.

`open_source` reads every layout. Loading reads all its tensors; converting writes them one by one. Parts (VAE,
scheduler, text encoders, tokenizers) are taken from the model's folder if it has them, else from the base.
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
from diptych.student.weights.lora_file import RELEASED_LORA, SUFFIXES
from diptych.student.weights.lora_keys import account, is_lora
from diptych.student.weights.tensors import Stored, held, open_safetensors
from diptych.utils import models
from diptych.utils.opening import INDEX, refuse_code, variant_of

# part: (library, class), unless the folder's model_index.json names another class. Text parts may be absent.
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}
NEEDED = ("scheduler", "vae")
# Keys of the text encoders in an all-in-one file that FLUX does not use.
_UNUSED = re.compile(r"^(transformer\.)?(logit_scale|text_projection(\.weight)?|spiece_model)$|position_ids$")
WEIGHTS = {"diffusers": files.WEIGHTS_FILE, "transformers": "model.safetensors"}


@dataclass(frozen=True)
class StudentSource:
    """A student's weights on disk.

    Attributes:
        layout: a layout of `directions.yaml`.
        folded: `Stored` tensors and a config with the student's settings; of a control-LoRA, the widened teacher.
        lora: the LoRA file that belongs to the student.
        place: the folder or file with the transformer's weights.
        parts: the other parts of an all-in-one file.
        scaled: whether the weights were in scaled fp8 and are dequantized.
    """

    layout: str
    folded: Folded
    lora: Path | None
    place: Path
    parts: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    scaled: bool = False

    @property
    def tensors(self) -> dict[str, Stored]:
        return self.folded.state_dict


def resolve(model: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """(path, folder of the base) of a model by name. The base defaults to that of a built-in model, and to the teacher
    of a run whose student lacks parts."""
    name = str(model)
    path = models.resolve(name, "student")
    lacks = lora_alone(path) is not None or not (path / "vae").is_dir()
    if base is None and lacks and (run := models.run_of(name)) is not None:
        base = recipes.load(run / "recipe.yaml").teacher
    if base is None:
        return path, models.resolve(name, "teacher") if name in models.BUILT_IN else None
    base_folder = models.resolve(str(base), "teacher")
    if not base_folder.is_dir():
        raise UsageError(
            "path_wrong_kind",
            f"The base {base} is a file. Pass the teacher's folder, which also has the VAE and the scheduler.",
        )
    return path, base_folder


def open_source(model: Path, base: Path | None, dtype: torch.dtype | None = None) -> StudentSource:
    """The student at `model`, its tensors cast to `dtype` when they are read. UserError if there is none.

    `base` is the teacher's folder. A control-LoRA needs it, and so does a single file that lacks part of its config.
    """
    layout, place, lora = locate(model, base)
    registered = read_settings(model, base)
    parts: dict[str, dict[str, Stored]] = {}
    scaled = False
    if layout in ("file", "gguf"):
        folded, parts, scaled = single_file.open_file(place, base, dtype)
    elif layout == "control-lora":
        assert base is not None and lora is not None
        folded = _base_of_lora(place, lora, dtype, registered)
    else:
        state = {key: tensor.to(dtype) for key, tensor in files.open_state(place).items()}
        layout = "released" if files.is_released(state) else "folded"
        folded = files.fold_stored(state, files.read_config(place), files.read_split(place), str(place))
    if registered != Settings() or settings.KEY in folded.config:  # weights without settings stay as they are
        folded = replace(folded, config={**folded.config, settings.KEY: registered.values()})
    return StudentSource(layout, folded, lora, place, parts, scaled)


def read_settings(model: Path, base: Path | None) -> Settings:
    """The settings of the student at `model`, without reading its weights: those in its weights, else those in a file
    beside them, else those of its base. UserError if they are not valid."""
    layout, place, lora = "control-lora", model, lora_alone(model)
    if lora is None:
        layout, place, lora = locate(model, base)
    place = lora if layout == "control-lora" and lora is not None else place
    config: dict[str, Any] = {}
    if layout == "folded":
        config = files.read_json(place / "config.json")  # of any family
    elif layout != "gguf":
        config = files.read_header(open_safetensors(place)[1])[0]
    places = [model, *([base] if base is not None else [])]
    return settings.resolve(config.get(settings.KEY), places, f"'{settings.KEY}' in {place}")


def locate(model: Path, base: Path | None) -> tuple[str, Path, Path | None]:
    """(layout, path of the transformer's weights, the LoRA that belongs to them), from names and keys alone.

    `folded` stands for `released` too: only the weights tell them apart.
    """
    if model.is_file():
        if model.suffix == ".gguf":
            return "gguf", model, None
        if model.suffix not in SUFFIXES:
            raise UsageError(
                "file_format_unknown",
                f"{model} is not a .safetensors or .gguf file. Pass one of these, or the folder of a student.",
            )
        if not is_lora(open_safetensors(model)[0]):
            return "file", model, None
        return "control-lora", _teacher(model, base), model
    lora = path if (path := model / RELEASED_LORA).is_file() else None
    for name in TRANSFORMER_FOLDERS:
        if (model / name).is_dir():
            return "folded", model / name, lora
    if lora is not None and (base is not None or not (model / "config.json").is_file()):
        return "control-lora", _teacher(model, base), lora
    if (model / "config.json").is_file():
        return "folded", model, lora
    single = next(iter(sorted(path for kind in (".gguf", *SUFFIXES) for path in model.glob(f"*{kind}"))), None)
    remedy = "Check that the download is complete" if single is None else f"Pass its file, {single}"
    raise UserError("model_incomplete", f"{model} is not a student: it has no transformer/ folder. {remedy}.")


def lora_alone(model: Path) -> Path | None:
    """The LoRA file that a path is, or that a folder has as its only weights. None if there is more, or none."""
    if model.is_file():
        return model if model.suffix in SUFFIXES and is_lora(open_safetensors(model)[0]) else None
    others = [*TRANSFORMER_FOLDERS, "config.json"]
    lora = model / RELEASED_LORA
    return lora if lora.is_file() and not any((model / name).exists() for name in others) else None


def teacher_state(base: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(tensors, config) of a teacher's transformer. UserError if it is not a teacher."""
    place = transformer_folder(base)
    config = stock_config(files.read_config(place))
    if config["in_channels"] != (config.get("out_channels") or config["in_channels"]):
        raise UserError(
            "model_mismatch", f"{place} is already widened. Pass the text-to-image teacher's folder as base."
        )
    return files.open_state(place), config


def transformer_folder(folder: Path) -> Path:
    """The folder of a pipeline's transformer: `transformer/`, `transformers/`, or `folder` itself."""
    for name in TRANSFORMER_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    if (folder / "config.json").is_file():
        return folder
    raise UserError("model_incomplete", f"{folder} has no transformer/ folder. Check that the download is complete.")


def _teacher(model: Path, base: Path | None) -> Path:
    if base is None:
        raise UsageError(
            "option_missing", f"{model} is a LoRA and needs its teacher. Pass the teacher's folder as base."
        )
    return transformer_folder(base)


def _base_of_lora(place: Path, lora: Path, dtype: torch.dtype | None, registered: Settings) -> Folded:
    """The teacher's weights for a LoRA with these settings: unchanged for `conditioning: tokens`, otherwise with zero
    columns for the condition. UserError if the LoRA does not adapt these columns."""
    if registered.conditioning == "tokens":
        state, config = teacher_state(place)
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
        return files.fold_stored(state, {**config, settings.KEY: registered.values()}, None, str(place))
    if not any(f"transformer.{INPUT}" in layer.targets for layer in account(open_safetensors(lora)[0], lora)):
        raise UserError(
            "lora_unsupported",
            f"{lora} does not adapt {INPUT}, so its student would not see the reference. Pass a control-LoRA.",
        )
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
    return {part: root / part for root in reversed(roots) for part in PARTS if (root / part).is_dir()}


def check_parts(places: Mapping[str, Path], model: Path, base: Path | None) -> None:
    """UserError that names the required parts that no folder has, or a base that is not a FLUX pipeline."""
    if base is not None and (base / INDEX).is_file():
        name = str(files.read_json(base / INDEX).get("_class_name", ""))
        if name and (not name.startswith(("Flux", "DiptychPipeline")) or name.startswith("Flux2")):
            raise _other_family(base, f"it is a {name}, not a FLUX.1 pipeline")
    if absent := [part for part in NEEDED if part not in places]:
        if base is None:
            raise UsageError(
                "option_missing",
                f"{model} is not a complete pipeline: it lacks {', '.join(absent)}. Pass the teacher's folder as base.",
            )
        raise UserError(
            "model_incomplete",
            f"Neither {model} nor the base {base} has {', '.join(absent)}. Check that the base is complete.",
        )
    for encoder in ("text_encoder", "text_encoder_2"):
        if encoder in places and (tokenizer := encoder.replace("text_encoder", "tokenizer")) not in places:
            raise UserError(
                "model_incomplete",
                f"{places[encoder].parent} has {encoder} but no {tokenizer}. Check that the folder is complete.",
            )


def _other_family(base: Path, reason: str) -> UserError:
    return UserError(
        "model_mismatch",
        f"{base} is of another family than the student: {reason}. Pass the base that this student was trained from.",
    )


def check_part(part: str, place: Path) -> None:
    """UserError for a part whose weights are missing, truncated or pickled. Reads only the headers of its files."""
    files.open_state(place, WEIGHTS[class_of(part, place)[0]])


def open_part(part: str, place: Path, dtype: torch.dtype, file: Mapping[str, Stored] | None = None) -> Any:
    """One part from its folder, complete or not at all. Its weights come from the all-in-one `file` if it has them."""
    library, name = class_of(part, place)
    cls = getattr(importlib.import_module(library), name)
    refuse_code(place)
    if file is not None:
        return _from_file(part, cls, place, file, dtype)
    is_model = part in ("vae", "text_encoder", "text_encoder_2")
    options: dict[str, Any] = {"local_files_only": True}
    if is_model:
        check_part(part, place)
        options |= {"output_loading_info": True, "torch_dtype" if library == "diffusers" else "dtype": dtype}
        options |= {"use_safetensors": True, "variant": variant_of(place, WEIGHTS[library])}
    try:
        opened = cls.from_pretrained(str(place), **options)
    except ImportError as error:
        line = next((line for line in str(error).splitlines() if line.strip()), name)[:300]
        raise UserError(
            "dependency_missing", f"The {part} in {place} needs a package that is not installed: {line.strip()}"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            "weights_damaged",
            f"The {part} in {place} cannot be opened as {name} ({describe(error)}). Fetch it again.",
        ) from error
    if not is_model:
        return opened
    opened, info = opened
    if missing := sorted(info.get("missing_keys", ())):
        raise UserError("model_incomplete", f"The {part} in {place} lacks {some(missing)}. Fetch that folder again.")
    return opened.eval()


def _from_file(part: str, cls: Any, place: Path, state: Mapping[str, Stored], dtype: torch.dtype) -> Any:
    """A part with the file's weights and the config in the base's folder `place`. UserError unless all keys match."""
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
                "model_unsupported", f"The file's VAE has unknown keys ({error}). Pass the transformer alone."
            ) from error
        if len(renamed) != len(tensors):
            _check_fit("vae", place, [f"{len(tensors) - len(renamed)} keys without a counterpart"])
        tensors = renamed
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    got = {key: tensor.shape for key, tensor in tensors.items()}
    _check_fit("vae", place, [key for key in shapes | got if shapes.get(key) != got.get(key)])
    model.load_state_dict(tensors)
    return model


def _check_fit(part: str, place: Path, faults: list[str]) -> None:
    if faults:
        raise UserError(
            "model_mismatch",
            f"The file's {part} does not match {place / 'config.json'}: {some(sorted(faults))}. Nothing was loaded; "
            "pass the base that this file was made from, or the transformer alone.",
        )


def class_of(part: str, place: Path) -> tuple[str, str]:
    """(library, class) of a part, from model_index.json beside it if that names diffusers or transformers."""
    index = place.parent / INDEX
    named = files.read_json(index).get(part) if index.is_file() else None
    if isinstance(named, list) and len(named) == 2 and named[0] in ("diffusers", "transformers"):
        library, name = named
        if hasattr(importlib.import_module(library), name):
            return library, name
    return PARTS[part]


def check_family(config: Mapping[str, Any], parts: Mapping[str, Any], model: Path, base: Path | None) -> None:
    """UserError if transformer and base come from different families, whose widths do not match."""
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
            raise _other_family(base or model, f"its {what} have width {have}, and {name} of {model} is {want}")


def copy_parts(places: Mapping[str, Path], folder: Path, name: str) -> None:
    """Copies parts into `folder` with a model_index.json that names the pipeline class `name`, which opens it. Does
    nothing if a required part is missing."""
    if any(part not in places for part in NEEDED):
        return
    import diffusers

    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    for part in PARTS:
        index[part] = list(class_of(part, places[part])) if part in places else [None, None]
        if part in places:
            files.copy_plain(places[part], folder / part, WEIGHTS[class_of(part, places[part])[0]])
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf8")
