"""Which pairs are held out for validation, and what is said where their references cannot be."""

from __future__ import annotations

import logging

import pytest

from diptych.data.records import grid_id, pair_id, prompt_id
from diptych.train.cache import CachedPair
from diptych.train.schedule import split


def samples(*groups: int) -> list[CachedPair]:
    """Pairs per reference."""
    return [CachedPair(f"{g}-{n}", f"g{g}", "a cat") for g, count in enumerate(groups) for n in range(count)]


@pytest.mark.parametrize("groups", [(40,), (20, 20), (15, 15, 10)])
def test_pairs_are_held_out_and_it_is_said_where_all_references_have_many(
    groups: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    pairs = samples(*groups)
    train, held = split(pairs, 6)
    assert len(held) == 6 and sorted(train + held) == list(range(40))
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "6 of 40" in said
    assert [pairs[row].id for row in held] == [pairs[::-1][row].id for row in split(pairs[::-1], 6)[1]]


def test_a_reference_with_many_pairs_does_not_keep_small_ones_from_being_held_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for large in range(8):  # whichever group has the lowest hash
        groups = [2] * 8
        groups[large] = 30
        pairs = samples(*groups)
        train, held = split(pairs, 6)
        assert len(held) in (2, 4, 6)
        assert {pairs[row].grid_id for row in held}.isdisjoint(pairs[row].grid_id for row in train)
    assert not caplog.records


def test_fewer_than_five_pairs_are_all_trained_on_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert split(samples(2, 2), 6) == ([0, 1, 2, 3], [])
    assert "there are 4" in caplog.text
    caplog.clear()
    assert split(samples(2, 2), 0) == ([0, 1, 2, 3], []) and not caplog.records


@pytest.mark.parametrize(("images", "held_out"), [(3, 12), (10, 8)])
def test_no_prompt_is_both_trained_on_and_held_out(
    images: int, held_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Several images of a prompt show one subject in the same words; ten are more pairs than are asked for."""
    grids = [grid_id(prompt_id(number), image) for number in range(12) for image in range(images)]
    pairs = [CachedPair(pair_id(grid, *order), f"0/{grid}", "a cat") for grid in grids for order in ((0, 1), (1, 0))]
    train, held = split(pairs, held_out)
    prompts = [{pairs[row].grid_id.partition(".")[0] for row in rows} for rows in (train, held)]
    assert len(held) == {3: 12, 10: 20}[images] and prompts[0].isdisjoint(prompts[1])
    assert not caplog.records
