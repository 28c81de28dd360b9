"""Opens model folders from other people safely: weights from safetensors, classes from installed libraries, and no code
from the folder, with any version of diffusers.

    pipe = open_pipeline(folder, torch.bfloat16)      # a diffusers pipeline
    refuse_code(folder)                               # before a transformers model or tokenizer is opened

diffusers and transformers can run Python files that come with a model (`auto_map`, a component's module, a pipeline's
module), read pickles, and follow an adapter's config to another model. Each of these is rejected before either library
opens the folder.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError, describe
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.documents import parse_json
from diptych.utils.paths import packaged

if TYPE_CHECKING:
    import torch

LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
"""Keys of a config that name code to load."""
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys of a config that may name a kernel on the hub, which is also code."""
REDIRECT = "adapter_config.json"  # transformers opens the base model that this file names
_LARGEST = 64 * 2**20  # bytes of a config


def open_pipeline(folder: Path, dtype: torch.dtype, what: str = "teacher", kind: str | None = None) -> Any:
    """Opens the diffusers pipeline in a folder on the CPU, in `dtype` whatever the type of its files.

    Args:
        what: role of the folder, for errors.
        kind: pipeline class; None means the class that the folder names.

    Raises UserError if the folder holds code, pickles or unknown classes, or cannot be opened.
    """
    index = check_pipeline(folder, what)
    import diffusers

    name = kind or index["_class_name"]
    options: dict[str, Any] = {"variant": pipeline_variant(folder), "local_files_only": True, "use_safetensors": True}
    try:
        with quiet_bars():
            return getattr(diffusers, name).from_pretrained(str(folder), torch_dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        message = f"The {what} in {folder} cannot be opened as a {name} ({describe(error)})."
        raise UserError("model_unsupported", message) from error


def check_pipeline(folder: Path, what: str = "teacher", custom: str | None = None) -> dict[str, Any]:
    """A pipeline's model_index.json. UserError unless its classes are known and its files are safe to open.

    `custom` is a pipeline class of diptych that is allowed besides those of diffusers.
    """
    import diffusers

    unfit = f"The {what} in {folder} cannot be opened as a diffusers pipeline"
    if not (folder / INDEX).is_file():
        raise UserError("model_incomplete", f"{unfit} (it has no {INDEX})")
    index = _read(folder / INDEX)
    _refuse_keys(folder / INDEX, index)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise UserError(
            "model_unsafe",
            f"{unfit}: {INDEX} names the pipeline class {json.dumps(name)}, whose code is in the model's folder. "
            "diptych runs no code from a model's folder. Use a model whose class is in diffusers.",
        )
    cls = diffusers.FluxPipeline if name == custom else _class(diffusers, name)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline) or cls is diffusers.DiffusionPipeline:
        raise UserError(
            "model_unsupported",
            f"{unfit}: the installed diffusers {diffusers.__version__} has no pipeline class '{name}'. "
            "Check the name in model_index.json, or install a version of diffusers that has it.",
        )
    for part, value in index.items():
        # Other lists are settings of the pipeline, such as numbers of layers.
        if isinstance(value, list) and any(isinstance(each, str) for each in value[:2]):
            _check_part(folder, part, value, what)
    return index


def refuse_code(folder: Path) -> None:
    """UserError for the folder of a model or tokenizer that names code, a kernel, or an adapter, or whose shards are
    not safetensors beside their index."""
    if (folder / REDIRECT).is_file():
        raise UserError(
            "model_unsafe",
            f"{folder / REDIRECT}: an adapter, whose base model would be opened from elsewhere. Merge it into its base "
            "and save the whole model.",
        )
    for path in sorted(folder.glob("*.json")):
        if not path.is_file():
            continue
        if path.name.endswith(".safetensors.index.json"):
            _refuse_shards(path)
        elif path.name.endswith("config.json") or path.name == INDEX:
            _refuse_keys(path, _read(path))


def _check_part(folder: Path, part: str, value: list[Any], what: str) -> None:
    """UserError for a component whose class is not in an installed library, or whose folder is not safe to open."""
    place = folder / part
    library, name = value if len(value) == 2 else (None, None)
    if not isinstance(library, str) or not isinstance(name, str) or Path(part).name != part:
        raise UserError(
            "model_unsupported", f"{folder / INDEX}: {part} names {json.dumps(value)}, not a library and a class."
        )
    module = _library(library)
    if module is None:
        raise UserError(
            "model_unsafe",
            f"The {what} in {folder}: {INDEX} has {part} from '{library}', not from {' or '.join(LIBRARIES)}. "
            "diptych runs no code from a model's folder and loads no other libraries for it.",
        )
    cls = _class(module, name)
    if cls is None or not hasattr(cls, "from_pretrained") or "Pipeline" in name:  # a pipeline would bring its index
        raise UserError(
            "model_unsupported",
            f"The {what} in {folder}: the installed {library} has no model class '{name}', which {INDEX} names as "
            f"{part}.",
        )
    if not place.is_dir():
        return  # the library reports missing components
    if scripts := sorted(path.name for path in place.rglob("*.py*")):
        raise UserError(
            "model_unsafe",
            f"The {what} in {folder}: {part}/{scripts[0]} is code, and diptych runs no code from a model's folder. "
            "Remove the file if the component's class is in the library.",
        )
    refuse_code(place)
    names = [path.name for path in place.iterdir() if path.is_file()]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise UserError(
            "model_unsafe",
            f"The {what} in {folder}: {part} has its weights only in {pickles[0]}, a format that can run code when it "
            "is opened. Save them as safetensors (pipe.save_pretrained with safe_serialization).",
        )


def _library(name: str) -> ModuleType | None:
    """diffusers, transformers, or a package of diffusers' pipelines, which also defines components."""
    if name in LIBRARIES:
        return importlib.import_module(name)
    if not name.isidentifier():
        return None
    try:
        module = importlib.import_module(f"diffusers.pipelines.{name}")
    except ImportError:
        return None
    return module if hasattr(module, "__path__") else None


def _class(module: ModuleType, name: str) -> type | None:
    """A class of an installed library; None for anything else of that name."""
    try:
        value = getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None
    return value if inspect.isclass(value) and value.__module__.split(".")[0] in LIBRARIES else None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST >> 20} MiB")
        value = parse_json(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("json_invalid", f"{path}: cannot be read as JSON ({describe(error)})") from error
    if not isinstance(value, dict):
        raise UserError("json_invalid", f"{path}: must be a JSON object, not a {type(value).__name__}.")
    return value


def _refuse_keys(path: Path, config: dict[str, Any]) -> None:
    for key, value in _items(config):
        if key in CODE and value:
            raise UserError(
                "model_unsafe",
                f"{path}: `{key}` names code that comes with the model, and diptych runs no code from a model's "
                "folder. If the installed libraries have this model, remove the entry.",
            )
        for kernel in value.values() if key in ATTENTION and isinstance(value, dict) else [value]:
            if key in ATTENTION and isinstance(kernel, str) and not kernel.isidentifier():
                message = f"{path}: `{key}` is '{kernel}', a kernel from elsewhere. Remove the entry."
                raise UserError("model_unsafe", message)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON, without recursion, because the nesting may be deep."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _refuse_shards(path: Path) -> None:
    """UserError for an index with shards that are not safetensors files beside it."""
    shards = _read(path).get("weight_map")
    for shard in shards.values() if isinstance(shards, dict) else ():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            message = f"{path}: names the shard {json.dumps(shard)}. Shards must be safetensors files beside it."
            raise UserError("model_unsafe", message)


# Folders with a variant of the weights: `diffusion_pytorch_model.fp16.safetensors` instead of
# `diffusion_pytorch_model.safetensors`, in one file or in shards.

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers' name and transformers'


def variant_of(folder: Path, name: str) -> str | None:
    """The variant of the weights `name` in a folder (`variant=` of diffusers); None if it has the plain file or
    nothing. UserError if it has several."""
    if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
        return None
    stem, _, ending = name.rpartition(".")
    names = re.compile(rf"{re.escape(stem)}\.(?:([^.]+)\.{ending}|{ending}\.index\.([^.]+)\.json)")
    matches = (names.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    # A shard's number is in the place of the variant, or behind it.
    variants = sorted({m[1] or m[2] for m in matches if m and not re.search(r"-\d+-of-\d+$", m[1] or "")})
    if len(variants) > 1:
        message = f"{folder} has the variants {', '.join(variants)}. Leave one of them, or a plain {name}."
        raise UserError("model_unsupported", message)
    return variants[0] if variants else None


def pipeline_variant(folder: Path) -> str | None:
    """The variant of a whole pipeline (`variant=` of diffusers); None for plain files. UserError if its parts have
    different ones."""
    parts = sorted(part for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else []
    variants = {v for part in parts for name in WEIGHTS if (v := variant_of(part, name))}
    if len(variants) > 1:
        message = f"The parts of {folder} have the variants {', '.join(sorted(variants))}. Save all as one variant."
        raise UserError("model_unsupported", message)
    return next(iter(variants), None)


def variant_names(name: str, variant: str) -> tuple[str, str]:
    """File and index names of a variant, as diffusers and transformers write them."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}", f"{name}.index.{variant}.json"


# The JSON files of a teacher by its name in a recipe. Nothing is downloaded, and no weights are read.

INDEX = "model_index.json"


def folder_of(name: str) -> Path | None:
    """The folder of a teacher on this machine: `pocket`, or a path. None for a hub name."""
    path = packaged("pocket/weights") / "teacher" if name in models.BUILT_IN else Path(name).expanduser()
    return path if path.is_dir() else None


def read(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a teacher, from its folder or the hub's cache; empty if missing or not a JSON object."""
    if (folder := folder_of(name)) is not None:
        return read_file(folder / file)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = name.partition("@")
    try:
        path = try_to_load_from_cache(repo, file, revision=revision or None)
    except HFValidationError:
        return {}
    return read_file(Path(path)) if isinstance(path, str) else {}


def read_file(path: Path) -> dict[str, Any]:
    """A JSON file; empty if missing or not a JSON object."""
    try:
        value = parse_json(path.read_text("utf8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def class_of(folder: Path) -> str:
    """The pipeline class that model_index.json in a folder names; empty if it names none."""
    name = read_file(folder / INDEX).get("_class_name")
    return name if isinstance(name, str) else ""
