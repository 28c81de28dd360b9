"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong one.

A checkpoint is a folder `step-000300` of safetensors and JSON files and a `manifest.json` with the sha256 of each. It
is written under a temporary name, flushed to the disk and renamed; the pointer file `latest` (and `best`) is replaced
last. Loading believes nothing: it takes the pointer's checkpoint, compares every hash, and falls back to the one before
it.

A checkpoint is continued only by a training with the same identity: every setting that a weight depends on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError, describe
from diptych.utils.io import sha256, sha256_file, write_atomic
from diptych.utils.paths import inside

if TYPE_CHECKING:
    import torch

    from diptych.recipe.schema import Distill

LATEST, BEST, MANIFEST, STATE = "latest", "best", "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".writing-"
log = logging.getLogger(__name__)

# Keys of `distill` that no weight depends on up to the step that training was stopped at. `offload`, `micro_batch` and
# `sharding` change no more than the order in which floats are added.
HARMLESS = frozenset(
    {
        "allow_distilled_teacher",
        "checkpoint_every",
        "keep",
        "micro_batch",
        "offload",
        "sample_every",
        "sample_guidance",
        "sample_pairs",
        "sample_steps",
        "sharding",
        "trackers",
        "validate_every",
    }
)
# Keys of `distill` that a checkpoint records as fingerprints of data and sizes, or that only export reads.
APART = frozenset({"buckets", "data", "export"})


def harmless(settings: Distill) -> frozenset[str]:
    """The keys of `HARMLESS` that apply to these settings."""
    # Negatives are generated with the settings of the sample sheets.
    return HARMLESS if settings.preference is None else HARMLESS - {"sample_steps", "sample_guidance"}


def may_change(before: Distill, after: Distill) -> set[str]:
    """The keys that may change from `before` to `after` when a training is resumed.

    `steps` may be raised while the learning rate does not depend on it.
    """
    longer = before.schedule == "constant" and after.steps > before.steps
    return {*harmless(before), "export", *(["steps"] if longer else [])}


def identity(settings: Distill, seed: int) -> dict[str, Any]:
    """The settings that a checkpoint must agree with to be continued exactly, as plain values."""
    skip = harmless(settings) | APART | ({"steps"} if settings.schedule == "constant" else set())
    values = settings.model_dump(mode="json", exclude=set(skip)) | {"seed": seed}
    # Keys at these values are left out, so that checkpoints without them can be continued.
    defaults = {"preference": None, "condition_init": "zeros", "positions": "frame", "reference_attention": "joint"}
    for key, default in defaults.items():
        if values[key] == default:
            del values[key]
    return values


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory: `state` is JSON, `tensors` are groups (`weights`, `ema`, `optimizer`) of named ones."""

    step: int
    state: dict[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint, points `latest` at it, and removes all but the last `keep` and the best.

    Raises UserError when it cannot be written; what was there before is then untouched.
    """
    from safetensors.torch import save as to_bytes

    final = folder / _folder_of(checkpoint.step)
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True)
        hashes = {}
        for name, group in checkpoint.tensors.items():
            data = to_bytes({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()})
            hashes[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", data)
        state = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1).encode()
        hashes[STATE] = _write(temporary / STATE, state)
        _write(temporary / MANIFEST, json.dumps({"step": checkpoint.step, "sha256": hashes}, indent=1).encode())
        _sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = pointer(folder, LATEST)
        raise UserError(
            f"cannot write the checkpoint {final}: {error.strerror or error}; "
            f"{f'the last good one is {before}' if before else 'there is no earlier one'}; "
            "make room or set it right, then run the same command again"
        ) from error
    write_atomic(folder / LATEST, final.name.encode())
    _thin(folder, keep, checkpoint.step)
    return final


def mark_best(folder: Path, step: int) -> None:
    """Points `best` at the checkpoint of this step, which is there."""
    write_atomic(folder / BEST, _folder_of(step).encode())


def load(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None if there is none at all.

    Starts at `latest` and goes back step by step past damaged ones, saying so. UserError when there are checkpoints but
    not one that is whole.
    """
    names = [path.name for path in checkpoints(folder)]
    latest = pointer(folder, LATEST)
    if latest in names:
        # One that was renamed but never pointed at is whole too, but it is not what the run had announced.
        names = names[: names.index(latest) + 1]
    for name in reversed(names):
        try:
            return read(folder / name)
        except UserError as error:
            log.warning("%s; going back to the checkpoint before it", error)
    if names:
        raise UserError(
            f"none of the checkpoints in {folder} ({', '.join(names)}) is whole; remove that folder to start again"
        )
    return None


def resume(folder: Path, wanted: dict[str, Any], steps: int) -> Checkpoint | None:
    """The newest whole checkpoint of a training of this identity and of N steps, None if there is none at all.

    UsageError where the folder holds another training's, or one that went further.
    """
    found = load(folder)
    if found is None:
        return None
    stored = found.state["identity"]
    if differ := sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key)):
        changes = "; ".join(f"{_key(k)} was {stored.get(k)!r} and is {wanted.get(k)!r}" for k in differ)
        raise UsageError(
            f"{folder} holds a checkpoint of another training: {changes}. "
            "Set them back, choose another --out, or remove that folder to start again"
        )
    if found.step > steps:
        raise UsageError(
            f"{folder} was trained for {found.step} steps already, and distill.steps is {steps}; raise it, or choose "
            "another --out"
        )
    return found


def _key(name: str) -> str:
    return name if name in ("base", "pairs", "seed", "panel_size") else f"distill.{name}"


def read(path: Path) -> Checkpoint:
    """One checkpoint. UserError if a file is missing or its hash is not the manifest's.

    Tensors are mapped, not read: processes on one machine share them, and each takes only what it copies.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads(inside(path, MANIFEST).read_bytes())
        tensors, state = {}, {}
        for name, wanted in manifest["sha256"].items():
            found = sha256_file(inside(path, name))
            if found != wanted:
                raise UserError(f"{path / name} is damaged (its hash is not the one in {MANIFEST})")
            if name == STATE:
                state = json.loads((path / name).read_bytes())
            else:
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        return Checkpoint(state.pop("step"), state, tensors)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # the last: neither JSON nor UTF-8
        raise UserError(f"{path} is not a whole checkpoint ({describe(error, kind=True)})") from error


def checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoint folders, oldest step first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def pointer(folder: Path, name: str) -> str | None:
    """What `latest` or `best` names, None if there is no such file or it names nothing that is there."""
    try:
        target = inside(folder, name).read_text("utf8").strip()
    except (OSError, ValueError):
        return None
    return target if _NAME.fullmatch(target) and (folder / target).is_dir() else None


def _folder_of(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _write(path: Path, data: bytes) -> str:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return sha256(data)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _thin(folder: Path, keep: int, step: int) -> None:
    """Later ones than the one just written are damaged, or were never pointed at: they take no good one's place."""
    best = pointer(folder, BEST)
    kept = [path for path in checkpoints(folder) if _step(path) <= step][-keep:]
    for path in checkpoints(folder):
        if path not in kept and path.name != best:
            shutil.rmtree(path, ignore_errors=True)
