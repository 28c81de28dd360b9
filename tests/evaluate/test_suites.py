"""The pocket suite: deterministic samples of held-out subjects, whose prompts name exactly the listed attributes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import yaml

from diptych.evaluate import suites
from diptych.pocket import captions, world
from raising import raises

PHRASES = {
    "place": captions.PLACES,
    "pose": captions.POSES,
    "prop": captions.PROPS,
    "weather": captions.WEATHERS,
    "light": {name: (words,) for name, words in captions.DIRECTIONS.items()},
    "colour": {name: (f"{name} light",) for name in world.LIGHT_COLOURS},
}


@pytest.fixture(scope="module")
def samples() -> list[suites.Sample]:
    return suites.load("pocket").samples(40, 5)


def test_the_same_suite_asks_the_same(samples: list[suites.Sample]) -> None:
    again = suites.load("pocket")
    assert again.samples(40, 5) == samples
    assert again.reference_image(samples[7]).tobytes() == suites.load("pocket").reference_image(samples[7]).tobytes()


def test_a_longer_suite_begins_with_the_shorter_ones_subjects(samples: list[suites.Sample]) -> None:
    suite = suites.load("pocket")
    few = suite.samples(6, 5)
    assert [s for s in few if s.split == "identities"] == samples[: 6 * 5]


def test_every_attribute_is_in_the_prompt_and_in_the_target_scene(samples: list[suites.Sample]) -> None:
    suite = suites.load("pocket")
    for sample in samples:
        target = suite.of(sample).target
        assert sample.asked
        for group, value in sample.asked.items():
            said = PHRASES[group][value]
            for text in (sample.prompt, sample.grid_prompt.split("right:")[1]):
                assert any(words in text for words in said), (group, sample)
            in_scene = {"light": target.light.direction, "colour": target.light.colour}
            assert in_scene.get(group, getattr(target, group, None)) == value


def test_other_attributes_are_not_in_the_prompt(samples: list[suites.Sample]) -> None:
    assert any(PHRASES.keys() - sample.asked.keys() for sample in samples)
    for sample in samples:
        for group in PHRASES.keys() - sample.asked.keys():
            for phrases in PHRASES[group].values():
                assert not any(f" {words}" in sample.prompt for words in phrases), (group, sample.prompt)


def test_a_copy_of_the_reference_has_no_requested_attribute(samples: list[suites.Sample]) -> None:
    suite = suites.load("pocket")
    for sample in samples:
        reference = suite.of(sample).reference
        shown = {"light": reference.light.direction, "colour": reference.light.colour}
        shown |= {group: getattr(reference, group) for group in ("place", "pose", "prop", "weather")}
        assert sample.asked and not any(shown[group] == value for group, value in sample.asked.items())


def test_prompts_are_readable_to_the_pocket_models_and_short_enough(samples: list[suites.Sample]) -> None:
    for sample in samples:
        assert captions.unknown_words(sample.prompt) == [] and captions.unknown_words(sample.grid_prompt) == []
        assert captions.count_words(sample.prompt) <= captions.LONGEST
        assert captions.count_words(sample.grid_prompt) <= captions.LONGEST


def test_kinds_take_turns_and_held_out_kinds_are_never_named(samples: list[suites.Sample]) -> None:
    main = [s for s in samples if s.split == "identities"]
    counts = Counter(s.kind for s in main)
    assert set(counts) == set(world.TRAIN_KINDS) and len(set(counts.values())) == 1
    held_out = [s for s in samples if s.split == "kinds"]
    assert {s.kind for s in held_out} == set(world.HELD_OUT_KINDS)
    assert all(s.prompt.split()[1] in captions.GENERIC for s in held_out)
    assert all(s.prompt.split()[1] == s.kind for s in main)


def test_difficulties_are_spread_whatever_the_number_of_prompts() -> None:
    suite = suites.load("pocket")
    names = [level.name for level in suite.levels]
    assert [suite.level(i, 5).name for i in range(5)] == names
    assert [suite.level(i, 2).name for i in range(2)] == [names[1], names[3]]
    assert Counter(suite.level(i, 10).name for i in range(10)) == dict.fromkeys(names, 2)


def test_subjects_of_suite_calibration_check_and_training_are_all_different() -> None:
    suite = suites.load("pocket")
    found = [suite.subject(purpose, "identities", i) for purpose in suites.PURPOSES for i in range(20)]
    for seed in (0, 1, 99):
        found += [world.sample_identity(np.random.default_rng([seed, i])) for i in range(20)]
    assert len({repr(identity) for identity in found}) == len(found)


def test_noise_depends_on_sample_and_seed_alone() -> None:
    assert suites.seed_of("i000-1", 0) == suites.seed_of("i000-1", 0)
    assert len({suites.seed_of(name, seed) for name in ("i000-1", "i000-2") for seed in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("change", "key"),
    [({"levels": []}, "levels"), ({"wrong": 1}, "wrong"), ({"namespace": 3}, "namespace")],
)
def test_an_invalid_suite_file_is_rejected_by_the_key(change: dict[str, Any], key: str, tmp_path: Any) -> None:
    path = tmp_path / "custom.yaml"
    path.write_text(yaml.safe_dump(suites.load("pocket").model_dump(mode="json") | change))
    with raises("suite_invalid", path, key):
        suites.load(str(path))


def test_an_unknown_suite_names_the_nearest() -> None:
    with raises("name_unknown", "'poket'", "'pocket'"):
        suites.load("poket")
