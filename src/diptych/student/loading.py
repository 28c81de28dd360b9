"""Opening and saving students: whichever layout the weights came in, one pipeline comes out.

Parts (transformer, VAE, text encoders, tokenizers, scheduler) are taken from the model's folder where it has them, else
from the base. Everything is checked before the pipeline exists, so nothing is ever half loaded.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diptych import models
from diptych.errors import UsageError, UserError
from diptych.student import files
from diptych.student.lora import RELEASED_LORA, apply_lora
from diptych.student.pipeline import DiptychPipeline
from diptych.student.weights import Folded, build, some, widen

Loras = str | Path | tuple[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]]
WORDS_FILE = "words.json"
SAMPLING_FILE = "sampling.json"
SAMPLING: dict[str, float] = {"steps": 28, "guidance": 3.5, "image_guidance": 1.0, "text_guidance": 1.0}
"""How a student is sampled unless it says otherwise or is asked otherwise: the released code's settings."""
# part: (library, class) unless the folder's model_index.json names another; text parts may be absent.
_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}
_NEEDED = ("scheduler", "vae")
_TRANSFORMER_FOLDERS = ("transformer", "transformers")  # the release's README spells it with an s


def load(
    model: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    lora: Loras = (),
    released_lora: bool = True,
    fuse: bool = False,
) -> DiptychPipeline:
    """See `diptych.student.load`."""
    name = str(model)
    folder = models.resolve(name, "student")
    base_folder = models.resolve(str(base), "teacher") if base is not None else None
    if base_folder is None and name in models.BUILT_IN:
        base_folder = models.resolve(name, "teacher")
    own = folder / RELEASED_LORA
    # A control-LoRA (what `distill.mode: lora` writes) has no transformer of its own: it goes on the teacher, widened.
    control = own.is_file() and base_folder is not None and not _has_transformer(folder)
    weights_folder = transformer_folder(base_folder if control and base_folder else folder)
    models.note_licence(name, weights_folder)
    places = _find_parts(folder, base_folder)

    device = pick_device(device)
    dtype = dtype or pick_dtype(weights_folder, device)
    folded = _widened(weights_folder, own, dtype) if control else files.read_student(weights_folder, dtype)
    parts = {part: _open_part(part, place, dtype) for part, place in places.items()}
    _check_family(folded.config, parts, folder, base_folder)
    pipe = DiptychPipeline(transformer=build(folded.config, folded.state_dict), **parts)
    pipe.bias_split = folded.split
    pipe.ignored_adapters = folded.adapters
    pipe.loaded_from = (folder, *([base_folder] if base_folder else []))
    loras = [(own, 1.0)] if own.is_file() and (released_lora or control) else []
    for path, scale in [*loras, *_scaled(lora)]:
        apply_lora(pipe, path, scale, fuse=fuse)
    return pipe.to(device)


def save(pipe: DiptychPipeline, folder: str | Path, *, overwrite: bool = False) -> Path:
    """See `diptych.student.save`."""
    folder = Path(folder)
    if getattr(pipe.transformer, "peft_config", None):
        raise UserError("this student carries an unfused LoRA; load it with fuse=True before saving the whole student")
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another folder or pass overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        pipe.save_pretrained(partial)
        split = pipe.bias_split
        if split is not None and split.of(pipe.transformer.x_embedder.bias.detach().cpu()):
            files.write_split(split, partial / "transformer")
        words = read_words(pipe)
        if words is not None:
            (partial / WORDS_FILE).write_text(json.dumps(sorted(words)) + "\n", "utf8")
        partial.chmod(0o755)
        if folder.exists():
            old = partial.with_suffix(".old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_words(pipe: DiptychPipeline) -> frozenset[str] | None:
    """The words a small model knows, lower-case, from `words.json` in its folder or its base's; None: no such list."""
    for folder in pipe.loaded_from:
        path = folder / WORDS_FILE
        if path.is_file():
            try:
                return frozenset(str(word).lower() for word in json.loads(path.read_text("utf8")))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} is not a JSON list of words ({error})") from error
    return None


def read_sampling(pipe: DiptychPipeline) -> dict[str, float]:
    """`SAMPLING`, with what the student's folder says of itself in `sampling.json`."""
    for folder in pipe.loaded_from:
        path = folder / SAMPLING_FILE
        if path.is_file():
            try:
                own = json.loads(path.read_text("utf8"))
                unknown = set(own) - set(SAMPLING)
                if unknown:
                    raise ValueError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(SAMPLING)}")
                return SAMPLING | {key: type(SAMPLING[key])(value) for key, value in own.items()}
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} does not say how to sample this student ({error})") from error
    return dict(SAMPLING)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None or "auto" the accelerator this machine has, else the CPU."""
    if device is not None and str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"unknown device '{device}': auto, cpu, cuda, cuda:0, mps, …") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(weights_folder: Path, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on an accelerator bfloat16 for weights stored so, else float32 (float16 is storage only)."""
    if device.type == "cpu":
        return torch.float32
    from safetensors import SafetensorError, safe_open

    first = next(iter(sorted(weights_folder.glob("*.safetensors"))), None)
    if first is None:
        return torch.float32
    try:
        with safe_open(first, "pt") as tensors:
            stored = {tensors.get_slice(key).get_dtype() for key in list(tensors.keys())[:8]}
    except (SafetensorError, OSError):
        return torch.float32  # reading the weights says what is wrong with the file
    return torch.bfloat16 if "BF16" in stored else torch.float32


def _scaled(lora: Loras) -> list[tuple[Path, float]]:
    """(path, scale) of each LoRA; one path, or one (path, scale), need no list around it."""
    if isinstance(lora, (str, Path)):
        return [(Path(lora), 1.0)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], (int, float)):
        lora = [lora]  # pyright: ignore[reportAssignmentType]
    pairs: list[Any] = [given if isinstance(given, tuple) else (given, 1.0) for given in lora]  # pyright: ignore
    return [(Path(path), float(scale)) for path, scale in pairs]


def _widened(teacher: Path, lora: Path, dtype: torch.dtype) -> Folded:
    """The teacher's weights widened, ready for a control-LoRA; UserError if that does not adapt the input layer."""
    config = files.read_config(teacher)
    if not any("x_embedder" in key for key in files.read_tensors(lora)):
        raise UserError(f"{lora} does not adapt x_embedder, so a student made from it would never see the reference")
    student = widen(build(config, files.read_state(teacher, dtype)))
    return Folded(dict(student.config), student.state_dict())


def _has_transformer(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in _TRANSFORMER_FOLDERS)


def transformer_folder(folder: Path) -> Path:
    """The folder that holds a student's transformer: `transformer/`, `transformers/`, or `folder` itself."""
    if folder.is_file():
        raise UsageError(f"{folder} is a single file; give the folder of a student")
    for name in _TRANSFORMER_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    if (folder / "config.json").is_file():
        return folder
    raise UserError(f"{folder} holds no transformer/ folder, so it is no student; is the download complete?")


def _find_parts(folder: Path, base: Path | None) -> dict[str, Path]:
    """Where each part lies; UserError naming those that no folder has."""
    roots = [root for root in (folder, base) if root is not None]
    places = {p: next((r / p for r in roots if (r / p).is_dir()), None) for p in _PARTS}
    if absent := [part for part in _NEEDED if places[part] is None]:
        if base is None:
            raise UsageError(
                f"{folder} is not a whole pipeline (it lacks {', '.join(absent)}); give the teacher's folder as base"
            )
        raise UserError(f"neither {folder} nor the base {base} has {', '.join(absent)}; is the base complete?")
    return {part: place for part, place in places.items() if place is not None}


def _open_part(part: str, place: Path, dtype: torch.dtype) -> Any:
    """One part from its folder, whole or not at all."""
    library, name = _class_of(part, place)
    cls = getattr(importlib.import_module(library), name)
    is_model = part in ("vae", "text_encoder", "text_encoder_2")
    for path in place.glob("*.safetensors"):
        _check_whole(path)
    options: dict[str, Any] = {"local_files_only": True}
    if is_model:
        options |= {"output_loading_info": True, "torch_dtype" if library == "diffusers" else "dtype": dtype}
    try:
        opened = cls.from_pretrained(str(place), **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"the {part} in {place} cannot be opened as {name} ({line}); fetch it again") from error
    if not is_model:
        return opened
    opened, info = opened
    if missing := sorted(info.get("missing_keys", ())):
        raise UserError(f"the {part} in {place} lacks {some(missing)}; fetch that folder again")
    return opened.eval()


def _class_of(part: str, place: Path) -> tuple[str, str]:
    """(library, class) of a part: what model_index.json beside it says, if that is diffusers or transformers."""
    index = place.parent / "model_index.json"
    named = files.read_json(index).get(part) if index.is_file() else None
    if isinstance(named, list) and len(named) == 2 and named[0] in ("diffusers", "transformers"):
        library, name = named
        if hasattr(importlib.import_module(library), name):
            return library, name
    return _PARTS[part]


def _check_whole(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file ({error}); fetch it again"
        ) from error


def _check_family(config: dict[str, Any], parts: dict[str, Any], folder: Path, base: Path | None) -> None:
    """UserError when transformer and base come from different families: their widths must meet."""
    out = config.get("out_channels")
    pairs = [("packed VAE latents", 4 * parts["vae"].config.latent_channels, "canvas channels", out)]
    if "text_encoder_2" in parts:
        width = getattr(parts["text_encoder_2"].config, "d_model", None)
        pairs.append(("T5 text", width, "joint_attention_dim", config.get("joint_attention_dim", 4096)))
    if "text_encoder" in parts:
        width = getattr(parts["text_encoder"].config, "hidden_size", None)
        pairs.append(("CLIP text", width, "pooled_projection_dim", config.get("pooled_projection_dim", 768)))
    for what, have, name, want in pairs:
        if have is not None and have != want:
            raise UserError(
                f"{base or folder} is of another family than {folder}: its {what} are {have} wide, the transformer's "
                f"{name} is {want}; give the base that this student was trained from"
            )
