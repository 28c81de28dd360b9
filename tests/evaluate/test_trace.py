"""A picture leads back to the grids, and a byte that flips anywhere on the way is found and named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_world as tiny

from diptych.cli.app import call
from diptych.provenance.trace import trace

DATA = ("pairs", "candidates", "grids", "prompts")


@pytest.fixture(scope="module", params=["full", "lora"])
def world(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole small run, and pictures that its student drew, elsewhere."""
    from diptych.apps.student import Student
    from diptych.data.images import save_image

    folder = tmp_path_factory.mktemp("trace")
    out = tiny.make_run(teacher, folder, request.param)
    base = teacher if request.param == "lora" else None
    student = Student.load(out / "student", base, device="cpu", progress_bar=False)
    image = student.generate(None, "a cat in the snow", seed=1, steps=2)
    pictures = [
        save_image(image, folder / "drawn" / f"cat.{kind}", dict(image.info)) for kind in ("png", "webp", "jpg")
    ]
    return {"run": out, "pictures": pictures, "teacher": teacher, "judge": folder / "judges" / "curator"}


def statuses(chain: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield chain["what"], chain["status"], f"{chain['where']} {chain['says']}"
    for link in chain["links"]:
        yield from statuses(link)


@contextmanager
def flipped(path: Path, at: float) -> Iterator[None]:
    """One bit of the file is another for a while; its time stays that of a file that changed."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(changed))
    try:
        yield
    finally:
        path.write_bytes(data)


def test_a_picture_leads_to_the_grids_the_recipe_and_the_teacher(world: dict[str, Any]) -> None:
    for picture in world["pictures"]:
        found = trace(picture)
        seen = {what: status for what, status, _ in statuses(found["chain"])}
        wanted = {"picture", "student", "run", "recipe", "teacher", "judge", *DATA}
        assert found["verified"] and {**seen, "base": "ok"} == dict.fromkeys({*wanted, "base"}, "ok")


def test_a_sheet_of_samples_and_the_weights_lead_there_too(world: dict[str, Any]) -> None:
    student = world["run"] / "student"
    weights = next(iter(sorted([*student.glob("*.safetensors"), *student.glob("transformer/*.safetensors")])))
    for start in (next((student / "training/samples").glob("*.png")), student, weights, world["run"]):
        assert {"grids", "recipe"} <= {what for what, status, _ in statuses(trace(start)["chain"]) if status == "ok"}


@pytest.mark.parametrize("at", [0.02, 0.4, 0.97])
def test_a_flipped_byte_anywhere_is_found_and_named(
    world: dict[str, Any], at: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run, picture = world["run"], world["pictures"][0]
    chain = [p for name in DATA for p in sorted((run / name).iterdir())]
    chain += [
        run / "recipe.yaml",
        *sorted(p for p in (run / "student").rglob("*.safetensors") if "training" not in p.parts),
    ]
    chain += sorted(p for p in (run / "student").rglob("*.json") if "training" not in p.parts)
    chain.append(run / "student" / "training" / "summary.json")
    assert len(chain) > 12
    for path in chain:
        with flipped(path, at):
            assert call(["trace", str(picture)]) == 1, path
        said = capsys.readouterr().out
        named = [line for line in said.splitlines() if line.lstrip().startswith("✗")]
        assert any(path.name in line for line in named), (path, said)
    for what, folder in (("teacher", world["teacher"] / "transformer"), ("judge", world["judge"])):
        with flipped(next(folder.glob("*.safetensors")), at):
            assert call(["trace", str(picture)]) == 1
        assert f"✗ {what}" in capsys.readouterr().out
    assert call(["trace", str(picture)]) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_flipped_pixel_is_found_in_every_kind_of_picture(world: dict[str, Any], place: int) -> None:
    picture = world["pictures"][place]
    with flipped(picture, 0.7 if place != 1 else 0.2):
        assert call(["trace", str(picture)]) == 1


def test_a_picture_with_other_words_in_it_is_found(world: dict[str, Any]) -> None:
    picture = world["pictures"][2]
    data = picture.read_bytes()
    assert b"a cat in the snow" in data
    picture.write_bytes(data.replace(b"a cat in the snow", b"a dog in the snow"))
    try:
        assert "text" in trace(picture)["chain"]["says"]
    finally:
        picture.write_bytes(data)


def test_far_from_its_run_a_picture_needs_to_be_told_where(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "far" / "away" / "from" / "all" / "of" / "it" / "cat.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(world["pictures"][0].read_bytes())
    told = trace(copy, [world["run"]])
    assert ("grids", "ok") in [(what, status) for what, status, _ in statuses(told["chain"])]
    moved = world["run"].rename(tmp_path / "moved")
    try:
        assert call(["trace", str(copy), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["chain"]["links"][0]
        assert said["status"] == "missing" and "--in" in said["says"]
    finally:
        moved.rename(world["run"])


def test_what_diptych_did_not_make_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("photo.png", "notes.txt", "nothing.png"):
        assert call(["trace", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
