"""Chance in training is a function of seed, sample and epoch, and of nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from diptych.recipe.schema import Distill
from diptych.train.schedule import Order, draw, fixed_noise

OPTIONS = Distill(seed=3, instructions=0.0)
SHAPE = (6, 4)


def test_a_draw_does_not_depend_on_the_global_generator_or_on_other_draws() -> None:
    torch.manual_seed(1)
    first = draw(OPTIONS, "c-000001-01", 0, SHAPE)
    torch.manual_seed(2)
    draw(OPTIONS, "c-000002-01", 0, SHAPE)
    again = draw(OPTIONS, "c-000001-01", 0, SHAPE)
    assert first.sigma == again.sigma
    assert torch.equal(first.noise, again.noise)


def test_another_epoch_sample_or_seed_is_another_draw() -> None:
    noise = draw(OPTIONS, "a", 0, SHAPE).noise
    others = [
        draw(OPTIONS, "a", 1, SHAPE),
        draw(OPTIONS, "b", 0, SHAPE),
        draw(OPTIONS.model_copy(update={"seed": 4}), "a", 0, SHAPE),
    ]
    assert all(not torch.equal(noise, other.noise) for other in others)
    assert not torch.equal(fixed_noise(3, "a", 0.1, SHAPE), fixed_noise(3, "a", 0.3, SHAPE))


def test_dropout_shares_are_the_recipes() -> None:
    options = OPTIONS.model_copy(update={"reference_dropout": 0.1, "text_dropout": 0.2, "both_dropout": 0.3})
    draws = [draw(options, f"c-{i}", 0, (1, 1)) for i in range(4000)]
    share = {
        pair: sum((d.drop_reference, d.drop_text) == pair for d in draws) / len(draws)
        for pair in [(True, False), (False, True), (True, True)]
    }
    assert share[True, False] == pytest.approx(0.1, abs=0.02)
    assert share[False, True] == pytest.approx(0.2, abs=0.025)
    assert share[True, True] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("dropped", ["reference_dropout", "text_dropout", "both_dropout"])
def test_a_share_of_one_drops_always(dropped: str) -> None:
    none = OPTIONS.model_copy(update={"reference_dropout": 0.0, "text_dropout": 0.0, "both_dropout": 0.0})
    found = {(d.drop_reference, d.drop_text) for d in (draw(none, f"{i}", 0, (1, 1)) for i in range(50))}
    assert found == {(False, False)}
    options = none.model_copy(update=dict(**{dropped: 1.0}))
    found = {(d.drop_reference, d.drop_text) for d in (draw(options, f"{i}", 0, (1, 1)) for i in range(50))}
    assert found == {(dropped != "text_dropout", dropped != "reference_dropout")}


def test_noise_levels_follow_the_density_and_the_shift() -> None:
    def mean(**changes: float | str) -> float:
        options = OPTIONS.model_copy(update=changes)
        return sum(draw(options, f"{i}", 0, (1, 1)).sigma for i in range(2000)) / 2000

    assert mean() == pytest.approx(0.5, abs=0.02)
    assert mean(timestep_density="uniform") == pytest.approx(0.5, abs=0.03)
    assert mean(logit_mean=1.0) > 0.65  # above 0 is noisier
    assert mean(shift=3.0) > 0.65


def test_every_epoch_takes_every_sample_once_in_another_order_and_any_step_can_be_asked_first() -> None:
    order = Order(10, 4, seed=1)
    taken = [place for step in range(1, 6) for place in order.at(step)]  # 20 samples: two epochs
    assert sorted(row for row, epoch in taken if epoch == 0) == list(range(10))
    assert sorted(row for row, epoch in taken if epoch == 1) == list(range(10))
    assert [row for row, _ in taken[:10]] != [row for row, _ in taken[10:]]
    assert Order(10, 4, seed=1).at(4) == order.at(4) == taken[12:16]
    assert Order(10, 4, seed=2).at(1) != taken[:4]


def test_an_epoch_takes_a_sources_rows_as_often_as_its_weight_says_and_never_a_row_twice_in_one_turn() -> None:
    order = Order(16, 4, seed=1, sources=((10, 1.0), (4, 0.5), (2, 3.0)))
    assert order.epoch_size == 10 + 2 + 6
    taken = [place for step in range(1, 10) for place in order.at(step)]  # 36 samples: two epochs
    assert len(set(taken)) == len(taken)  # (row, turn) keys the noise
    first, second = (Counter(row for row, _ in half) for half in (taken[:18], taken[18:]))
    assert [first[row] for row in range(10)] == [1] * 10 and [first[row] for row in (14, 15)] == [3, 3]
    halves = [{row for row in range(10, 14) if half[row]} for half in (first, second)]
    assert len(halves[0]) == len(halves[1]) == 2 and not halves[0] & halves[1]
