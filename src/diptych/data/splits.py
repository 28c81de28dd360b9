"""Which files of a data set are read: those to train on, unless a split is named.

Data sets on the hub come with test and validation files beside those to train on, and say which is which in the names
of files and folders, as `datasets` reads them: `test-00000-of-00001.parquet`, `data/validation/0.parquet`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from diptych.errors import UsageError, nearest

TRAIN = "train"
ALL = "all"
HELD_OUT = {
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = HELD_OUT | {TRAIN: ("train", "training")}  # held-out names first: of `train_test` the careful reading
_SHARD = re.compile(r"(.+?)-\d+-of-\d+.*")
_ENDING = re.compile(r"\.(parquet|tgz|tar(\.\w+)?)$")
log = logging.getLogger(__name__)


def split_of(name: str) -> str:
    """The split of a file by its path inside the data set; "" if that names none."""
    *folders, file = name.strip("/").split("/")
    stem = _ENDING.sub("", file)
    for part in (stem, *reversed(folders)):
        if found := _known(part):
            return found
    shard = _SHARD.fullmatch(stem)
    return shard[1] if shard else ""


def _known(part: str) -> str:
    # Whole words: `latest` is no test; `test2` and `my_test` are.
    words = set(re.findall(r"[a-z]+", part.lower()))
    return next((split for split, names in _WORDS.items() if words & set(names)), "")


def choose(files: Sequence[str], wanted: str | None, where: str) -> list[str]:
    """The files of a split, in their order; `wanted` is its name, `all`, or None for those to train on.

    Files that name no split are to train on. What is left out is said in a warning. UsageError for a split that is not
    there, and for None where no file is clearly one to train on.
    """
    if wanted == ALL:
        return list(files)
    by: dict[str, list[str]] = {}
    for file in files:
        by.setdefault(split_of(file), []).append(file)
    there = ", ".join(f"{name or 'no split'} ({len(own)} of {len(files)} files)" for name, own in by.items())
    training = by.keys() & {"", TRAIN}
    name = wanted and (_known(wanted) or wanted)
    if name is None:
        chosen = training or set(by)
        if not training and (len(by) > 1 or by.keys() & HELD_OUT.keys()):
            raise UsageError(f"{where}: which split is to be read? Its files name {there}; name one, or all")
    else:
        chosen = training if name == TRAIN else by.keys() & {name}
    if not chosen:
        raise UsageError(f"{where} has no split '{wanted}'{nearest(str(wanted), by)}; its files name {there}")
    found = [file for file in files if split_of(file) in chosen]
    if wanted is None and len(found) < len(files):
        log.warning(
            "%s: %d of %d files are read, those to train on; they name %s", where, len(found), len(files), there
        )
    return found
