"""Batches: the requests, their file names, what is generated again, and what fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych import Student
from diptych.apps import batch
from diptych.data.images import open_image, read_provenance
from diptych.errors import UsageError
from diptych.pocket import world
from diptych.utils.console import Display
from diptych.utils.paths import packaged
from raising import raises

CATS = {"reference": ["a/cat.png", "b/dog.png"], "prompt": "a cat, jumping", "seed": [1, 2]}
POCKET: dict[str, Any] = {"model": "pocket", "device": "cpu"}
PROMPT = "a cat on the beach"


def names(asked: dict[str, Any], out: str | None = "out", jobs: Path | None = None) -> list[str]:
    return [str(request.out) for request in batch.plan(asked, jobs, out).requests]


def jobs_file(folder: Path, *rows: Any) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# Requests and file names --------------------------------------------------------------------------------------------


def test_references_prompts_and_seeds_multiply_and_are_named_after_themselves() -> None:
    assert names(CATS) == [
        f"out/{reference}-a-cat-jumping-{seed}.png" for reference in ("cat", "dog") for seed in (1, 2)
    ]
    assert names(CATS, "out/{seed:03d}/{reference}.webp")[0] == "out/001/cat.webp"
    assert batch.plan(CATS, None, "x/{seed}/{reference}.jpg").folder == Path("x")


def test_one_picture_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    one = {"reference": "cat.png", "prompt": "x"}
    assert names(one, None) == ["diptych.png"]
    assert names(one, "a.webp") == ["a.webp"] and batch.plan(one, None, "a.webp").folder is None
    (tmp_path / "a.png").mkdir()
    assert names(one, str(tmp_path / "a.png")) == [str(tmp_path / "a.png" / "cat-x-0.png")]


def test_long_and_foreign_prompts_make_names_that_a_file_system_takes() -> None:
    words = "猫" * 300
    first, second = names({"reference": "cat.png", "prompt": [words + "a", words + "b"]})
    assert first != second and first.startswith("out/cat-猫猫") and len(Path(first).name.encode()) < 200
    assert names({"reference": "cat.png", "prompt": "../../etc: a/b?"}) == ["out/cat-etc-a-b-0.png"]


def test_names_that_would_meet_are_told_apart_and_the_same_picture_is_drawn_once(tmp_path: Path) -> None:
    row = {"reference": "cat.png", "prompt": "a cat"}
    path = jobs_file(tmp_path, row, row, {**row, "steps": 3}, {**row, "prompt": "A CAT"})
    found = names({}, "out", path)
    assert len(found) == 3 and found[0] == "out/cat-a-cat-0.png"
    assert found[1].startswith("out/cat-a-cat-0-") and found[2].startswith("out/cat-A-CAT-0-")
    with raises("output_collision", "rows 1 and 3", "out/cat.png", kind=UsageError):
        names({}, "out/{reference}.png", path)
    same = [{**row, "out": "x.png"}, {**row, "seed": 1, "out": "X.png"}]
    with raises("output_collision", "rows 1 and 2", kind=UsageError):
        names({}, "out", jobs_file(tmp_path, *same))


def test_rows_take_what_they_do_not_say_from_the_command(tmp_path: Path) -> None:
    path = jobs_file(tmp_path, {"reference": "r/a.png", "size": "512x768", "seed": [3, 4]}, "", {"prompt": "b"})
    common = {"reference": "c.png", "prompt": "a", "steps": 5}
    found = batch.plan(common, path, "out").requests
    assert [(r.reference, r.prompt, r.seed, r.row) for r in found] == [
        (tmp_path / "r/a.png", "a", 3, 1), (tmp_path / "r/a.png", "a", 4, 1), (Path("c.png"), "b", 0, 3)]  # fmt: skip
    assert found[0].options == {"steps": 5, "size": (512, 768)} and found[2].options == {"steps": 5}


@pytest.mark.parametrize(
    ("row", "code", "fact"),
    [
        ("{", "json_invalid", ""),
        ("[1]", "row_invalid", "list"),
        ({"promt": "x"}, "row_invalid", "'promt'; did you mean 'prompt'"),
        ({"reference": "a.png"}, "row_invalid", "'prompt'"),
        ({"prompt": "x"}, "row_invalid", "'reference'"),
        ({"reference": 3, "prompt": "x"}, "row_invalid", "reference"),
        ({"reference": "a.png", "prompt": "x", "out": "../x.png"}, "row_invalid", "'../x.png'"),
    ],
)
def test_a_wrong_row_is_named_before_anything_is_done(tmp_path: Path, row: Any, code: str, fact: str) -> None:
    path = jobs_file(tmp_path, {"reference": "a.png", "prompt": "x"}, row)
    with raises(code, "jobs.jsonl:2: ", fact, kind=UsageError):
        batch.plan({}, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "code", "fact"),
    [
        ({"prompt": " "}, "text_empty", "2: "),
        ({"reference": []}, "option_missing", "reference"),
        ({"seed": -1}, "option_invalid", "-1"),
        ({"steps": 0}, "option_invalid", "steps"),
        ({"guidance": "3"}, "option_invalid", "'3'"),
        ({"size": "big"}, "size_invalid", "big"),
        ({"size": [1, 2, 3]}, "size_invalid", "(1, 2, 3)"),
        ({"fit": "cropp"}, "option_invalid", "did you mean 'crop'"),
        ({"background": "whit"}, "option_invalid", "'whit'"),
        ({"out": "x.gif"}, "file_format_unknown", ".png"),
    ],
)
def test_a_value_that_no_model_accepts_is_named_with_its_row(
    tmp_path: Path, changed: dict[str, Any], code: str, fact: str
) -> None:
    path = jobs_file(tmp_path, {"reference": "a.png", "prompt": "x"}, {"reference": "a.png", "prompt": "x", **changed})
    with raises(code, fact, kind=UsageError):
        batch.plan({}, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "code", "fact"),
    [
        ("out/{promt}.png", "option_invalid", "{promt}; did you mean 'prompt'"),
        ("out/{}.png", "option_invalid", "{}"),
        ("out/{seed.real}.png", "option_invalid", "{seed.real}"),
        ("out/{seed:x!}.png", "option_invalid", "'x!'"),
        ("out/{seed", "option_invalid", "{reference}"),
        ("cat.png", "output_collision", "4 images"),
        (None, "option_missing", "--out"),
    ],
)
def test_places_that_cannot_hold_the_images_are_rejected(out: str | None, code: str, fact: str) -> None:
    with raises(code, fact, kind=UsageError):
        batch.plan(CATS, None, out)


@pytest.mark.parametrize("out", ["out/{seed}-{reference}.tiff", "cat.gif"])
def test_a_suffix_that_is_not_written_names_those_that_are(out: str) -> None:
    with raises("file_format_unknown", ".png", kind=UsageError):
        batch.plan(CATS, None, out)


def test_a_folder_stands_for_its_images(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", ".hidden.png", "notes.txt", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    found = batch.plan({"reference": str(tmp_path), "prompt": "x"}, None, "out").requests
    assert [r.reference and r.reference.name for r in found] == ["a.PNG", "b.jpg", "c.webp"]
    (tmp_path / "empty").mkdir()
    with raises("image_not_found", tmp_path / "empty", kind=UsageError):
        batch.plan({"reference": str(tmp_path / "empty"), "prompt": "x"}, None, "out")


# Drawing, with the shipped pocket student ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket() -> Student:
    return Student.load(**POCKET, progress_bar=False)


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    folder = tmp_path / "subjects"
    folder.mkdir()
    for kind in ("cat", "car"):
        shutil.copy(packaged(f"examples/references/{kind}.png"), folder)
    return folder


class Loader:
    """Opens the student, and counts how often it had to."""

    def __init__(self, student: Student) -> None:
        self.student, self.times = student, 0

    def __call__(self) -> Student:
        self.times += 1
        return self.student


def generated(plan: batch.BatchPlan, load: Any, loading: dict[str, Any] = POCKET, **options: Any) -> batch.BatchResult:
    return batch.generate(plan, loading, load, Display(quiet=True), **options)


def test_a_folder_is_drawn_once_and_again_only_where_something_changed(
    pocket: Student, subjects: Path, tmp_path: Path
) -> None:
    out, load = tmp_path / "out", Loader(pocket)
    (subjects / "broken.png").write_bytes((subjects / "cat.png").read_bytes()[:20])
    asked: dict[str, Any] = {"reference": str(subjects), "prompt": PROMPT, "steps": 1}
    first = generated(batch.plan(asked, None, out), load)
    assert [path.name for path, _ in first.generated] == [f"{kind}-a-cat-on-the-beach-0.png" for kind in ("car", "cat")]
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert failed == first.failed and len(failed) == 1
    assert failed[0]["reference"].endswith("broken.png") and "broken.png" in failed[0]["reason"]
    told = read_provenance(first.generated[1][0])
    assert told is not None and told["reference_file"] == "cat.png" and told["steps"] == 1
    before = {path: path.read_bytes() for path, _ in first.generated}

    again = generated(batch.plan(asked, None, out), load)
    assert (len(again.generated), len(again.skipped), len(again.failed), load.times) == (0, 2, 1, 1), (
        "nothing was loaded"
    )

    shutil.copy(subjects / "cat.png", subjects / "broken.png")  # mended
    shutil.copy(subjects / "cat.png", subjects / "car.png")  # another picture under the old name
    mended = generated(batch.plan(asked, None, out), load)
    assert sorted(path.name[:3] for path, _ in mended.generated) == ["bro", "car"] and len(mended.skipped) == 1
    assert not (out / "failed.jsonl").exists()
    assert before[first.generated[1][0]] == first.generated[1][0].read_bytes()

    more = generated(batch.plan({**asked, "text_guidance": 2.0}, None, out), load)
    assert len(more.generated) == 3 and not more.skipped, "asked for differently: drawn again"


def test_interrupted_it_goes_on_where_it_stopped(pocket: Student, subjects: Path, tmp_path: Path) -> None:
    asked = {"reference": str(subjects / "cat.png"), "prompt": PROMPT, "seed": [0, 1, 2], "steps": 2}
    plan = batch.plan(asked, None, tmp_path / "out")

    class Impatient(Display):
        """Presses Ctrl-C in the middle of the second picture."""

        @contextmanager
        def stage(self, name: str, unit: str) -> Iterator[Any]:
            def report(done: int, total: int, note: str = "") -> None:
                if (done, note) == (1, "step 1/2"):
                    raise KeyboardInterrupt

            yield report

    with pytest.raises(KeyboardInterrupt):
        batch.generate(plan, POCKET, Loader(pocket), Impatient(quiet=True))
    there = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in there] == ["cat-a-cat-on-the-beach-0.png"]
    rest = generated(plan, Loader(pocket))
    assert (len(rest.generated), rest.skipped) == (2, there)
    whole = pocket.generate(subjects / "cat.png", PROMPT, seed=2, steps=2)
    assert open_image(rest.generated[1][0]).tobytes() == whole.tobytes()


def test_a_row_that_the_model_refuses_costs_that_row_only(pocket: Student, subjects: Path, tmp_path: Path) -> None:
    row = {"reference": "cat.png", "prompt": PROMPT, "steps": 1}
    path = jobs_file(subjects, {**row, "size": 63}, {**row, "out": "deep/er/x.webp", "size": [64, 32]}, row)
    result = generated(batch.plan({}, path, tmp_path / "out"), Loader(pocket))
    assert len(result.generated) == 2 and result.failed[0]["row"] == 1
    assert "16" in result.failed[0]["reason"] and "48" in result.failed[0]["reason"]
    assert open_image(tmp_path / "out/deep/er/x.webp").size == (64, 32)
    told = read_provenance(tmp_path / "out/deep/er/x.webp")
    assert told is not None and told["width"] == 64 and told["reference_file"] == "cat.png"
    assert batch.format_counts(result) == "2 generated, 1 failed"


def test_what_no_request_made_is_never_overwritten(pocket: Student, subjects: Path, tmp_path: Path) -> None:
    load = Loader(pocket)
    mine = tmp_path / "out" / "cat.png"
    mine.parent.mkdir()
    Image.new("RGB", (8, 8)).save(mine)
    asked = {"reference": str(subjects / "cat.png"), "prompt": PROMPT}
    with raises("output_exists", mine, kind=UsageError):
        generated(batch.plan(asked, None, f"{mine.parent}/{{reference}}.png"), load)
    for out in (f"{subjects}/{{reference}}.png", str(subjects / "cat.png")):
        with raises("output_collision", subjects / "cat.png", kind=UsageError):
            generated(batch.plan(asked, None, out), load)
    with raises("output_collision", subjects / "cat.png", kind=UsageError):
        generated(batch.plan(asked, None, "x.png"), load, preview=subjects / "cat.png")
    assert load.times == 0


def test_one_picture_fails_as_itself_before_a_model_is_loaded(pocket: Student, subjects: Path, tmp_path: Path) -> None:
    load = Loader(pocket)
    (subjects / "cat.png").write_bytes(b"no picture")
    with raises("image_unreadable", "cat.png"):
        generated(
            batch.plan({"reference": str(subjects / "cat.png"), "prompt": PROMPT}, None, tmp_path / "a.png"), load
        )
    assert load.times == 0 and not (tmp_path / "a.png").exists()


def test_a_preview_file_is_there_while_a_picture_is_drawn(pocket: Student, subjects: Path, tmp_path: Path) -> None:
    asked = {"reference": str(subjects / "cat.png"), "prompt": PROMPT, "steps": 3}
    out, seen = tmp_path / "a.png", tmp_path / "seen.jpg"
    result = generated(batch.plan(asked, None, out), Loader(pocket), preview=seen)
    assert open_image(seen).size == open_image(out).size == (world.PANEL, world.PANEL)
    plain = pocket.generate(subjects / "cat.png", PROMPT, steps=3)
    assert open_image(out).tobytes() == plain.tobytes() and result.skipped == []


def test_weights_and_not_their_place_or_the_device_make_a_request(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    first = batch.identify({"model": str(tmp_path / "a"), "base": None, "device": "cpu", "speed": "exact"})
    assert first == batch.identify({"model": str(tmp_path / "b"), "device": "mps", "speed": "exact"})
    assert first != batch.identify({"model": str(tmp_path / "b"), "speed": "fast"})
    (tmp_path / "b" / "config.json").write_text('{"x": 1}')
    assert first != batch.identify({"model": str(tmp_path / "b"), "speed": "exact"})
    lora = tmp_path / "l.safetensors"
    lora.write_bytes(b"1")
    one = batch.identify({"model": "pocket", "lora": [(str(lora), 0.5)]})
    lora.write_bytes(b"22")
    assert one != batch.identify({"model": "pocket", "lora": [(str(lora), 0.5)]})
    assert batch.identify({"model": "pocket"}) == batch.identify({"model": "pocket", "base": "pocket", "lora": ()})


def test_a_few_step_lora_is_told_by_what_it_holds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "turbo.safetensors").write_bytes(b"1")
    first, second = ({"model": "pocket", "switches": [f"few-step-lora={tmp_path / n}/turbo.safetensors"]} for n in "ab")
    assert batch.identify(first) == batch.identify(second)
    (tmp_path / "b" / "turbo.safetensors").write_bytes(b"2")
    assert batch.identify(first) != batch.identify(second)
    assert batch.identify({"model": "pocket", "switches": [f"{second['switches'][0]}:0.5"]}) != batch.identify(second)
