"""A vocabulary is one file, checked; the one that ships is large."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.errors import UsageError
from diptych.stages.write import vocabulary
from raising import raises

PHOTO = vocabulary.load("photo")


def small() -> dict[str, Any]:
    return {
        "name": "small",
        "version": 1,
        "description": "Two animals.",
        "styles": ["a drawing"],
        "palettes": {"colour": ["teal", "plum", "rust"]},
        "subjects": {
            "animals": {
                "kinds": ["cat", "owl"],
                "description": "{size} {kind} with {coat}",
                "looks": {"size": ["small", "large"], "coat": ["a {colour} coat", "{colour} and {colour} spots"]},
                "suits": {"place": ["out"]},
            }
        },
        "lists": {"place": {"groups": {"out": ["in a field", "on a rock"], "in": ["in bed"]}}},
    }


def test_the_vocabulary_that_ships_is_large_enough_for_a_first_data_set() -> None:
    assert vocabulary.names() == ["photo"] and len(PHOTO.categories([])) == 13
    assert sum(len(category.kinds) for category in PHOTO.subjects.values()) >= 180
    assert all(PHOTO.individuals(name) >= 10**9 for name in PHOTO.subjects)
    phrases = [phrase for of in PHOTO.lists.values() for group in of.groups.values() for phrase in group]
    looks = [one for it in PHOTO.subjects.values() for options in it.looks.values() for one in options]
    assert len(set(phrases)) >= 300 and len(looks) >= 400


def test_individuals_are_counted_without_drawing_them() -> None:
    words = vocabulary.Vocabulary.model_validate(small())
    assert words.individuals("animals") == 2 * 2 * (3 + 3 * 2)


def test_a_vocabulary_of_ones_own_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small()))
    words = vocabulary.load(str(path))
    assert words.phrases("place", words.subjects["animals"]) == {"out": ["in a field", "on a rock"]}
    assert vocabulary.digest(str(path)) != vocabulary.digest("photo")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("stiles",), [], "stiles: .*did you mean 'styles'"),
        (("styles",), [], "styles: "),
        (("subjects", "animals", "kinds"), [], "subjects.animals.kinds: "),
        (("subjects", "more"), small()["subjects"]["animals"], r"subjects\.more\.kinds: 'cat'.* animals"),
        (("subjects", "animals", "description"), "{siz} {kind} {coat}", "{siz}.*'size'"),
        (("subjects", "animals", "description"), "{kind} with {coat}", "{size}"),
        (("subjects", "animals", "description"), "A {size} {kind} with {coat}", "article out of .*'A {size}"),
        (("subjects", "animals", "looks", "coat"), ["a {color} coat"], "{color}.*'colour'"),
        (("subjects", "animals", "suits"), {"palce": ["out"]}, "suits: .*'palce'.*'place'"),
        (("subjects", "animals", "suits"), {"place": ["ouT"]}, "suits.place: .*'ouT'.*'out'"),
        (("lists", "place", "groups", "in"), ["in bed, asleep"], "'in bed, asleep'"),
        (("lists", "place", "ordred"), True, "lists.place.ordred: .*did you mean 'ordered'"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(
    tmp_path: Path, place: tuple[str, ...], value: Any, message: str
) -> None:
    values = small()
    into = values
    for key in place[:-1]:
        into = into[key]
    into[place[-1]] = value
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    with raises("vocabulary_invalid", path, kind=UsageError) as caught:
        vocabulary.load(str(path))
    assert re.search(message, str(caught.value))


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    values = small()
    del values["version"], values["styles"], values["subjects"]["animals"]["looks"]
    path.write_text(yaml.safe_dump(values))
    with raises("vocabulary_invalid", "version, styles, subjects.animals.looks: missing", kind=UsageError):
        vocabulary.load(str(path))


def test_a_list_may_be_its_only_group(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    values: dict[str, Any] = small() | {"lists": {"place": ["on a rock", "in a field"]}}
    values["subjects"]["animals"]["suits"] = {}
    path.write_text(yaml.safe_dump(values))
    words = vocabulary.load(str(path))
    assert words.lists["place"].groups == {"all": ["on a rock", "in a field"]}


def test_what_is_no_yaml_and_what_is_not_there_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(UsageError, match="broken"):
        vocabulary.load(str(path))
    with raises("name_unknown", "'fhoto'", "auto, pocket, photo", "'photo'", kind=UsageError):
        vocabulary.load("fhoto")
