"""What needs memory besides the step itself: validation, sample sheets, latents and captions in small batches, and a
checkpoint before any of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych.train import canvases_at_once, captions_at_once, checkpoint, validate
from diptych.train.captions import OnlineCaptions, embed_captions
from diptych.train.distill import distill
from diptych.train.loop import Trainer, train
from diptych.train.processes import Processes


@pytest.fixture
def trainer(world: Any, tmp_path: Path) -> Callable[..., Trainer]:
    def make(**keys: Any) -> Trainer:
        return Trainer(tiny_run.prepare(tiny_run.make_recipe(world.teacher, **keys), world.pairs, tmp_path / "out"))

    return make


def seen_rows(trainer: Trainer) -> list[int]:
    """Rows of every forward pass of the transformer from here on."""
    rows: list[int] = []
    trainer.transformer.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    return rows


def test_no_forward_pass_has_more_rows_than_the_micro_batch(trainer: Callable[..., Trainer]) -> None:
    small = trainer(micro_batch=2, sample_steps=2)
    rows = seen_rows(small)
    small.train_step(small.next_batch(1))
    small.validate()
    small.generate_samples()
    assert (
        max(rows) == 2 and rows.count(2) == 2 + 3 * 4 * 5 / 2
    )  # a step's, and four pairs at five levels: true, and swapped twice


def test_a_validation_in_small_batches_has_the_same_figures(trainer: Callable[..., Trainer]) -> None:
    whole, small = (trainer(micro_batch=size).validate() for size in (None, 1))
    for side in ("left", "right"):
        assert small[side] == pytest.approx(whole[side], rel=1e-5)
    assert small["loss"] == pytest.approx(whole["loss"], rel=1e-5)


class Member(Processes):
    """One of several processes whose turn comes after another's; sums add up in `total`."""

    total: torch.Tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.total.add_(tensor)
        return self.total


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_several_processes_share_a_validation_and_have_its_very_figures(
    trainer: Callable[..., Trainer], count: int
) -> None:
    one = trainer(micro_batch=3)
    job, rows = one.job, seen_rows(one)
    pairs = validate.HeldOut(job.buckets, job.latents, job.text, job.validation_rows)
    alone = validate.validation_loss(one.losses, pairs, one.options, 3, job.device)
    batches = 7  # of twenty samples, three at once
    assert len(rows) == 3 * batches  # with the true references, and twice with swapped ones
    total, found, each = torch.zeros(4, 20, dtype=torch.float64), {}, []
    for rank in range(count):
        rows.clear()
        member = Member(rank, count)
        object.__setattr__(member, "total", total)
        found = validate.validation_loss(one.losses, pairs, one.options, 3, job.device, member)
        each.append(len(rows))
    assert found == alone
    assert set(each) == {3 * -(-batches // count)}  # all the same number, as spread weights need it


def test_latents_and_captions_go_through_in_batches_of_a_fixed_size() -> None:
    assert canvases_at_once(512, 1024) == canvases_at_once(1024, 2048) == 1
    assert canvases_at_once(64, 128) == 16  # the pocket world's
    assert (captions_at_once(512), captions_at_once(32), captions_at_once(4096)) == (4, 64, 1)
    sizes: list[int] = []

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(captions))
        values = torch.tensor([float(len(caption)) for caption in captions])
        return values.view(-1, 1, 1).expand(-1, 512, 2), values.view(-1, 1)

    captions = ["a" * number for number in range(1, 11)]
    table = embed_captions(encode, captions)
    online = OnlineCaptions(encode, captions_at_once(512))
    for one, other in zip(table.gather(captions), online.gather(captions), strict=True):
        assert torch.equal(one, other) and one[:, 0].flatten()[0] == 1
    assert max(sizes) == 4


class OutOfMemory(Exception):
    pass


def stop_in(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """The trainer's method `name` runs out of memory at a step, until this is undone."""
    really = getattr(Trainer, name)

    def fail(self: Trainer) -> Any:
        if self.step == step:
            raise OutOfMemory
        return really(self)

    monkeypatch.setattr(Trainer, name, fail)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("validate", 4),
        pytest.param("generate_samples", 5, marks=pytest.mark.soak),
        pytest.param("validate", 12, marks=pytest.mark.soak),
    ],
)
def test_a_validation_that_fails_costs_no_step_and_is_made_up_for(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    # Neither is due when a checkpoint is.
    recipe = tiny_run.make_recipe(world.teacher, checkpoint_every=100, sample_every=5, sample_steps=2)
    distill(recipe, world.pairs, tmp_path / "straight")
    wanted = kills.result(tmp_path / "straight")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in(patch, name, step)
        for _ in range(2):
            with pytest.raises(OutOfMemory):
                distill(recipe, world.pairs, out)
            last = checkpoint.load(out / "training")
            assert last is not None and last.step == step
    steps: list[int] = []
    really = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, batch: (steps.append(self.step + 1), really(self, batch))[1]
    )
    distill(recipe, world.pairs, out)
    assert steps == list(range(step + 1, 13)) and kills.result(out) == wanted
    folders = [tmp_path / "straight" / "training", out / "training"]
    sheets = [{path.name: path.read_bytes() for path in (folder / "samples").iterdir()} for folder in folders]
    assert sheets[0] == sheets[1]
    best = [checkpoint.pointer(folder, checkpoint.BEST) for folder in folders]
    assert best[0] == best[1]


def test_a_step_that_was_validated_is_not_validated_again(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_run.make_recipe(world.teacher, steps=4)
    first = train(tiny_run.prepare(recipe, world.pairs, tmp_path))
    monkeypatch.setattr(Trainer, "validate", lambda self: pytest.fail("validated twice"))
    monkeypatch.setattr(Trainer, "generate_samples", lambda self: pytest.fail("drawn twice"))
    again = train(tiny_run.prepare(recipe, world.pairs, tmp_path))
    assert again.step == 4 and again.best == first.best
