"""A checkpoint is whole or it is not loaded."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import pytest
import torch

from diptych.train import checkpoint
from diptych.train.checkpoint import BEST, LATEST, Checkpoint, load, mark_best, pointer, save
from raising import raises


def write(folder: Path, step: int, keep: int = 3, best: bool = False) -> Path:
    tensors = {"weights": {"w": torch.full((1000,), float(step))}, "ema": {"w": torch.zeros(3)}}
    path = save(folder, Checkpoint(step, {"note": f"step {step}"}, tensors), keep)
    if best:
        mark_best(folder, step)
    return path


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    write(tmp_path, 5)
    found = load(tmp_path)
    assert found is not None
    assert (found.step, found.state["note"]) == (5, "step 5")
    assert torch.equal(found.tensors["weights"]["w"], torch.full((1000,), 5.0))


@pytest.mark.parametrize("file", ["weights.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "scratch", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5)
    path = write(tmp_path, 10) / file
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "scratch":  # which is no UTF-8 either
        data[len(data) // 2] = 0xFF
        path.write_bytes(data)
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        found = load(tmp_path)
    if file == "manifest.json" and damage == "flip":
        # A flipped bit in the manifest may still be the same JSON value; then nothing is wrong.
        assert found is not None
        return
    assert found is not None and found.step == 5
    assert "step-000010" in caplog.text


def test_when_no_checkpoint_is_whole_the_user_is_told(tmp_path: Path) -> None:
    (write(tmp_path, 5) / "weights.safetensors").write_bytes(b"half")
    with raises("checkpoint_invalid", "step-000005"):
        load(tmp_path)


def test_a_save_that_was_killed_is_neither_loaded_nor_left_behind(tmp_path: Path) -> None:
    write(tmp_path, 5)
    half = tmp_path / ".step-000010.0a1b2c3d.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    found = load(tmp_path)
    assert found is not None and found.step == 5
    write(tmp_path, 15)
    assert not half.exists()


def test_a_checkpoint_renamed_but_not_yet_announced_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    (tmp_path / LATEST).write_text("step-000005")
    found = load(tmp_path)
    assert found is not None and found.step == 5
    write(tmp_path, 10)  # and it can be written again
    found = load(tmp_path)
    assert found is not None and found.step == 10


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step, keep=2, best=step == 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000005", "step-000006"]
    assert (pointer(tmp_path, LATEST), pointer(tmp_path, BEST)) == ("step-000006", "step-000002")


def test_a_later_one_that_is_damaged_takes_no_good_ones_place(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10) / "weights.safetensors").write_bytes(b"half")
    found = load(tmp_path)
    assert found is not None and found.step == 5
    write(tmp_path, 6, keep=1)  # it goes on from there, with another checkpoint_every
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000006"]
    found = load(tmp_path)
    assert found is not None and found.step == 6


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the system now refuses any larger file
    try:
        with raises("path_unwritable", "step-000010", "step-000005"):
            write(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob(".*.tmp"))
    found = load(tmp_path)
    assert found is not None and found.step == 5
