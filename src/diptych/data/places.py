"""What of a run needs a disk of this machine, wherever the run lies.

A run may lie at an address (`paths.place`), and its rows are read and written there (`store`). Training, weights to
open, locks and answers of language models have a folder of this machine for each address, its `desk`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError
from diptych.utils.paths import inside, is_remote, place

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
    return CACHE / hashlib.sha256(str(run).rstrip("/").encode()).hexdigest()[:16]


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
