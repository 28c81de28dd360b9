"""Converting weights between layouts, tensor by tensor: `diptych convert`.

What can become what is the table in `directions`. Every source is read as a folded student whose tensors are still on
disk (`sources`); every target is a way to write one. So 24 GB pass through a few hundred MB of memory. The result is
published by renaming: a cut conversion leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diptych.errors import UsageError, UserError, nearest
from diptych.student.settings import KEY, Settings, of
from diptych.student.weights import directions, files, lora_delta, original, single_file, sources
from diptych.student.weights.fold import INPUT, INPUT_LAYERS, BiasSplit, shapes_of, some, unfold
from diptych.student.weights.lora_delta import Delta, as_lora, difference, fuse
from diptych.student.weights.lora_file import RELEASED_LORA, lora_deltas, lora_file, read_deltas
from diptych.student.weights.sources import Source
from diptych.student.weights.tensors import Stored, held, open_safetensors, write_safetensors
from diptych.utils.documents import parse_json
from diptych.utils.io import publish
from diptych.utils.opening import INDEX

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INPUT_BIAS = f"{INPUT}.bias"
Report = Callable[[int, int], None]
_CONTROL = "control-lora"
_LORAS = (_CONTROL, *directions.STYLES)
_READERS = {  # where a target keeps a student's settings, and who reads them
    "folded": ("transformer's config", "diptych reads them; pass them to stock diffusers"),
    "released": ("transformer's config", "diptych reads them; pass them to the authors' code"),
    "exported": ("program's extra file diptych.json", "your sampler can follow them: the program is the transformer"),
}


@dataclass(frozen=True)
class Conversion:
    """Everything a writer needs."""

    source: Source
    tensors: dict[str, Stored]  # folded
    split: BiasSplit | None  # of the input bias, where it still is the sum of the two
    lora: Path | None  # a LoRA that is not in the weights
    parts: dict[str, Path]
    extras: list[Path]  # small files beside the weights that a folder keeps: `speed.json`
    base: Path | None
    dtype: torch.dtype | None
    report: Report | None

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's config, as diffusers saves it."""
        return {"_class_name": "FluxTransformer2DModel", **self.source.folded.config}


def convert(
    model: str | Path,
    out: str | Path,
    to: str,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    fuse_lora: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Writes the weights of `model` to `out` in another layout.

    Args:
        model: whatever `diptych.student.load` opens.
        out: a folder; for a target that is one file (`directions.FILES`) a name with its ending.
        to: one of `directions.TARGETS`.
        base: the teacher: needed to or from a control-LoRA. With `to="folded"` its parts (VAE, text encoders, …) are
            copied along, so that stock diffusers opens the folder.
        dtype: float32, float16 or bfloat16; default as stored (a GGUF file's quantized tensors: float32).
        fuse_lora: add the LoRA beside the weights into them. Else it is kept beside them, where the target can.
        report: called as `report(done, total)`: bytes written, or layers compared.

    Returns:
        What was done: source, target, out, equality (`bits`, `function`, or `cast`), lora, split, bytes, seconds.

    Raises:
        UserError, UsageError: the direction is refused, and why; or the source is missing, damaged or of another
        family; or there is too little room. `out` is then as it was.
    """
    started = time.monotonic()
    out = Path(out)
    if to not in directions.TARGETS:
        directions.find("folded", to)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}': {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    ending = directions.FILES.get(to, "")
    if ending != (out.suffix if ending or out.suffix in directions.FILES.values() else ""):
        what = f"a file: end its name in {ending}" if ending else f"a folder: give a name without {out.suffix}"
        raise UsageError(f"{out}: --to {to} writes {what}")
    path, base_folder = sources.resolve(model, base)
    for read in (path, base_folder):
        if read is not None and out.resolve() in (read.resolve(), *read.resolve().parents):
            raise UsageError(f"{out} holds what is to be read; give another name")
    files.check_free(out, overwrite, "pass --overwrite")

    settings = sources.read_settings(path, base_folder)
    if to == "released" and settings.conditioning != "diptych":
        raise UserError(
            f"{path} → {to} is refused: this student is of {settings.conditioning} conditioning, and the authors' code "
            "runs every student as a diptych; --to folded or file keeps it"
        )
    if to == "exported" and settings.reference_attention == "self":
        raise UserError(
            "option_unsuited",
            f"{path} → {to} is refused: with reference_attention self, the reference's keys and values come from a "
            "pass of their own, and a program is one pass; --to folded or file keeps it",
        )
    if to in directions.STYLES and (lora := sources.lora_alone(path)) is not None:
        with _publish(out) as temporary:
            whole = _rewrite_lora(lora, temporary, directions.STYLES[to], DTYPES.get(dtype or ""), settings)
        kept = "cast" if dtype else "function"
        return _result(_CONTROL, to, out, started, equality=kept, settings=settings.values() if whole else {})
    source = sources.open_source(path, base_folder)
    direction = directions.find(source.layout, to)
    if source.layout == to != "file" and not (dtype or fuse_lora or (base_folder and to == "folded")):
        raise UsageError(f"{path} is {to} already; --dtype rewrites it in another precision, --fuse with its LoRA")
    if direction.base and base_folder is None:
        raise UsageError(f"{source.layout} → {to} needs the teacher: give its folder as --base")
    if source.parts and base_folder is not None and to == "folded":
        raise UserError(
            f"{path} holds {', '.join(sorted(source.parts))} beside the transformer, and with --base the base's would "
            "take their place; convert without --base, or load it and call diptych.student.save to keep them"
        )
    job = _job(source, path, base_folder, DTYPES.get(dtype or ""), to, fuse_lora, report)
    _check_room(job, to, out)
    with _publish(out) as temporary:
        _WRITERS[to](job, temporary)
    lora = "none" if source.lora is None else "fused" if job.lora is None else "joined" if to in _LORAS else "kept"
    return _result(
        source.layout,
        to,
        out,
        started,
        equality=_equality(direction, job, fuse_lora, dtype),
        lora=lora,
        split=job.split is not None,
        settings=settings.values(),
        # Of an all-in-one file only the transformer is converted.
        left_out=[*sorted(source.parts), *(extra.name for extra in job.extras if out.is_file())],
        complete=to == "folded" and (out / INDEX).is_file(),  # whether it opens without a base
        ignored_adapter_tensors=len(source.folded.adapters),
    )


@contextmanager
def _publish(out: Path) -> Iterator[Path]:
    """A path to write to under the name of `out`, which single files and exported programs hold inside."""
    try:
        with publish(out) as partial, TemporaryDirectory(".tmp", f".{out.name}.", out.parent) as folder:
            written = Path(folder) / out.name
            yield written
            written.rename(partial)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def _result(source: str, to: str, out: Path, started: float, **found: Any) -> dict[str, Any]:
    """What was done."""
    usual = {"lora": "none", "split": False, "settings": {}, "left_out": [], "complete": False}
    return {
        "source": source,
        "target": to,
        "out": str(out),
        "equality": found["equality"],
        **usual,
        "ignored_adapter_tensors": 0,
        **found,
        "bytes": sum(f.stat().st_size for f in ([out] if out.is_file() else out.rglob("*")) if f.is_file()),
        "seconds": round(time.monotonic() - started, 2),
    }


def _job(
    source: Source,
    path: Path,
    base: Path | None,
    dtype: torch.dtype | None,
    to: str,
    fuse_lora: bool,
    report: Report | None,
) -> Conversion:
    tensors = {key: single_file.dequantized(tensor) for key, tensor in source.tensors.items()}
    lora = source.lora
    if lora is not None:
        lora_file(lora)
        if to in directions.FILES and to not in _LORAS and source.layout != _CONTROL and not fuse_lora:
            raise UserError(
                f"{source.layout} → {to} without --fuse is refused: beside the weights lies {lora.name}, which "
                f"a single file cannot hold; --fuse adds it into them, or convert {source.place} to leave it out"
            )
        if to not in _LORAS and (fuse_lora or source.layout == _CONTROL):
            deltas = read_deltas(lora, {key: tensor.shape for key, tensor in tensors.items()})
            half = next((t.dtype for layer in deltas if (t := tensors[f"{layer}.weight"]).dtype.itemsize < 4), None)
            if half is not None and dtype is None:
                name = str(half).removeprefix("torch.")
                raise UserError(
                    f"{source.layout} → {to} without --dtype is refused: adding a LoRA to weights in {name} rounds it "
                    f"away in part; --dtype float32 keeps it whole, --dtype {name} accepts the rounding"
                )
            tensors, lora = fuse(tensors, deltas, dtype), None
    split = source.folded.split
    if split is not None and not split.of(tensors[INPUT_BIAS].read()):
        split = None
    dtype = dtype or (torch.float32 if source.layout == "gguf" else None)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    if split is not None and dtype is not None:  # the parts are cast, and summed in that type: they stay its parts
        split = BiasSplit(split.x.to(dtype), split.c.to(dtype))
        tensors[INPUT_BIAS] = held(split.x + split.c)
    roots = [root for root in (path, base) if root is not None and root.is_dir()]
    extras = [place for root in roots if (place := root / files.RATIOS_FILE).is_file()][:1]
    return Conversion(source, tensors, split, lora, sources.find_parts(path, base), extras, base, dtype, report)


def _write_folded(job: Conversion, folder: Path) -> None:
    files.write_transformer(folder / "transformer", job.tensors, job.config, job.report)
    if job.split is not None:
        files.write_split(job.split, folder / "transformer")
    _copy_beside(job, folder)
    sources.copy_parts(job.parts, folder, of(job.source.folded.config).pipeline_class)


def _write_released(job: Conversion, folder: Path) -> None:
    state = {k: t.read() if k.rpartition(".")[0] in INPUT_LAYERS else t for k, t in job.tensors.items()}
    released, config = unfold(state, job.source.folded.config, job.split)
    stored = {key: tensor if isinstance(tensor, Stored) else held(tensor) for key, tensor in released.items()}
    files.write_transformer(folder / "transformer", stored, config, job.report)
    _copy_beside(job, folder)


def _write_file(job: Conversion, path: Path) -> None:
    write_safetensors(path, job.tensors, _file_header(job, path, "diffusers"), job.report)


def _write_original(job: Conversion, path: Path) -> None:
    write_safetensors(path, original.to_original(job.tensors), _file_header(job, path, "comfyui"), job.report)


def _file_header(job: Conversion, path: Path, style: str) -> dict[str, str]:
    width, guidance = job.tensors[f"{INPUT}.weight"].shape[0], job.config.get("guidance_embeds")
    conditioning = of(job.config).conditioning
    spec = files.modelspec(path.stem, style, lora=False, width=width, guidance=guidance, conditioning=conditioning)
    return {**files.header_of(job.config, job.split), **spec}


def _write_exported(job: Conversion, path: Path) -> None:
    from diptych.student.weights.exported import export

    export({key: tensor.read().float() for key, tensor in job.tensors.items()}, job.source.folded.config, path)


def _write_style(style: str, job: Conversion, path: Path) -> None:
    tensors, metadata = lora_delta.write(_deltas(job), style)
    own, width = of(job.source.folded.config), job.tensors[f"{INPUT}.weight"].shape[0]
    metadata |= files.modelspec(path.stem, style, lora=True, width=width, conditioning=own.conditioning)
    metadata |= _settings_header(own)
    write_safetensors(path, {key: tensor.to(job.dtype) for key, tensor in tensors.items()}, metadata)


def _rewrite_lora(lora: Path, path: Path, style: str, dtype: torch.dtype | None, settings: Settings) -> bool:
    """Writes a LoRA file in another style of keys; no base is needed for that. Whether it is a student's, and not one
    to be put on a student."""
    deltas, header = lora_deltas(lora), open_safetensors(lora)[1]
    width = next((delta.a.shape[1] for name, delta in deltas.items() if name.endswith("attn.to_q")), 0)
    width = deltas[INPUT].b.shape[0] if INPUT in deltas else width
    tensors, metadata = lora_delta.write(deltas, style)
    metadata |= files.modelspec(path.stem, style, lora=True, width=width, conditioning=settings.conditioning)
    own = INPUT in deltas or settings.conditioning == "tokens"
    if own:
        metadata |= _settings_header(settings, header)
    elif files.HEADER_KEY in header:
        metadata[files.HEADER_KEY] = header[files.HEADER_KEY]
    write_safetensors(path, {key: tensor.to(dtype) for key, tensor in tensors.items()}, metadata)
    return own


def _settings_header(settings: Settings, header: Mapping[str, str] | None = None) -> dict[str, str]:
    """Metadata of a LoRA file with a student's settings, where a single file has its config; `header` is what the file
    had before."""
    said = parse_json((header or {}).get(files.HEADER_KEY, "{}"))
    return {files.HEADER_KEY: json.dumps({**said, "config": {KEY: settings.values()}}, sort_keys=True)}


def _write_control_lora(job: Conversion, folder: Path) -> None:
    """The student minus its teacher, and the LoRA beside it, as one LoRA file."""
    tensors, metadata = as_lora(_deltas(job))
    folder.mkdir()
    metadata |= _settings_header(of(job.source.folded.config))
    write_safetensors(folder / RELEASED_LORA, {k: t.to(job.dtype) for k, t in tensors.items()}, metadata)
    for extra in job.extras:
        shutil.copyfile(extra, folder / extra.name)


def _deltas(job: Conversion) -> dict[str, Delta]:
    """What a student adds to its teacher, the LoRA beside it included."""
    assert job.base is not None
    teacher, config = sources.teacher_state(job.base)
    tokens = of(job.source.folded.config).conditioning == "tokens"
    wide = {"in_channels": 2 * config["in_channels"], "out_channels": config["in_channels"]}
    expected = shapes_of({**config, **({} if tokens else wide)})
    shapes = {key: tensor.shape for key, tensor in job.tensors.items()}
    if other := sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)):
        raise UserError(
            f"{job.base} is of another family than {job.source.place}: {len(other)} tensors differ in shape, first "
            f"{other[0]}; give the base that this student was trained from"
        )
    deltas = difference(job.tensors, teacher, job.report)
    if job.lora is not None:
        beside = read_deltas(job.lora, shapes)
        if dora := [layer for layer, delta in beside.items() if delta.magnitude is not None]:
            raise UserError(
                f"{job.lora} is a DoRA on {some(dora)}, which cannot be joined with what the weights add; pass --fuse "
                "and write a folder or one file"
            )
        for layer, delta in beside.items():
            deltas[layer] = deltas[layer].joined(delta) if layer in deltas else delta
    deltas[INPUT] = deltas[INPUT].whole()
    if tokens and not any(part.any() for part in (deltas[INPUT].b, deltas[INPUT].bias) if part is not None):
        del deltas[INPUT]  # it is the teacher's
    return deltas


_WRITERS: Mapping[str, Callable[[Conversion, Path], None]] = {
    "folded": _write_folded,
    "released": _write_released,
    "file": _write_file,
    "control-lora": _write_control_lora,
    "original": _write_original,
    "exported": _write_exported,
    **{target: partial(_write_style, style) for target, style in directions.STYLES.items()},
}


def _copy_beside(job: Conversion, folder: Path) -> None:
    """The LoRA beside the weights, if they do not hold it, and the other small files."""
    if job.lora is not None:
        shutil.copyfile(job.lora, folder / RELEASED_LORA)
    for extra in job.extras:
        shutil.copyfile(extra, folder / extra.name)


def _equality(direction: directions.Direction, job: Conversion, fuse_lora: bool, dtype: str | None) -> str:
    """What this conversion kept: `cast` where the precision changed, `function` where bits could not be kept."""
    if dtype is not None:
        return "cast"
    fused = fuse_lora and job.source.lora is not None
    lost_split = direction.target == "released" and job.split is None
    return "function" if fused or lost_split or job.source.scaled else direction.equality


def _check_room(job: Conversion, to: str, out: Path) -> None:
    """UserError unless the disk has room for what will be written."""
    if to in _LORAS:
        return  # small, and known only after the comparison
    needed = sum(tensor.nbytes for tensor in job.tensors.values())
    if to == "folded" and all(part in job.parts for part in sources.NEEDED):
        needed += sum(f.stat().st_size for place in job.parts.values() for f in place.rglob("*") if f.is_file())
    around = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(around).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free")


def summary(done: Mapping[str, Any]) -> str:
    """One line for people."""
    kept = {
        "bits": "bit for bit",
        "function": "the same function, in other bits",
        "cast": "in another precision",
    }[done["equality"]]
    lora = {
        "none": "",
        "kept": "; the LoRA is kept beside the weights",
        "fused": "; the LoRA is in the weights",
        "joined": "; the LoRA is part of it",
    }
    open_with = "" if done["complete"] else "; open it with --base and the teacher's folder"
    first = f"{done['source']} → {done['target']}: {done['bytes'] / 1e6:,.1f} MB, {kept}{lora[done['lora']]}{open_with}"
    return "\n".join([first, *_settings_lines(done)])


def _settings_lines(done: Mapping[str, Any]) -> Iterator[str]:
    """Which settings are not the family's, and who reads them; and what the target has no room for."""
    usual = Settings().values()
    own = {name: value for name, value in done["settings"].items() if usual.get(name) != value}
    if "words" in own:
        own["words"] = f"{len(own['words'])}, lower-case"
    if own:
        said = ", ".join(f"{name} {json.dumps(own[name]).replace(chr(34), '')}" for name in own)
        where, readers = _READERS.get(done["target"], ("metadata", "diptych reads them; pass them to other programs"))
        yield f"Settings kept in the {where}: {said}. Only {readers}."
    if done["left_out"]:
        yield f"Left out, because {done['target']} holds the transformer alone: {', '.join(done['left_out'])}."
