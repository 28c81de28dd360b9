"""Opening and saving students: whichever layout the weights came in, one pipeline comes out.

Parts (transformer, VAE, text encoders, tokenizers, scheduler) are taken from the model's folder where it has them, else
from the base. Everything is checked before the pipeline exists, so nothing is ever half loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diptych import models
from diptych.errors import UsageError, UserError
from diptych.student import files, gguf_file
from diptych.student.alone import alone
from diptych.student.components import check_family, check_parts, find_parts, look_at, open_part
from diptych.student.geometry import CONDITIONINGS, Conditioning
from diptych.student.lora import apply_lora, lora_file
from diptych.student.memory import Preset, prepare, shapes_in
from diptych.student.pipeline import DiptychPipeline
from diptych.student.sources import Source, locate, open_source
from diptych.student.speed import NULL_PANELS
from diptych.student.tensors import open_safetensors
from diptych.student.weights import build

Loras = str | Path | tuple[str | Path, float] | Sequence[str | Path | tuple[str | Path, float]]
WORDS_FILE = "words.json"
SAMPLING_FILE = "sampling.json"
SAMPLING: dict[str, float] = {"steps": 28, "guidance": 3.5, "image_guidance": 1.0, "text_guidance": 1.0}
RELIGHTING = ("image_guidance", "text_guidance", "null_panel")  # what may be otherwise when relighting
"""How a student is sampled unless it says otherwise or is asked otherwise: the released code's settings."""


@alone
def load(
    model: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    lora: Loras = (),
    released_lora: bool = True,
    fuse: bool = False,
    memory: str | int | Preset | None = None,
) -> DiptychPipeline:
    """See `diptych.student.load`."""
    device = pick_device(device)
    preset = prepare(memory, device) if memory is not None else None
    path, base_folder = resolve(model, base)
    layout, weights_place, _ = locate(path, base_folder)
    models.note_licence(str(model), weights_place)
    places = find_parts(path, base_folder)
    check_parts(places, path, base_folder)
    given = [(lora_file(Path(one)), scale) for one, scale in scaled(lora)]

    dtype = dtype or pick_dtype(weights_place, device)
    source = open_source(path, base_folder, dtype)
    own = source.lora if released_lora or layout == "control-lora" else None
    loras = [*([(lora_file(own), 1.0)] if own else []), *given]
    if preset is not None:
        quantized = sum(tensor.nbytes for tensor in source.tensors.values() if tensor.dtype == torch.uint8)
        preset.settle(shapes_in(source.folded.config, places, quantized), dtype, places)
        preset.check([lora for lora, _ in loras], fuse)
    later = preset.waiting if preset is not None else ()
    for part in later:
        look_at(part, places[part])
    parts = {part: open_part(part, place, dtype) for part, place in places.items() if part not in later}
    check_family(source.folded.config, parts, path, base_folder)
    pipe = DiptychPipeline(transformer=_read(source, dtype), **parts)
    pipe.bias_split = source.folded.split
    pipe.ignored_adapters = source.folded.adapters
    pipe.loaded_from = (path, *([base_folder] if base_folder else []))
    pipe.loras = tuple(given)
    pipe.conditioning = read_conditioning(pipe.loaded_from)
    own = _own_words(pipe.loaded_from)
    pipe.null_panel, pipe.relighting = own.get("null_panel", NULL_PANELS[0]), own.get("relight", {})
    for one, scale in loras:
        apply_lora(pipe, one, scale, fuse=fuse)
    if preset is None:
        return pipe.to(device)
    preset.apply(pipe)
    return pipe


def resolve(model: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """(path, base's folder) of a model by name; a built-in model brings its own base."""
    name = str(model)
    path = models.resolve(name, "student")
    if base is None:
        return path, models.resolve(name, "teacher") if name in models.BUILT_IN else None
    base_folder = models.resolve(str(base), "teacher")
    if not base_folder.is_dir():
        raise UsageError(
            f"the base {base} is a file; give the teacher's folder: it also brings the VAE and the scheduler"
        )
    return path, base_folder


def _read(source: Source, dtype: torch.dtype) -> Any:
    """The transformer, its tensors read; a GGUF file's quantized matrices stay quantized."""
    if source.layout == "gguf" and any(tensor.dtype == torch.uint8 for tensor in source.tensors.values()):
        return gguf_file.build_quantized(source.folded.config, source.tensors, dtype, source.place)
    return build(source.folded.config, {key: tensor.read() for key, tensor in source.tensors.items()})


def save(pipe: DiptychPipeline, folder: str | Path, *, overwrite: bool = False) -> Path:
    """See `diptych.student.save`."""
    folder = Path(folder)
    if getattr(pipe.transformer, "peft_config", None):
        raise UserError("this student carries an unfused LoRA; load it with fuse=True before saving the whole student")
    if getattr(pipe.transformer, "hf_quantizer", None) is not None:
        raise UserError("this student is quantized, and quantized weights are not saved; `diptych convert` dequantizes")
    files.check_free(folder, overwrite, "pass overwrite=True")
    with files.publish(folder) as partial:
        pipe.save_pretrained(partial)
        split = pipe.bias_split
        if split is not None and split.of(pipe.transformer.x_embedder.bias.detach().cpu()):
            files.write_split(split, partial / "transformer")
        words, sampling = read_words(pipe), read_sampling(pipe)
        own = {**({} if sampling == SAMPLING else sampling), **said_conditioning(pipe.conditioning)}
        own |= said_guidance(pipe.null_panel, pipe.relighting)
        if words is not None:
            (partial / WORDS_FILE).write_text(json.dumps(sorted(words)) + "\n", "utf8")
        if own:
            (partial / SAMPLING_FILE).write_text(json.dumps(own) + "\n", "utf8")
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
    own = _own_words(pipe.loaded_from)
    return SAMPLING | {key: float(own[key]) if key != "steps" else int(own[key]) for key in own if key in SAMPLING}


def read_conditioning(places: Sequence[Path]) -> Conditioning:
    """How a student was trained to see its reference, from the `sampling.json` in or beside the first place that has
    one; `diptych` unless that says `channel`."""
    return _own_words(places).get("conditioning", "diptych")


def said_conditioning(conditioning: str) -> dict[str, str]:
    """What `sampling.json` says of a conditioning: nothing of the usual one."""
    return {} if conditioning == CONDITIONINGS[0] else {"conditioning": conditioning}


def said_guidance(null_panel: str, relighting: Mapping[str, Any]) -> dict[str, Any]:
    """What `sampling.json` says of the null pass's left panel and of guidance when relighting: nothing of the usual."""
    said: dict[str, Any] = {} if null_panel == NULL_PANELS[0] else {"null_panel": null_panel}
    return said | ({"relight": dict(relighting)} if relighting else {})


def _own_words(places: Sequence[Path]) -> dict[str, Any]:
    """The checked `sampling.json` of the first of these folders or files that has one; empty if none has."""
    path = next((p for p in map(_sampling_file, places) if p.is_file()), None)
    if path is None:
        return {}
    try:
        own = json.loads(path.read_text("utf8"))
        _check(own, [*SAMPLING, "conditioning", "null_panel", "relight"])
        _check(own.get("relight", {}), RELIGHTING)
        return own
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} does not say how to sample this student ({error})") from error


def _check(said: dict[str, Any], known: Sequence[str]) -> None:
    """ValueError or TypeError unless these are known keys with values that can be theirs."""
    if unknown := set(said) - set(known):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    for name, values in (("conditioning", CONDITIONINGS), ("null_panel", NULL_PANELS)):
        if said.get(name, values[0]) not in values:
            raise ValueError(f"{name} is {' or '.join(values)}, not {said[name]!r}")
    for key in said.keys() & SAMPLING.keys():
        float(said[key])


def _sampling_file(place: Path) -> Path:
    return (place if place.is_dir() else place.parent) / SAMPLING_FILE


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


def pick_dtype(weights: Path, device: torch.device) -> torch.dtype:
    """float32 on a CPU; on an accelerator bfloat16 for weights stored so or in 8 bits or less, else float32.

    `weights` is a folder or a file. float16 is storage only.
    """
    if device.type == "cpu":
        return torch.float32
    if weights.suffix == ".gguf":
        return torch.bfloat16
    first = weights if weights.is_file() else next(iter(sorted(weights.glob("*.safetensors"))), None)
    if first is None:
        return torch.float32
    try:
        stored = {tensor.dtype for tensor in open_safetensors(first)[0].values()}
    except UserError:
        return torch.float32  # reading the weights says what is wrong with the file
    return torch.bfloat16 if stored & {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2} else torch.float32


def scaled(lora: Loras) -> list[tuple[Path, float]]:
    """(path, scale) of each LoRA; one path, or one (path, scale), need no list around it."""
    if isinstance(lora, (str, Path)):
        return [(Path(lora), 1.0)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], (int, float)):
        lora = [lora]  # pyright: ignore[reportAssignmentType]
    pairs: list[Any] = [given if isinstance(given, tuple) else (given, 1.0) for given in lora]  # pyright: ignore
    return [(Path(path), float(scale)) for path, scale in pairs]
