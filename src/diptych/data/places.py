"""The files of a run that need a disk of this machine, its log, its lock, and files that runs share.

A run may be at an address (`paths.place`); its rows are read and written there (`store`). Training, weights to open,
locks and replies of language models need a disk, so each address has a folder on this machine, its `desk`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diptych.data.store import MANIFEST, Dataset
from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.io import publish, sha256
from diptych.utils.paths import files_inside, inside, is_remote, place, refuse_link

if TYPE_CHECKING:
    from upath import UPath

CACHE = Path("~/.cache/diptych/runs")
STAYS = re.compile(r"training/(latents|latest|best|step-\d+)\b")  # large, and needed only to resume training


def desk(run: str | Path | UPath) -> Path:
    """The folder of a run on this machine: the run's folder, or, for an address, one in `CACHE`."""
    if not is_remote(run):
        return Path(str(run))
    return _cached(run).expanduser()


def answers(run: str | Path | UPath, everywhere: bool) -> Path:
    """The file of a language model's replies to a run. With `everywhere`, each machine has one in its home folder, for
    workers on several machines: SQLite's locks do not work on network file systems."""
    folder = _cached(run if is_remote(run) else Path(str(run)).resolve()) if everywhere else desk(run)
    return folder / "answers.sqlite"


def _cached(run: str | Path | UPath) -> Path:
    return CACHE / sha256(str(run).rstrip("/"))[:16]


def bring(run: str | Path | UPath, name: str) -> Path:
    """The folder `name` of a run on this machine's disk. From an address, files of another size are fetched first.

    UserError if a file cannot be read.
    """
    if not is_remote(run):
        return Path(str(run)) / name
    source, target = cast("UPath", place(run) / name), desk(run) / name
    for file in source.rglob("*") if source.is_dir() else []:
        if file.is_file():
            local = inside(target, str(file.relative_to(source)))
            if not local.is_file() or local.stat().st_size != file.stat().st_size:
                local.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, "get_file", file.path, str(local))
    return target


def send(run: str | Path | UPath, name: str) -> None:
    """Copies the folder `name` from the run's desk to its address, except what `STAYS`. Local runs need no copy."""
    if not is_remote(run):
        return
    source, target = desk(run) / name, cast("UPath", place(run) / name)
    files = [file for file in source.rglob("*") if file.is_file()]
    # The summary says that training has finished, so it comes last.
    for file in sorted(files, key=lambda file: (file.name == "summary.json", file)):
        inner = file.relative_to(source).as_posix()
        if not STAYS.match(inner):
            _copy(target / inner, "put_file", str(file), (target / inner).path)


def _copy(remote: UPath, method: str, source: str, target: str) -> None:
    try:
        getattr(remote.fs, method)(source, target)
    except OSError as error:
        raise UserError("path_unreadable", f"cannot copy {remote}: {error.strerror or error}") from error


# A run's log: `log.jsonl`, one JSON object per line, append-only. It holds what differs between two runs of one recipe
# and so must not be in the data: times, machine, attempts.

LOG = "log.jsonl"


def append(run_dir: str | Path, event: str, **values: Any) -> None:
    """Appends one line to a run's log: the time, the event's name, and `values`."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **values}
    path = place(run_dir) / LOG
    if is_remote(path):  # object stores cannot append; the run has one process, which rewrites the file
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return
    with refuse_link(path).open("ab+") as stream:
        # A process that was killed while writing leaves no newline. Start a new line, so that only one is lost.
        if stream.seek(0, os.SEEK_END) and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            stream.write(b"\n")
        stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """All complete events of a run's log, in order; none if there is no log."""
    path = place(run_dir) / LOG
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            events.append(parse_json(line))
        except ValueError:
            continue  # incomplete; see `append`
    return events


def seconds(run_dir: str | Path) -> dict[str, float]:
    """Seconds in each stage, summed over all attempts that reached its end."""
    spent: dict[str, float] = {}
    for event in read(run_dir):
        if event.get("event") == "stage" and "seconds" in event:
            spent[event["stage"]] = round(spent.get(event["stage"], 0.0) + event["seconds"], 2)
    return spent


# One writer at a time. The system drops the lock with its holder, so a killed process leaves nothing to clear.


@contextmanager
def lock(place: Path) -> Iterator[None]:
    """Keeps all other processes out of a folder, which is created if it is missing.

    UserError if another process is in it. An address cannot be locked; only this machine's processes are kept out.
    """
    from filelock import FileLock, Timeout

    folder = desk(place)
    file = refuse_link(folder / ".lock")

    def write_holder(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without flock there would be a marker file, which a killed process leaves behind.
        file_lock = FileLock(file, fallback_to_soft=False, preserve_lock_file=True, on_acquired=write_holder)
        held = file_lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            "output_busy",
            f"another diptych (process {file.read_text()}) is writing {place}; wait for it to end, or choose another "
            "folder",
        ) from None
    except OSError as error:
        raise UserError(
            "path_unwritable", f"cannot write {file}: {error.strerror or error}; choose another folder"
        ) from error
    with held:
        yield


# Files that two runs share: hard links where the disk allows them, else copies. Shared files are never changed in
# place, only replaced (`io.publish`), so neither folder can change the other. Parts at addresses are copied.


def share(source: str | Path, target: str | Path, fingerprint: str | None = None) -> int:
    """Links or copies the parts of a data set into `target`, the manifest last. Returns the number of parts.

    With `fingerprint`, only parts that were made with it are taken, and the manifest only if all were. Parts that
    `target` already has stay as they are.
    """
    old, new = Dataset(source), Dataset(target)
    shards = [n for n in old.shards() if fingerprint is None or old.part_fingerprint(n) == fingerprint]
    complete = old.is_complete(fingerprint)
    if not shards and not complete:
        return 0
    if not is_remote(new.url):
        Path(new.url).mkdir(parents=True, exist_ok=True)
    new.clean()
    existing = set(new.names())
    for name in [*map(old.part_name, shards), *([MANIFEST] if complete else [])]:
        if name in existing:
            continue
        if is_remote(old.url) or is_remote(new.url):
            new.put_file(name, old.read_file(name))
        else:
            link(inside(Path(old.url), name), Path(new.url) / name)
    return len(shards)


def link(path: Path, goal: Path) -> None:
    """Makes `goal` a hard link to the file `path`, or a copy of it, unless it exists. UserError if it cannot."""
    if goal.exists():
        return
    goal.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Names in the hub's cache are relative links, so the file behind them is linked.
        os.link(os.path.realpath(path), goal)
    except OSError:
        try:  # another disk, or a file system without links
            with publish(goal) as copy:
                shutil.copyfile(path, copy)
        except OSError as error:
            raise UserError("path_unwritable", f"cannot write {goal}: {error.strerror or error}") from error


def link_all(source: Path, target: Path, pattern: str) -> None:
    """Applies `link` to every file under `source` whose relative path matches `pattern` (`Path.glob`)."""
    for path in files_inside(source, pattern) if source.resolve() != target.resolve() else ():
        link(path, inside(target, path.relative_to(source).as_posix()))
