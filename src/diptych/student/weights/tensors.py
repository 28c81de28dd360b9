"""Tensors that stay on disk until they are needed, and safetensors files written one tensor at a time.

A `Stored` has the shape and dtype of a tensor and a function that reads it. Converting 24 GB composes `Stored`s and
writes them in order, so only one tensor is in memory at a time. safetensors files are memory-mapped, so even that one
consists of the file's pages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError, describe

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_POINTER = b"version https://git-lfs"
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read. `read` may be called several times and must return the same values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    packed: int | None = None  # bytes on disk, where that is not shape times dtype (GGUF)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize if self.packed is None else self.packed

    def to(self, dtype: torch.dtype | None) -> Stored:
        """The same tensor, cast to `dtype` when it is read. Integers and None change nothing."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return Stored(self.shape, dtype, lambda: self.read().to(dtype))

    def rows(self, start: int, stop: int) -> Stored:
        """Rows `start` to `stop`, exclusive."""
        packed = None if self.packed is None else self.packed * (stop - start) // self.shape[0]
        return Stored((stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop], packed)


def held(tensor: torch.Tensor) -> Stored:
    """Wraps a tensor that is in memory."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a safetensors file, unread, and the file's metadata.

    The library compares the header with the file's size, so a truncated file fails here, before anything is read.
    UserError if the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError("model_incomplete", f"Weights not found: {path}. Check that the folder is complete.")
    try:
        file: Any = safe_open(path, "pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        headers = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, "safetensors", error) from error
    if unknown := sorted({name for _, name in headers.values()} - _DTYPES.keys()):
        raise UserError("model_unsupported", f"{path} has tensors of an unsupported type: {', '.join(unknown)}.")
    read = file.get_tensor
    tensors = {
        key: Stored(shape, _DTYPES[name], lambda key=key: read(key))  # the library's copy-free mapping
        for key, (shape, name) in headers.items()
    }
    return tensors, metadata


def damaged(path: Path, kind: str, error: Exception) -> UserError:
    """The error for a file that cannot be read as its kind (`safetensors`, `GGUF`)."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_POINTER)) == _POINTER
    if is_pointer:
        return UserError("model_incomplete", f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull.")
    return UserError(
        "weights_damaged",
        f"{path} ({path.stat().st_size:,} bytes) is not a complete {kind} file ({describe(error)}). "
        "It was probably truncated while it was copied; fetch it again.",
    )


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a safetensors file tensor by tensor. Equal tensors and metadata give equal bytes.

    The order is the library's: wide dtypes first, then by name, which keeps every tensor aligned. `format: pt` comes
    before the sorted metadata, unless that has a `format`. `report(done, total)` counts bytes.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    named = dict(sorted((metadata or {}).items()))
    header: dict[str, Any] = {"__metadata__": named if "format" in named else {"format": "pt", **named}}
    total = 0
    for key in order:
        tensor, start = tensors[key], total
        total += tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, total]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            value = tensors[key].read().detach().cpu().contiguous()
            assert (tuple(value.shape), value.dtype) == (tensors[key].shape, tensors[key].dtype), key
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            done += tensors[key].nbytes
            if report:
                report(done, total)
