"""Suites of images read the published layouts, and report what is wrong with another folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import toy_images as toy
from PIL import Image

from diptych.evaluate import suites
from diptych.evaluate.suites import images
from raising import raises

PROMPTS_AND_CLASSES = """Classes

subject_name,class
backpack_dog,backpack
cat2,cat
missing_one,toy

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a santa hat'.format(unique_token, class_token),
]
"""


def put(path: Path, color: str = "red", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_the_suites_that_ship_are_these_and_all_have_a_version() -> None:
    assert suites.names() == ["dreambench", "dreambench++", "folder", "pocket"]
    assert all(suites.read(name)["version"] >= 1 for name in suites.names())


def test_dreambench_reads_classes_prompts_and_further_images(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        put(root / "backpack_dog" / name)
    put(root / "cat2" / "00.jpg")
    (root / "prompts_and_classes.txt").write_text(PROMPTS_AND_CLASSES)
    suite = images.open_suite("dreambench", tmp_path)
    assert isinstance(suite, images.ImageSuite)
    bag, cat = suite.subjects
    assert bag.prompts == ("a backpack in the jungle", "a red backpack") and len(bag.more) == 2
    assert cat.prompts == ("a cat wearing a santa hat",) and cat.category == "live subject"
    sample = suite.samples(None, None)[0]
    assert (
        suite.reference_image(sample).size == (512, 512)
        and "{" not in sample.grid_prompt
        and sample.subject == "backpack"
    )


def test_a_custom_folder_needs_images_and_prompts(tmp_path: Path) -> None:
    put(tmp_path / "references" / "toys" / "red-car.png")
    put(tmp_path / "references" / "toys" / "bear.png")
    (tmp_path / "references" / "toys" / "bear.txt").write_text("brown teddy\na {} at sea\n")
    with raises("suite_invalid", tmp_path / "prompts.txt"):
        images.open_suite("folder", tmp_path)
    (tmp_path / "prompts.txt").write_text("# mine\na {} on the moon\n\na {} in snow\n")
    suite = images.open_suite("folder", tmp_path, 64)
    assert isinstance(suite, images.ImageSuite)
    asked = [(s.id, s.prompt, s.kind) for s in suite.samples(None, None)]
    assert asked == [
        ("toys_bear-0", "a brown teddy at sea", "toys"),
        ("toys_red-car-0", "a red car on the moon", "toys"),
        ("toys_red-car-1", "a red car in snow", "toys"),
    ]


def test_fewer_references_and_prompts_are_spread_over_categories_and_levels(tmp_path: Path) -> None:
    suite = images.open_suite("dreambench++", toy.make_folder(tmp_path))
    few = suite.samples(3, 3)
    assert Counter(s.kind for s in few) == dict.fromkeys(("live_subject/animal", "live_subject/human", "object"), 3)
    assert Counter(s.level for s in few) == dict.fromkeys(("photoreal", "style", "imaginative"), 3)
    assert {s.id for s in few} < {s.id for s in suite.samples(None, None)}  # pyright: ignore[reportArgumentType]


def test_the_fingerprint_covers_images_and_prompts_and_not_their_path(tmp_path: Path) -> None:
    one, two = toy.make_folder(tmp_path / "one"), toy.make_folder(tmp_path / "two")

    def fingerprint(folder: Path) -> str:
        return images.open_suite("dreambench++", folder).fingerprint()

    first = fingerprint(one)
    assert fingerprint(two) == first
    put(two / "data" / "images" / "object" / "00.jpg", "blue")
    assert fingerprint(two) != first
    caption = one / "data" / "captions" / "object" / "00.txt"
    caption.write_text(caption.read_text().replace("scene", "place"))
    assert fingerprint(one) != first


@pytest.mark.parametrize(
    ("suite", "change", "code", "facts"),
    [
        ("dreambench++", "no data", "option_missing", ("--data",)),
        ("dreambench++", "empty", "suite_invalid", ("images/", "captions/")),
        ("dreambench++", "caption", "suite_invalid", ("object/00.txt", "7", "9")),
        ("dreambench++", "no caption", "suite_invalid", ("object/00.txt",)),
        ("dreambench", "empty", "suite_invalid", ("prompts_and_classes.txt",)),
        ("folder", "empty", "suite_invalid", ("references/",)),
        ("dreambensh", "empty", "name_unknown", ("'dreambench'",)),
        ("pocket", "empty", "option_unsuited", ("--data",)),
    ],
)
def test_a_folder_of_another_layout_is_rejected(
    suite: str, change: str, code: str, facts: tuple[str, ...], tmp_path: Path
) -> None:
    if "caption" in change:
        toy.make_folder(tmp_path)
        caption = tmp_path / "data" / "captions" / "object" / "00.txt"
        if change == "caption":
            caption.write_text("\n".join(caption.read_text().splitlines()[:8]))
        else:
            caption.unlink()
    with raises(code, *facts):
        images.open_suite(suite, None if change == "no data" else tmp_path)
