"""The loss with swapped references: trainings with and without information in the reference, and what is reported."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch

from diptych.data.store import Dataset
from diptych.student.canvas import Canvas
from diptych.train.cache import CachedPair
from diptych.train.distill import distill
from diptych.train.metrics import MIN_INFLUENCE, read, reference_warning
from diptych.train.schedule import Bucket
from diptych.train.validate import HeldOut, partners, validation_loss

STEPS: dict[str, Any] = {"batch_size": 8, "learning_rate": 5e-3, "ema": 0, "checkpoint_every": 100}
STEPS |= {"validate_every": 100, "validation_pairs": 8, "sample_steps": 1, "sample_pairs": 1}
# A diptych's left panel shows the reference too, so that it is read through the condition where noise hides that panel.
KEYS = {"diptych": {"steps": 100, "logit_mean": 2.0}, "tokens": {"steps": 100}, "channel": {"steps": 40}}


def colored_pairs(folder: Path, shuffled: bool = False) -> Any:
    """40 pairs of one plain color each, which only the reference tells; with `shuffled`, not even that."""
    import random

    from PIL import Image

    from diptych.data import records
    from diptych.data.images import image_cell

    chance = random.Random(0)
    colors = [tuple(chance.choice((0, 128, 255)) for _ in range(3)) for _ in range(40)]
    images = [image_cell(Image.new("RGB", (tiny_run.PANEL, tiny_run.PANEL), color)) for color in colors]
    data = Dataset(folder, records.schema(records.PAIR))
    references = chance.sample(images, len(images)) if shuffled else images
    rows = []
    for number, (reference, image) in enumerate(zip(references, images, strict=True)):
        row = dict.fromkeys(records.PAIR, "") | dict.fromkeys(("similarity", "copy_distance", "seam"), 1.0)
        row |= {"conditioning": reference, "image": image, "caption": "a cat"}
        row |= {"id": f"c-{number:06d}-01", "grid_id": f"g-{number:06d}", "reference_panel": 0, "target_panel": 1}
        rows.append(row | {"seed": number, "kept": True, "evidence": "{}"})
    data.write_shard(0, rows, "test")
    data.publish({"fingerprint": f"test {shuffled}"})
    return data


def trained(world: Any, folder: Path, shuffled: bool = False, **keys: Any) -> tuple[float, str]:
    """A training's influence of the reference, and its model card."""
    recipe = tiny_run.make_recipe(world.teacher, **STEPS, **keys)
    validation = distill(recipe, colored_pairs(folder / "pairs", shuffled), folder / "out")["validation"]
    assert read(folder / "out" / "training" / "metrics.jsonl")[-1]["validation"] == validation
    return validation["reference_influence"], (folder / "out" / "README.md").read_text()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [text for text in messages if "ignores its reference" in text]


@pytest.mark.parametrize("conditioning", KEYS)
def test_a_student_that_needs_its_reference_loses_without_it(
    conditioning: str, world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    influence, card = trained(world, tmp_path, conditioning=conditioning, **KEYS[conditioning])
    assert influence > 2 * MIN_INFLUENCE and not warnings(caplog)
    assert f"| loss with swapped references | {influence:+.1%} |" in card and "ignores" not in card


@pytest.mark.parametrize("conditioning", ["tokens", "channel"])
def test_a_training_whose_references_tell_nothing_is_noticed(
    conditioning: str, world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    influence, card = trained(world, tmp_path, shuffled=True, conditioning=conditioning, **KEYS[conditioning])
    (warning,) = warnings(caplog)
    assert abs(influence) < MIN_INFLUENCE and warning in card and f"{influence:+.2%}" in warning


def test_a_diptych_whose_condition_is_not_read_is_noticed(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"steps": 10, "reference_dropout": 1.0, "text_dropout": 0.0, "both_dropout": 0.0}
    influence, card = trained(world, tmp_path, **keys)
    assert influence <= 0 and warnings(caplog)[0] in card  # the left panel alone does not count


# What is swapped ------------------------------------------------------------------------------------------------------


class Stored:
    """Latents of pairs of these prompts, of a canvas of 2 × 4 tokens: value 10·row, and 1 more on the right panel."""

    def __init__(self, *prompts: str, buckets: tuple[int, ...] = ()) -> None:
        places = buckets or (0,) * len(prompts)
        self.samples = [
            CachedPair(f"{n}", g, "a cat", "", b) for n, (g, b) in enumerate(zip(prompts, places, strict=True))
        ]

    def gather(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        clean = torch.tensor([0.0, 0, 1, 1] * 2)[None, :, None] + 10 * torch.tensor(rows)[:, None, None]
        return clean, -clean

    def shape(self, row: int) -> tuple[int, int]:
        return 8, 1


def test_partners_are_of_other_prompts_and_of_the_same_size() -> None:
    prompts = ["g-000001", "g-000002", "g-000001.1", "g-000002.1", "g-000003", "g-000003", "g-000004"]
    latents: Any = Stored(*prompts, buckets=(0, 0, 0, 0, 0, 1, 1))
    found = partners(latents, range(7))
    assert found.keys() == set(range(7)) and sorted(found.values()) == list(range(7))
    for row, other in found.items():
        assert prompts[row][:8] != prompts[other][:8]
        assert latents.samples[row].bucket == latents.samples[other].bucket
    most: Any = Stored("g-000001", "g-000001.1", "g-000001.2", "g-000002")
    assert partners(most, range(4)) == {0: 3, 3: 2}  # the others would get their own subject
    assert partners(most, range(3)) == {}


def test_the_loss_without_swaps_is_as_before_and_both_swaps_are_of_the_whole_reference() -> None:
    seen: list[Any] = []

    def losses(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(batch)
        left = batch.clean[:, 0, 0]  # the row whose reference is on the left panel
        return left, 1 + batch.sigma + (batch.condition[:, 0, 0] + batch.clean[:, 2, 0] - 1).abs() + (
            left != -batch.condition[:, 0, 0]
        )

    canvas = Canvas(8, 8, 2, 2)
    text: Any = SimpleNamespace(
        gather=lambda captions: (torch.zeros(len(captions), 1, 1), torch.zeros(len(captions), 1))
    )
    options = tiny_run.make_recipe(Path("teacher"), seed=1).distill
    three: Any = Stored("g-000001", "g-000002", "g-000003")
    held = HeldOut([Bucket(canvas, 1.0)], three, text, [0, 1, 2])
    found = validation_loss(losses, held, options, 3, torch.device("cpu"))
    true, condition, both = seen[:3]
    assert torch.equal(true.noise, both.noise) and torch.equal(true.sigma, condition.sigma)
    assert condition.clean is true.clean and torch.equal(condition.condition, both.condition)
    assert [int(v) for v in -condition.condition[:, 0, 0]] == [10, 20, 0]
    assert [[int(v) for v in row] for row in both.clean[:, :4, 0]] == [[10, 10, 1, 1], [20, 20, 11, 11], [0, 0, 21, 21]]
    assert found["right"] == pytest.approx({str(s): 1 + s for s in (0.1, 0.3, 0.5, 0.7, 0.9)})
    assert found["reference_influence"] == pytest.approx((10 + 10 + 20) / 3 / 1.5)  # the condition's swap is worse by 1
    one: Any = Stored("g-000001", "g-000001")
    alone = HeldOut([Bucket(canvas, 1.0)], one, text, [0, 1])
    assert "reference_influence" not in validation_loss(losses, alone, options, 3, torch.device("cpu"))


def test_only_a_figure_below_the_limit_is_a_warning() -> None:
    assert reference_warning(None) is None and reference_warning({"loss": 1.0}) is None
    assert reference_warning({"reference_influence": MIN_INFLUENCE}) is None
    assert "-3.00%" in (reference_warning({"reference_influence": -0.03}) or "")
