"""The one way to open a model's folder that somebody else made: weights from safetensors, classes from installed
libraries, and no code from the folder, whatever the version of diffusers.

    pipe = open_pipeline(folder, torch.bfloat16)      # a diffusers pipeline
    refuse_code(folder)                               # before a transformers model or tokenizer is opened

diffusers and transformers can run Python files that come with a model (`auto_map`, a component's module, a pipeline's
module), read pickles, and follow an adapter's config to another model. Everything that leads there is refused before
either library sees the folder.
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
"""Keys of a config that may name a kernel on the hub, which is code too."""
REDIRECT = "adapter_config.json"  # transformers opens the base model that this file names instead
_LARGEST = 64 * 2**20  # bytes of a config


def open_pipeline(folder: Path, dtype: torch.dtype, what: str = "teacher", kind: str | None = None) -> Any:
    """The diffusers pipeline in a folder, on the CPU, computing in `dtype` whatever its files hold.

    Args:
        what: what the folder is for, in errors.
        kind: the pipeline class to open it as; None is the class that the folder names.

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
        raise UserError(f"the {what} in {folder} cannot be opened as a {name} ({describe(error)})") from error


def check_pipeline(folder: Path, what: str = "teacher", own: str | None = None) -> dict[str, Any]:
    """A pipeline's model_index.json. UserError unless all that it names is known and all that is opened is safe.

    `own` names a pipeline class of this package that may be named as well as diffusers'.
    """
    import diffusers

    unfit = f"the {what} in {folder} cannot be opened as a diffusers pipeline"
    if not (folder / INDEX).is_file():
        raise UserError(f"{unfit} (it has no {INDEX})")
    index = _read(folder / INDEX)
    _refuse_keys(folder / INDEX, index)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise UserError(
            f"{unfit}: {INDEX} names the pipeline class {json.dumps(name)}, which comes with code of its own. "
            "diptych runs no code from a model's folder: use a model whose class is in diffusers"
        )
    cls = diffusers.FluxPipeline if name == own else _class(diffusers, name)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline) or cls is diffusers.DiffusionPipeline:
        raise UserError(
            f"{unfit}: the installed diffusers {diffusers.__version__} has no pipeline class '{name}'. "
            "Check the name in model_index.json, or install a diffusers that has it"
        )
    for part, value in index.items():
        # Other lists are settings of the pipeline, such as numbers of layers.
        if isinstance(value, list) and any(isinstance(one, str) for one in value[:2]):
            _check_part(folder, part, value, what)
    return index


def refuse_code(folder: Path) -> None:
    """UserError for a model's or tokenizer's folder that names code to load, a kernel or an adapter, or whose shards
    are not safetensors beside their index."""
    if (folder / REDIRECT).is_file():
        raise UserError(
            f"{folder / REDIRECT}: this is an adapter, whose base model would be opened from elsewhere; "
            "merge it into its base and save the whole model"
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
        raise UserError(f"{folder / INDEX}: {part} names {json.dumps(value)}, not a library and a class")
    module = _library(library)
    if module is None:
        raise UserError(
            f"the {what} in {folder}: {INDEX} has {part} from '{library}', not from {' or '.join(LIBRARIES)}. "
            "diptych runs no code from a model's folder and loads no other libraries for it"
        )
    cls = _class(module, name)
    if cls is None or not hasattr(cls, "from_pretrained") or "Pipeline" in name:  # a pipeline would bring its index
        raise UserError(
            f"the {what} in {folder}: the installed {library} has no model class '{name}', which {INDEX} names as "
            f"{part}"
        )
    if not place.is_dir():
        return  # the library says which of its components are missing
    if scripts := sorted(path.name for path in place.rglob("*.py*")):
        raise UserError(
            f"the {what} in {folder}: {part}/{scripts[0]} is code, and diptych runs no code from a model's folder; "
            "remove the file if the component's class is in the library"
        )
    refuse_code(place)
    names = [path.name for path in place.iterdir() if path.is_file()]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise UserError(
            f"the {what} in {folder}: {part} has its weights in {pickles[0]} alone, a format that can run code when "
            "it is opened; save them as safetensors (pipe.save_pretrained with safe_serialization)"
        )


def _library(name: str) -> ModuleType | None:
    """diffusers, transformers, or a package of diffusers' pipelines, which has components of its own."""
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
        found = getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None
    return found if inspect.isclass(found) and found.__module__.split(".")[0] in LIBRARIES else None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST >> 20} MiB")
        found = parse_json(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({describe(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object, not a {type(found).__name__}")
    return found


def _refuse_keys(path: Path, config: dict[str, Any]) -> None:
    for key, value in _items(config):
        if key in CODE and value:
            raise UserError(
                f"{path}: `{key}` names code that comes with the model, and diptych runs no code from a model's "
                "folder. If the installed libraries have this model themselves, remove the entry"
            )
        for kernel in value.values() if key in ATTENTION and isinstance(value, dict) else [value]:
            if key in ATTENTION and isinstance(kernel, str) and not kernel.isidentifier():
                raise UserError(f"{path}: `{key}` is '{kernel}', a kernel from elsewhere; remove the entry")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON, without recursion: a config may be nested as deep as JSON is read."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _refuse_shards(path: Path) -> None:
    """UserError for an index whose shards are other files than safetensors beside it."""
    shards = _read(path).get("weight_map")
    for shard in shards.values() if isinstance(shards, dict) else ():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{path}: names the shard {json.dumps(shard)}; shards are safetensors files beside it")


# Folders whose weights are saved as a variant: `diffusion_pytorch_model.fp16.safetensors` in the place of
# `diffusion_pytorch_model.safetensors`, in one file or in shards.

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers' name and transformers'


def variant_of(folder: Path, name: str) -> str | None:
    """The variant of the weights `name` that a folder has (`variant=` of diffusers); None where it has the plain file
    or nothing. UserError if it has several."""
    if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
        return None
    stem, _, ending = name.rpartition(".")
    names = re.compile(rf"{re.escape(stem)}\.(?:([^.]+)\.{ending}|{ending}\.index\.([^.]+)\.json)")
    matches = (names.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    # A shard's name has its number in the place of the variant, or behind it.
    found = sorted({m[1] or m[2] for m in matches if m and not re.search(r"-\d+-of-\d+$", m[1] or "")})
    if len(found) > 1:
        raise UserError(f"{folder} holds its weights as {', '.join(found)}; keep one of them, or a plain {name}")
    return found[0] if found else None


def pipeline_variant(folder: Path) -> str | None:
    """The variant to open a whole pipeline's folder with (`variant=` of diffusers); None for plain files. UserError if
    its parts have several."""
    parts = sorted(part for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else []
    found = {v for part in parts for name in WEIGHTS if (v := variant_of(part, name))}
    if len(found) > 1:
        raise UserError(
            f"the parts of {folder} are saved as {', '.join(sorted(found))}; save all of them as one variant"
        )
    return next(iter(found), None)


def variant_names(name: str, variant: str) -> tuple[str, str]:
    """A variant's file and index, as diffusers and transformers write them."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}", f"{name}.index.{variant}.json"


# The JSON files of a teacher, by the name that a recipe gives it. Nothing is downloaded and no weight is read.

INDEX = "model_index.json"


def folder_of(name: str) -> Path | None:
    """The folder of a teacher that is on this machine under its name: `pocket`, or a path. None for a hub name."""
    path = packaged("pocket/weights") / "teacher" if name in models.BUILT_IN else Path(name).expanduser()
    return path if path.is_dir() else None


def read(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a teacher, from its folder or the hub's cache; empty if it is not there or not a JSON object."""
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
    """A JSON file; empty if it is not there or not a JSON object."""
    try:
        found = parse_json(path.read_text("utf8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def class_of(folder: Path) -> str:
    """The pipeline class that model_index.json in a folder names; empty if it names none."""
    name = read_file(folder / INDEX).get("_class_name")
    return name if isinstance(name, str) else ""
