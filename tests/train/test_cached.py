"""Cached tensors are read only as they were written; damaged pairs are not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych.errors import UserError
from diptych.train.cache import is_whole, write
from diptych.train.distill import distill


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T, "empty": torch.zeros(0, 4)}
    write(tensors, path, {"diptych": '{"caption": "a cat"}'})
    assert is_whole(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not is_whole(path), at
    path.write_bytes(whole)
    assert is_whole(path)


def test_swapped_files_are_found(tmp_path: Path) -> None:
    for number in range(2):
        write({"a": torch.full((2,), float(number))}, tmp_path / f"part-{number}.safetensors")
    files = [(tmp_path / f"part-{number}.safetensors") for number in range(2)]
    data = [path.read_bytes() for path in files]
    for path, other in zip(files, data[::-1], strict=True):
        path.write_bytes(other)
    assert not any(map(is_whole, files))


def test_flipped_and_swapped_latents_are_made_again(
    world: Any, straight: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, recipe = tmp_path / "student", tiny_run.make_recipe(world.teacher)
    tiny_run.prepare(recipe, world.pairs, out)
    first, second, *_ = sorted((out / "training" / "latents").rglob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:])
    second.write_bytes(whole)
    distill(recipe, world.pairs, out)
    assert f"{first} is damaged" in caplog.text and f"{second} is damaged" in caplog.text
    assert kills.result(out) == kills.result(straight.out)


def test_pairs_that_are_not_those_of_the_manifest_are_not_trained_on(world: Any, tmp_path: Path) -> None:
    pairs = tiny_run.make_pairs(tmp_path / "pairs")
    parts = sorted((tmp_path / "pairs").glob("*.parquet"))
    data = [part.read_bytes() for part in parts]
    parts[0].write_bytes(data[1])  # as whole as any, of the same fingerprint
    with pytest.raises(UserError, match=r"part-00000\.parquet"):
        distill(tiny_run.make_recipe(world.teacher), pairs, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
