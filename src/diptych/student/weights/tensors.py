"""Tensors that stay on disk until they are wanted, and safetensors files written one tensor at a time.

A `Stored` knows its shape and dtype and how to be read. Converting 24 GB is then a matter of composing `Stored`s and
writing them in order: what is in memory at once is one tensor. safetensors files are mapped, so even that one is the
file's own pages.
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
    """A tensor not yet read. `read` may be called again and must give the same values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    packed: int | None = None  # bytes on disk, where that is not shape times dtype (GGUF)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize if self.packed is None else self.packed

    def to(self, dtype: torch.dtype | None) -> Stored:
        """Cast when read, if it is floating point and a dtype is given."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return Stored(self.shape, dtype, lambda: self.read().to(dtype))

    def rows(self, start: int, stop: int) -> Stored:
        """Rows `start` to `stop`, exclusive."""
        packed = None if self.packed is None else self.packed * (stop - start) // self.shape[0]
        return Stored((stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop], packed)


def held(tensor: torch.Tensor) -> Stored:
    """A tensor that is in memory already."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a safetensors file, unread, and its metadata; UserError if it is missing, cut short or damaged.

    The library holds the header against the file's size, so a truncated file is found here, before anything is read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} is missing; is the folder complete?")
    try:
        file: Any = safe_open(path, "pt")
        shapes = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        found = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in shapes.items()}
        metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, "safetensors", error) from error
    if strange := sorted({name for _, name in found.values()} - _DTYPES.keys()):
        raise UserError(f"{path} holds tensors of type {', '.join(strange)}, which cannot be opened here")
    read = file.get_tensor
    tensors = {
        key: Stored(shape, _DTYPES[name], lambda key=key: read(key))  # the library's copy-free mapping
        for key, (shape, name) in found.items()
    }
    return tensors, metadata


def damaged(path: Path, kind: str, error: Exception) -> UserError:
    """What is said of a file that should be of a kind and is not."""
    with path.open("rb") as file:
        pointer = file.read(len(_POINTER)) == _POINTER
    if pointer:
        return UserError(f"{path} is a Git LFS pointer and not the file itself; fetch that: git lfs pull")
    return UserError(
        f"{path} ({path.stat().st_size:,} bytes) is not a whole {kind} file ({describe(error)}); "
        "it was probably cut short while being copied: fetch it again"
    )


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a safetensors file tensor by tensor; equal tensors and metadata give equal bytes.

    The order is the library's own: wide dtypes first, then by name, which keeps every tensor aligned.
    `report(done, total)` counts bytes.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((metadata or {}).items()))}}
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


# One thread at a time makes modules. diffusers and transformers patch torch for the whole process while they read
# weights, so a module that another thread builds meanwhile is left without values. A server with a worker for each
# device has such threads.
