"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder `step-000300` of safetensors and JSON files and a `manifest.json` with the sha256 of each. It
is written under a temporary name, flushed to the disk and renamed. The pointer file `latest` (and `best`) is replaced
last. Loading reads the pointer's checkpoint, compares every hash, and falls back to the one before it.

Only a training with the same identity resumes from a checkpoint. The identity is every setting that a weight depends
on.
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
from diptych.utils.io import clean, publish, sha256, sha256_file, write_atomic
from diptych.utils.paths import inside

if TYPE_CHECKING:
    import torch

    from diptych.recipe.schema import Distill

LATEST, BEST, MANIFEST, STATE = "latest", "best", "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")
log = logging.getLogger(__name__)

# Keys of `distill` that no weight depends on up to the step at which training stopped. `offload`, `micro_batch` and
# `sharding` only change the order in which floats are added.
HARMLESS = frozenset(
    {
        "allow_distilled_teacher",
        "allow_restricted_pairs",
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
# Keys of `distill` that a checkpoint records as fingerprints of data and sizes, or that only the export reads.
APART = frozenset({"buckets", "data", "export"})


def harmless(settings: Distill) -> frozenset[str]:
    """The keys of `HARMLESS` that apply to these settings."""
    # Negatives are generated with the settings of the sample sheets.
    return HARMLESS if settings.preference is None else HARMLESS - {"sample_steps", "sample_guidance"}


def may_change(before: Distill, after: Distill) -> set[str]:
    """The keys that may change from `before` to `after` when a training resumes.

    `steps` may be raised if the learning rate does not depend on it.
    """
    longer = before.schedule == "constant" and after.steps > before.steps
    return {*harmless(before), "export", *(["steps"] if longer else [])}


def identity(settings: Distill, seed: int) -> dict[str, Any]:
    """The settings that must equal a checkpoint's to resume from it exactly, as plain values."""
    skip = harmless(settings) | APART | ({"steps"} if settings.schedule == "constant" else set())
    values = settings.model_dump(mode="json", exclude=set(skip)) | {"seed": seed}
    # Keys with these values are left out, so that training can resume from checkpoints without them.
    defaults = {"preference": None, "condition_init": "zeros", "positions": "frame", "reference_attention": "joint"}
    for key, default in defaults.items():
        if values[key] == default:
            del values[key]
    return values


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory. `state` is JSON; `tensors` are groups (`weights`, `ema`, `optimizer`) of named
    tensors."""

    step: int
    state: dict[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint, points `latest` at it, and removes all but the last `keep` and the best.

    UserError if it cannot be written. Earlier checkpoints are then unchanged.
    """
    from safetensors.torch import save as to_bytes

    final = folder / _folder_of(checkpoint.step)
    try:
        clean(folder)
        with publish(final) as partial:
            partial.mkdir()
            hashes = {}
            for name, group in checkpoint.tensors.items():
                data = to_bytes({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()})
                hashes[f"{name}.safetensors"] = _write(partial / f"{name}.safetensors", data)
            state = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1).encode()
            hashes[STATE] = _write(partial / STATE, state)
            _write(partial / MANIFEST, json.dumps({"step": checkpoint.step, "sha256": hashes}, indent=1).encode())
            _sync_folder(partial)
        _sync_folder(folder)
    except OSError as error:
        before = pointer(folder, LATEST)
        raise UserError(
            "path_unwritable",
            f"Cannot write the checkpoint {final}: {error.strerror or error}. "
            f"{f'The last good one is {before}' if before else 'There is no earlier one'}. "
            "Free some space or correct the cause, then run the same command again.",
        ) from error
    write_atomic(folder / LATEST, final.name.encode())
    _thin(folder, keep, checkpoint.step)
    return final


def mark_best(folder: Path, step: int) -> None:
    """Points `best` at the existing checkpoint of this step."""
    write_atomic(folder / BEST, _folder_of(step).encode())


def load(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint. None if there are no checkpoints.

    Starts at `latest` and goes back past damaged ones, with warnings. UserError if all checkpoints are damaged.
    """
    names = [path.name for path in checkpoints(folder)]
    latest = pointer(folder, LATEST)
    if latest in names:
        # A later one that `latest` never named is undamaged too, but the run has not confirmed it.
        names = names[: names.index(latest) + 1]
    for name in reversed(names):
        try:
            return read(folder / name)
        except UserError as error:
            log.warning("%s Going back to the checkpoint before it.", error)
    if names:
        raise UserError(
            "checkpoint_invalid",
            f"All checkpoints in {folder} are damaged ({', '.join(names)}). Remove that folder to start again.",
        )
    return None


def resume(folder: Path, wanted: dict[str, Any], steps: int) -> Checkpoint | None:
    """The newest undamaged checkpoint, for a training of this identity with this number of steps. None if there are no
    checkpoints.

    UsageError if the checkpoint belongs to another training, or has more steps.
    """
    newest = load(folder)
    if newest is None:
        return None
    stored = newest.state["identity"]
    if differ := sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key)):
        changes = "; ".join(f"{_key(k)} was {stored.get(k)!r} and is {wanted.get(k)!r}" for k in differ)
        raise UsageError(
            "checkpoint_invalid",
            f"{folder} has a checkpoint of another training: {changes}. Restore these values, choose another --out, or "
            "remove that folder to start again.",
        )
    if newest.step > steps:
        raise UsageError(
            "checkpoint_invalid",
            f"{folder} is already trained for {newest.step} steps, and distill.steps is {steps}. Raise it, or choose "
            "another --out.",
        )
    return newest


def _key(name: str) -> str:
    return name if name in ("base", "pairs", "seed", "panel_size") else f"distill.{name}"


def read(path: Path) -> Checkpoint:
    """One checkpoint. UserError if a file is missing or its hash differs from the manifest's.

    Tensors are mapped, not read: processes on one machine share them, and each one only uses memory for its copies.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads(inside(path, MANIFEST).read_bytes())
        tensors, state = {}, {}
        for name, wanted in manifest["sha256"].items():
            if sha256_file(inside(path, name)) != wanted:
                raise UserError(
                    "checkpoint_invalid", f"{path / name} is damaged: its hash differs from the one in {MANIFEST}."
                )
            if name == STATE:
                state = json.loads((path / name).read_bytes())
            else:
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        return Checkpoint(state.pop("step"), state, tensors)
    except UserError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # ValueError: not JSON or UTF-8
        raise UserError(
            "checkpoint_invalid", f"{path} is not a complete checkpoint ({describe(error, kind=True)})."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoint folders, oldest step first."""
    folders = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(folders, key=_step)


def pointer(folder: Path, name: str) -> str | None:
    """The checkpoint that `latest` or `best` names. None if there is no such file or no such checkpoint."""
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


def _thin(folder: Path, keep: int, step: int) -> None:
    """Removes all but the last `keep` checkpoints and the best. Those later than `step`, the one just written, are
    damaged or unconfirmed, so they do not count."""
    best = pointer(folder, BEST)
    kept = [path for path in checkpoints(folder) if _step(path) <= step][-keep:]
    for path in checkpoints(folder):
        if path not in kept and path.name != best:
            shutil.rmtree(path, ignore_errors=True)
