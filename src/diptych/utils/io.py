"""Atomic writes, and sha256 of data and files.

A reader never sees an incomplete file, however the writer ended: everything is written under a temporary name in the
same folder, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.utils.paths import is_remote


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, where the block makes a file or a folder. It replaces `path` when the
    block succeeds. If the block or the renaming fails, `path` stays unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    try:
        yield partial
        if not path.is_dir() and not (path.exists() and partial.is_dir()):
            os.replace(partial, path)
            return
        path.rename(old)  # a folder cannot be replaced in one step
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
    finally:
        for leftover in (partial, old):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file with `publish` and flushes it to the disk. At an address (`paths.place`) it is one put.

    UserError if it cannot be written.
    """
    if is_remote(path):
        path.write_bytes(data)
        return
    try:
        with publish(path) as partial, partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError("path_unwritable", f"Cannot write {path}: {error.strerror or error}.") from error


def is_temporary(name: str) -> bool:
    """Whether a name is a temporary one of `publish`, left by a writer that was killed."""
    return name.startswith(".") and name.endswith(".tmp")


def clean(folder: Path) -> None:
    """Removes the temporary files of killed writers from a folder. Only the folder's single writer may call it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path.name):
            _remove(path)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents. UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("path_unwritable", f"{folder}: cannot be created ({error.strerror or error})") from error


def check_writable(folder: Path) -> None:
    """UserError if the user cannot write to a folder, or to the nearest existing one above it."""
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not is_remote(folder) and not os.access(above, os.W_OK):
        raise UserError(
            "path_unwritable", f"{above}: you may not write to it. Choose another folder or change its permissions."
        )


def sha256(data: bytes | str) -> str:
    """The sha256 of bytes, or of a text in UTF-8, as hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_json(value: Any, **options: Any) -> str:
    """The sha256 of a value as JSON with sorted keys; `options` are those of `json.dumps`."""
    return sha256(json.dumps(value, **{"sort_keys": True, **options}))


def sha256_file(path: Path) -> str:
    """The sha256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
