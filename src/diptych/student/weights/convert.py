"""Conversion of weights between layouts, tensor by tensor: `diptych convert`.

The table in `directions` lists the supported conversions. Every source is read as a folded student whose tensors are
still on disk (`sources`); every target is a way to write one. A conversion of 24 GB therefore needs a few hundred MB of
memory. The result is published by renaming: an interrupted conversion leaves nothing behind.
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
from diptych.student.weights.sources import StudentSource
from diptych.student.weights.tensors import Stored, held, open_safetensors, write_safetensors
from diptych.utils.documents import parse_json
from diptych.utils.io import publish
from diptych.utils.opening import INDEX

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INPUT_BIAS = f"{INPUT}.bias"
Report = Callable[[int, int], None]
_CONTROL = "control-lora"
_LORAS = (_CONTROL, *directions.STYLES)


@dataclass(frozen=True)
class Conversion:
    """Everything a writer needs."""

    source: StudentSource
    tensors: dict[str, Stored]  # folded
    split: BiasSplit | None  # of the input bias, if that still is the sum of its two parts
    lora: Path | None  # a LoRA that is not in the weights
    parts: dict[str, Path]
    extras: list[Path]  # small files beside the weights that a folder also gets: `speed.json`
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
        model: any path or name that `diptych.student.load` opens.
        out: a folder; for a target that is one file (`directions.FILES`), a name with its suffix.
        to: one of `directions.TARGETS`.
        base: the teacher's folder, required to or from a control-LoRA. With `to="folded"` its parts (VAE, text
            encoders, …) are copied too, so that stock diffusers opens the folder.
        dtype: float32, float16 or bfloat16. Defaults to the stored type (float32 for quantized GGUF tensors).
        fuse_lora: add the LoRA beside the weights into them. Otherwise it is copied beside them, if the target allows.
        report: called as `report(done, total)` with bytes written, or layers compared.

    Returns:
        A summary: source, target, out, equality (`bits`, `function`, or `cast`), lora, split, bytes, seconds.

    Raises:
        UserError, UsageError: the conversion is not supported; the source is missing, damaged or of another family;
            or the disk is too small. `out` is then unchanged.
    """
    started = time.monotonic()
    out = Path(out)
    if to not in directions.TARGETS:
        directions.find("folded", to)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            "name_unknown", f"Unknown dtype '{dtype}'. Use one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )
    suffix = directions.FILES.get(to, "")
    if suffix != (out.suffix if suffix or out.suffix in directions.FILES.values() else ""):
        what = f"a file. Use a name that ends in {suffix}" if suffix else f"a folder. Use a name without {out.suffix}"
        raise UsageError("option_invalid", f"{out}: --to {to} writes {what}.")
    path, base_folder = sources.resolve(model, base)
    for read in (path, base_folder):
        if read is not None and out.resolve() in (read.resolve(), *read.resolve().parents):
            raise UsageError("output_collision", f"{out} contains the input {read}. Choose another name.")
    files.check_free(out, overwrite, "pass --overwrite")

    settings = sources.read_settings(path, base_folder)
    if to == "released" and settings.conditioning != "diptych":
        raise UserError(
            "model_unsupported",
            f"Cannot convert {path} → {to}: this student has {settings.conditioning} conditioning, and the authors' "
            "code runs only diptych conditioning. Use --to folded or --to file.",
        )
    if to == "exported" and settings.reference_attention == "self":
        raise UserError(
            "option_unsuited",
            f"Cannot convert {path} → {to}: with reference_attention self, the reference needs a separate pass, and a "
            "program is one pass. Use --to folded or --to file.",
        )
    if to in directions.STYLES and (lora := sources.lora_alone(path)) is not None:
        with _publish(out) as temporary:
            whole = _rewrite_lora(lora, temporary, directions.STYLES[to], DTYPES.get(dtype or ""), settings)
        equality = "cast" if dtype else "function"
        return _result(_CONTROL, to, out, started, equality=equality, settings=settings.values() if whole else {})
    source = sources.open_source(path, base_folder)
    direction = directions.find(source.layout, to)
    if source.layout == to != "file" and not (dtype or fuse_lora or (base_folder and to == "folded")):
        raise UsageError(
            "option_missing",
            f"{path} is already {to}. Pass --dtype to change the precision, or --fuse to add its LoRA to the weights.",
        )
    if direction.base and base_folder is None:
        raise UsageError("option_missing", f"{source.layout} → {to} needs the teacher. Pass its folder with --base.")
    if source.parts and base_folder is not None and to == "folded":
        raise UserError(
            "option_conflict",
            f"{path} has {', '.join(sorted(source.parts))} beside the transformer, and --base would replace them. "
            "Convert without --base, or load the file and call diptych.student.save to keep them.",
        )
    job = _conversion(source, path, base_folder, DTYPES.get(dtype or ""), to, fuse_lora, report)
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
    """A path to write to with the name of `out`, which single files and exported programs contain."""
    try:
        with publish(out) as partial, TemporaryDirectory(".tmp", f".{out.name}.", out.parent) as folder:
            written = Path(folder) / out.name
            yield written
            written.rename(partial)
    except OSError as error:
        raise UserError("path_unwritable", f"Cannot write {out}: {error.strerror or error}.") from error


def _result(source: str, to: str, out: Path, started: float, **values: Any) -> dict[str, Any]:
    """The summary that `convert` returns; `values` replace the defaults."""
    return {
        "source": source,
        "target": to,
        "out": str(out),
        "equality": None,
        "lora": "none",
        "split": False,
        "settings": {},
        "left_out": [],
        "complete": False,
        "ignored_adapter_tensors": 0,
        **values,
        "bytes": sum(f.stat().st_size for f in ([out] if out.is_file() else out.rglob("*")) if f.is_file()),
        "seconds": round(time.monotonic() - started, 2),
    }


def _conversion(
    source: StudentSource,
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
                "option_missing",
                f"{source.layout} → {to} needs --fuse: a single file cannot store {lora.name} beside the weights. "
                f"Pass --fuse to add it to them, or convert {source.place} to leave it out.",
            )
        if to not in _LORAS and (fuse_lora or source.layout == _CONTROL):
            deltas = read_deltas(lora, {key: tensor.shape for key, tensor in tensors.items()})
            half = next((t.dtype for layer in deltas if (t := tensors[f"{layer}.weight"]).dtype.itemsize < 4), None)
            if half is not None and dtype is None:
                name = str(half).removeprefix("torch.")
                raise UserError(
                    "option_missing",
                    f"{source.layout} → {to} needs --dtype: adding a LoRA to weights in {name} rounds part of it away. "
                    f"Pass --dtype float32 to prevent that, or --dtype {name} to accept it.",
                )
            tensors, lora = fuse(tensors, deltas, dtype), None
    split = source.folded.split
    if split is not None and not split.of(tensors[INPUT_BIAS].read()):
        split = None
    dtype = dtype or (torch.float32 if source.layout == "gguf" else None)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    if split is not None and dtype is not None:  # the parts are cast and summed in that type, so they stay its parts
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
    settings, width = of(job.source.folded.config), job.tensors[f"{INPUT}.weight"].shape[0]
    metadata |= files.modelspec(path.stem, style, lora=True, width=width, conditioning=settings.conditioning)
    metadata |= _settings_header(settings)
    write_safetensors(path, {key: tensor.to(job.dtype) for key, tensor in tensors.items()}, metadata)


def _rewrite_lora(lora: Path, path: Path, style: str, dtype: torch.dtype | None, settings: Settings) -> bool:
    """Writes a LoRA file in another style of keys, without a base. Returns whether it is a control-LoRA, which makes a
    student, and not a LoRA for one."""
    deltas, header = lora_deltas(lora), open_safetensors(lora)[1]
    width = next((delta.a.shape[1] for name, delta in deltas.items() if name.endswith("attn.to_q")), 0)
    width = deltas[INPUT].b.shape[0] if INPUT in deltas else width
    tensors, metadata = lora_delta.write(deltas, style)
    metadata |= files.modelspec(path.stem, style, lora=True, width=width, conditioning=settings.conditioning)
    is_student = INPUT in deltas or settings.conditioning == "tokens"
    if is_student:
        metadata |= _settings_header(settings, header)
    elif files.HEADER_KEY in header:
        metadata[files.HEADER_KEY] = header[files.HEADER_KEY]
    write_safetensors(path, {key: tensor.to(dtype) for key, tensor in tensors.items()}, metadata)
    return is_student


def _settings_header(settings: Settings, header: Mapping[str, str] | None = None) -> dict[str, str]:
    """Metadata of a LoRA file: a student's settings, under the key of a single file's config. `header` is the file's
    metadata so far."""
    before = parse_json((header or {}).get(files.HEADER_KEY, "{}"))
    return {files.HEADER_KEY: json.dumps({**before, "config": {KEY: settings.values()}}, sort_keys=True)}


def _write_control_lora(job: Conversion, folder: Path) -> None:
    """The student minus its teacher, and the LoRA beside it, as one LoRA file."""
    tensors, metadata = as_lora(_deltas(job))
    folder.mkdir()
    metadata |= _settings_header(of(job.source.folded.config))
    write_safetensors(folder / RELEASED_LORA, {k: t.to(job.dtype) for k, t in tensors.items()}, metadata)
    for extra in job.extras:
        shutil.copyfile(extra, folder / extra.name)


def _deltas(job: Conversion) -> dict[str, Delta]:
    """The difference between a student and its teacher, with the LoRA beside it."""
    assert job.base is not None
    teacher, config = sources.teacher_state(job.base)
    tokens = of(job.source.folded.config).conditioning == "tokens"
    wide = {"in_channels": 2 * config["in_channels"], "out_channels": config["in_channels"]}
    expected = shapes_of({**config, **({} if tokens else wide)})
    shapes = {key: tensor.shape for key, tensor in job.tensors.items()}
    if other := sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)):
        raise UserError(
            "model_mismatch",
            f"{job.base} is of another family than {job.source.place}: {len(other)} tensors differ in shape, first "
            f"{other[0]}. Pass the base that this student was trained from.",
        )
    deltas = difference(job.tensors, teacher, job.report)
    if job.lora is not None:
        beside = read_deltas(job.lora, shapes)
        if dora := [layer for layer, delta in beside.items() if delta.magnitude is not None]:
            raise UserError(
                "lora_unsupported",
                f"{job.lora} is a DoRA on {some(dora)} and cannot be joined with the difference of the weights. Pass "
                "--fuse and write a folder or one file.",
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
    """Copies the LoRA beside the weights, unless it is in them, and the other small files."""
    if job.lora is not None:
        shutil.copyfile(job.lora, folder / RELEASED_LORA)
    for extra in job.extras:
        shutil.copyfile(extra, folder / extra.name)


def _equality(direction: directions.Direction, job: Conversion, fuse_lora: bool, dtype: str | None) -> str:
    """What this conversion preserved: `cast` if the precision changed, `function` if bits could not be preserved."""
    if dtype is not None:
        return "cast"
    fused = fuse_lora and job.source.lora is not None
    lost_split = direction.target == "released" and job.split is None
    return "function" if fused or lost_split or job.source.scaled else direction.equality


def _check_room(job: Conversion, to: str, out: Path) -> None:
    """UserError if the disk has too little space for the result."""
    if to in _LORAS:
        return  # small, and its size is known only after the comparison
    needed = sum(tensor.nbytes for tensor in job.tensors.values())
    if to == "folded" and all(part in job.parts for part in sources.NEEDED):
        needed += sum(f.stat().st_size for place in job.parts.values() for f in place.rglob("*") if f.is_file())
    around = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(around).free
    if free < needed:
        raise UserError(
            "path_unwritable",
            f"{out} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. Choose another disk.",
        )
