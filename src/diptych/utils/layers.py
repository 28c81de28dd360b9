"""Refuses configs that name more layers than their files have tensors, before anything is built of them.

A config of a few lines may ask for ten million layers, and building those fills the memory, on the meta device too.
Only the heads of weight files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.paths import refuse_special

MOST = 1000  # layers that are built without comparing with the weights; no model has more
LONGEST_HEAD = 100 * 2**20  # bytes, as safetensors itself has it
_COUNTS = frozenset({"depth", "depths", "num_blocks", "n_blocks"})


def check_folder(folder: Path) -> None:
    """UserError if a config in a model's folder, or in those below it, names more layers than there are tensors."""
    for path in (folder / "config.json", *sorted(folder.glob("*/config.json"))):
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            continue
        _check_file(path, stamp)


def check(config: Any, where: str, tensors: int = 0) -> None:
    """UserError for a config that names more layers than `tensors` and than any model has."""
    for key, value in _counts(config):
        if value > max(tensors, MOST):
            has = f"and the weights beside it have {tensors} tensors" if tensors else "which no model has"
            raise UserError(f"{where}: {key} is {value}, {has}; the config is damaged, fetch it again")


@lru_cache(maxsize=64)
def _check_file(path: Path, stamp: int) -> None:
    refuse_special(path)
    try:
        config = parse_json(path.read_text("utf8"))
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if any(value > MOST for _, value in _counts(config)):
        check(config, str(path), _tensors(path.parent))


def _counts(config: Any) -> Iterator[tuple[str, int]]:
    """Numbers of layers, in the config and in those inside it."""
    todo = [config]
    while todo:
        one = todo.pop()
        for key, value in one.items() if isinstance(one, Mapping) else ():
            if isinstance(value, Mapping):
                todo.append(value)
            elif "layer" in str(key) or key in _COUNTS:
                numbers = value if isinstance(value, list | tuple) else [value]
                yield from ((str(key), n) for n in numbers if isinstance(n, int) and not isinstance(n, bool))


def _tensors(folder: Path) -> int:
    """How many tensors a folder's weights have, by their heads."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        try:
            with refuse_special(path).open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                if size <= LONGEST_HEAD:
                    names |= json.loads(stream.read(size)).keys()
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return len(names)
