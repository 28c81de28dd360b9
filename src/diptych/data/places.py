"""What of a run needs a disk of this machine, wherever the run lies.

A run may lie at an address (`paths.place`), and its rows are read and written there (`store`). Training, weights to
open, locks and answers of language models have a folder of this machine for each address, its `desk`.
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
from typing import TYPE_CHECKING, Any

from diptych.data.store import MANIFEST, Dataset
from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.io import publish, sha256
from diptych.utils.paths import files_inside, inside, is_remote, place, refuse_link

if TYPE_CHECKING:
    from upath import UPath

CACHE = Path("~/.cache/diptych/runs")
STAYS = re.compile(r"training/(latents|latest|best|step-\d+)\b")  # of a student: large, and only to go on training


def desk(run: str | Path | UPath) -> Path:
    """The folder on this machine that belongs to a run: its own, or for an address one in `CACHE`."""
    if not is_remote(run):
        return Path(str(run))
    return _kept(run).expanduser()


def answers(run: str | Path | UPath, everywhere: bool) -> Path:
    """The file that keeps a language model's answers to a run's questions. If workers on several machines ask, each
    machine has its own, because SQLite's locks do not hold on network file systems; `~` is then the worker's."""
    return (_kept(run if is_remote(run) else Path(str(run)).resolve()) if everywhere else desk(run)) / "answers.sqlite"


def _kept(run: str | Path | UPath) -> Path:
    return CACHE / sha256(str(run).rstrip("/"))[:16]


def bring(run: str | Path | UPath, name: str) -> Path:
    """The folder `name` of a run on this machine's disk: as it is, or fetched, files that are here in size left alone.

    UserError if a file cannot be read.
    """
    if not is_remote(run):
        return Path(str(run)) / name
    source, target = place(run) / name, desk(run) / name
    for file in source.rglob("*") if source.is_dir() else []:
        if file.is_file():
            own = inside(target, str(file.relative_to(source)))
            if not own.is_file() or own.stat().st_size != file.stat().st_size:
                own.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, "get_file", _inside(file), str(own))
    return target


def send(run: str | Path | UPath, name: str) -> None:
    """The folder `name` of the run's desk to its address, but for what `STAYS`; nothing for a run of this machine."""
    if not is_remote(run):
        return
    source, target = desk(run) / name, place(run) / name
    files = [file for file in source.rglob("*") if file.is_file()]
    # The summary says that training is finished: it comes last.
    for file in sorted(files, key=lambda file: (file.name == "summary.json", file)):
        name_inside = file.relative_to(source).as_posix()
        if not STAYS.match(name_inside):
            own = target / name_inside
            _copy(own, "put_file", str(file), _inside(own))


def _inside(path: Any) -> str:
    """A path as its file system names it."""
    return path.path


def _copy(shown: Any, how: str, source: str, target: str) -> None:
    try:
        getattr(shown.fs, how)(source, target)
    except OSError as error:
        raise UserError(f"{shown}: cannot be copied ({error.strerror or error})") from error


# A run's log: `log.jsonl`, one JSON object a line, only ever added to. It holds what must not be in the data, because
# it differs between two runs of one recipe: times, machine, attempts.

LOG = "log.jsonl"


def append(run_dir: str | Path, event: str, **values: Any) -> None:
    """Adds one line: the time, the event's name, and `values`."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **values}
    path = place(run_dir) / LOG
    if is_remote(path):  # a remote file cannot be appended to; the run's one process writes it again
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return
    with refuse_link(path).open("ab+") as stream:
        # A process killed in mid-line leaves no newline: begin a new line, so that only that line is lost.
        if stream.seek(0, os.SEEK_END) and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
            stream.write(b"\n")
        stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """All whole lines, in order; none if there is no log."""
    path = place(run_dir) / LOG
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            events.append(parse_json(line))
        except ValueError:
            continue  # cut by a kill; see append
    return events


def seconds(run_dir: str | Path) -> dict[str, float]:
    """Seconds spent in each stage, over all attempts that reached its end."""
    spent: dict[str, float] = {}
    for event in read(run_dir):
        if event.get("event") == "stage" and "seconds" in event:
            spent[event["stage"]] = round(spent.get(event["stage"], 0.0) + event["seconds"], 2)
    return spent


# One writer at a time: a lock on a folder that the system drops with its holder, so a kill leaves nothing to clear.


@contextmanager
def lock(place: Path) -> Iterator[None]:
    """Keeps every other process out of a folder, which is made if need be. UserError if one is already in.

    Nothing can be locked at an address: there it keeps out this machine's other processes.
    """
    folder = desk(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    try:
        stream = refuse_link(folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
    with stream:
        if not _take(stream.fileno()):
            stream.seek(0)
            holder = stream.read().strip()
            raise UserError(
                f"another diptych{f' (process {holder})' if holder else ''} is writing {place}; "
                "wait for it to end, or choose another folder"
            )
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _take(descriptor: int) -> bool:
    """A lock that the system drops when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: its own lock, on the first byte
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            return True
        except OSError:
            return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


# Files of one run under a second name in another: hard links where the disk allows, else copies. What is shared is
# never changed in place, only replaced (`io.publish`), so neither folder can change the other. Between
# addresses, or between an address and a disk, parts are copied.


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
        # Another disk, or a file system without links.
        try:
            with publish(goal) as copy:
                shutil.copyfile(path, copy)
        except OSError as error:
            raise UserError(f"cannot write {goal}: {error.strerror or error}") from error


def link_all(source: Path, target: Path, pattern: str) -> None:
    """`link` for every file below `source` whose path in it matches `pattern` (`Path.glob`)."""
    for path in files_inside(source, pattern) if source.resolve() != target.resolve() else ():
        link(path, inside(target, path.relative_to(source).as_posix()))
