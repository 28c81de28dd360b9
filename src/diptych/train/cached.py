"""Tensor files that training makes once and reads again: latents, and the negatives of preference training.

A file is published by renaming and carries the hash of all it holds, so that a damaged or swapped one is found when
training starts, and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from diptych.errors import UserError

HASH = "sha256"  # the header's key for the hash of the rest
log = logging.getLogger(__name__)


def write(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a file of a cache, the hash of its header, tensors and place in the header. UserError if it cannot."""
    header = header or {}
    publish(tensors, path, header | {HASH: _digest(path, header, tensors)})


def publish(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all. UserError if it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; make room, then run the same command again") from error


def is_whole(path: Path) -> bool:
    """Whether `write` has made this very file; one that was damaged or swapped since is none, and a warning says so.

    A process reads its bytes once while the file stays as it is.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return False
    stat = path.stat()
    try:
        _check(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s is damaged (%s); it is made again", path, error)
        return False
    return True


@lru_cache(maxsize=100_000)
def _check(path: Path, state: tuple[int, ...]) -> None:
    """ValueError where a file's hash is not that of what it holds; `state` tells its versions apart."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # the header's lengths are compared with the file's
        header = dict(file.metadata() or {})
        said = header.pop(HASH, "")
        names = file.keys()
        if said != _digest(path, header, {name: file.get_tensor(name) for name in names}):
            raise ValueError("its sha256 differs")


def _digest(path: Path, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of a file's header and tensors and of its place in the cache, so that swapped files are found too."""
    digest = hashlib.sha256(json.dumps([path.parent.name, path.name, sorted(header.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
