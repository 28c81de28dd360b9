"""Near duplicates and diversity, by word pairs."""

from __future__ import annotations

import random

import pytest

from diptych.stages.write.diversity import NearDuplicates, measure, resemblance, shingles

FOX = "a red fox with a torn left ear and white paws, asleep on a windowsill in the morning"


def test_resemblance_is_of_word_pairs_whatever_their_case_and_marks() -> None:
    assert shingles("A red fox, asleep.") == {("a", "red"), ("red", "fox"), ("fox", "asleep")}
    assert shingles("Fox!") == {("fox",)} and shingles("…") == frozenset()
    assert resemblance(shingles("a red fox"), shingles("A RED FOX!")) == 1.0
    assert resemblance(shingles("a red fox"), shingles("a red hen")) == pytest.approx(1 / 3)
    assert resemblance(shingles("one"), shingles("two")) == 0.0


def test_the_later_of_two_alike_is_named_after_the_earlier_and_not_added() -> None:
    accepted = NearDuplicates(0.5)
    assert accepted.add("first", FOX) is None
    found = accepted.add("second", FOX.replace("morning", "evening"))
    assert found is not None and found[0] == "first" and 0.5 < found[1] < 1
    assert accepted.add("third", "a tin robot with a green lamp, walking through a field of snow") is None
    same = accepted.add("fourth", FOX.upper())
    assert same == ("first", 1.0)
    assert NearDuplicates(1.0).add("a", FOX) is None


def test_a_limit_of_one_lets_even_the_same_text_in() -> None:
    accepted = NearDuplicates(1.0)
    assert [accepted.add(str(i), FOX) for i in range(3)] == [None] * 3


def test_the_most_alike_is_the_one_that_is_compared_to_all_earlier_ones() -> None:
    """Against a plain comparison of every two texts."""
    rng = random.Random(4)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(rng.choice(words) for _ in range(rng.randint(2, 9))) for _ in range(150)]
    accepted, kept, caught = NearDuplicates(0.3), [], 0
    for number, text in enumerate(texts):
        alike = [resemblance(shingles(text), shingles(texts[other])) for other in kept]
        found = accepted.add(str(number), text)
        if max(alike, default=0.0) > 0.3:
            assert found == (str(kept[alike.index(max(alike))]), max(alike))
            caught += 1
        else:
            assert found is None
            kept.append(number)
    assert caught > 20 and len(kept) > 20


def test_diversity_tells_collapse_from_variety() -> None:
    collapsed = measure([FOX] * 50, 50)
    assert collapsed.distance == 0.0 and collapsed.distinct == pytest.approx(1 / 50)
    varied = measure([f"{i} {i + 1000} {i + 2000} {i + 3000}" for i in range(50)], 50)
    assert varied.distance == varied.distinct == 1.0 and varied.texts == 50
    mixed = measure([FOX.replace("red", f"colour{i}").replace("windowsill", f"place{i}") for i in range(50)], 50)
    assert 0.1 < mixed.distance < 0.6
    assert measure([], 0).distance == measure([FOX], 1).distance == 0.0


def test_the_diversity_of_many_texts_is_that_of_an_even_sample() -> None:
    half = [FOX] * 3000 + [f"{i} {i + 9000} {i + 19000}" for i in range(3000)]
    sampled = measure(iter(half), 6000, sample=200)
    assert sampled == measure(iter(half), 6000, sample=200) and sampled.texts == 6000
    assert 0.4 < sampled.distance < 0.8
