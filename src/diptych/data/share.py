"""Files of one run under a second name in another: hard links where the disk allows, else copies.

What is shared is never changed in place, only replaced (`store.write_atomic`), so neither folder can change the other.
Between addresses, or between an address and a disk, parts are copied.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from diptych.data.store import MANIFEST, Dataset
from diptych.errors import UserError
from diptych.utils.paths import files_inside, inside, is_remote


def share(source: str | Path, target: str | Path, fingerprint: str | None = None) -> int:
    """Gives `target` the parts of a data set, the manifest last, and returns how many of them it has then.

    With `fingerprint`, only parts that were made with it are taken, and the manifest only if all of them are. Parts
    that `target` has already stay as they are.
    """
    one, other = Dataset(source), Dataset(target)
    shards = [n for n in one.shards() if fingerprint is None or one.part_fingerprint(n) == fingerprint]
    whole = one.is_complete(fingerprint)
    if not shards and not whole:
        return 0
    if not is_remote(other.url):
        Path(other.url).mkdir(parents=True, exist_ok=True)
    other.clean()
    there = set(other.names())
    for name in [*map(one.part_name, shards), *([MANIFEST] if whole else [])]:
        if name in there:
            continue
        if is_remote(one.url) or is_remote(other.url):
            other.put_file(name, one.read_file(name))
        else:
            link(inside(Path(one.url), name), Path(other.url) / name)
    return len(shards)


def link(path: Path, goal: Path) -> None:
    """`goal` as a second name of the file `path`, or a copy of it; left alone if it exists. UserError if it cannot be
    written."""
    if goal.exists():
        return
    goal.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A name in the hub's cache is a link, and relative: the file behind it is taken.
        os.link(os.path.realpath(path), goal)
    except OSError:
        # Another disk, or a file system without links. The name is one of a killed writer, see store.is_temporary.
        copy = goal.with_name(f".{goal.name}.{os.getpid()}.tmp")
        try:
            shutil.copyfile(path, copy)
            copy.replace(goal)
        except OSError as error:
            with contextlib.suppress(OSError):
                copy.unlink()
            raise UserError(f"cannot write {goal}: {error.strerror or error}") from error


def link_all(source: Path, target: Path, pattern: str) -> None:
    """`link` for every file below `source` whose path in it matches `pattern` (`Path.glob`)."""
    for path in files_inside(source, pattern) if source.resolve() != target.resolve() else ():
        link(path, inside(target, path.relative_to(source).as_posix()))
