"""Every command that generates takes a run's folder for its student, and a run's LoRA needs no --base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_world as tiny
from PIL import Image

from diptych.cli.app import call
from diptych.errors import UserError
from diptych.evaluate.methods.students import locate
from diptych.utils import models


@pytest.fixture(scope="module", params=["full", "lora"])
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return tiny.make_run(teacher, tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    Image.new("RGB", (32, 32), (200, 90, 40)).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


def drawn(out: Path, *words: str) -> list[bytes]:
    assert call([*words, "--out", str(out), "--steps", "1", "--device", "cpu", "--json"]) == 0
    files = sorted(out.rglob("*.png")) if out.is_dir() else [out]
    return [Image.open(path).tobytes() for path in files]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--reference", "CAT", "--prompt", "a cat in the snow"],
        ["relight", "--reference", "CAT", "--light", "light from the left"],
        ["story", "--reference", "CAT", *(word for n in range(4) for word in ("--panel", f"a cat, panel {n}"))],
    ],
    ids=lambda words: words[0],
)
def test_a_run_stands_for_its_student(
    run: Path, teacher: Path, reference: str, tmp_path: Path, words: list[str]
) -> None:
    words = [reference if word == "CAT" else word for word in words]
    named = drawn(tmp_path / "a.png", *words, "--model", str(run / "student"), "--base", str(teacher))
    assert named and drawn(tmp_path / "b.png", *words, "--model", str(run)) == named


def test_a_run_without_a_student_says_how_to_make_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "student" / "training").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    for resolve in (lambda place: models.resolve(place, "student"), locate):
        with pytest.raises(UserError, match=f"diptych distill {tmp_path}/run/recipe.yaml --out {tmp_path}/run"):
            resolve(str(tmp_path / "run"))


def test_a_student_s_folder_with_a_recipe_beside_its_weights_is_that_student(run: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "recipe.yaml").write_text("name: x")
    assert models.run_of(tmp_path) is None and models.resolve(str(tmp_path), "student") == tmp_path
    assert models.run_of(run) == models.run_of(run / "student") == run
    assert json.loads((run / "student" / "origin.json").read_text())["teacher"]
