"""`Student`: load by folder, generate one picture or many, and say what made each."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from diptych import Student, __version__
from diptych.errors import UsageError, UserError


@pytest.fixture
def student(student_folder, teacher):
    made = Student.load(student_folder, base=teacher, device="cpu")
    made.pipeline.set_progress_bar_config(disable=True)
    return made


def test_one_picture_carries_what_made_it(student, pictures):
    image = student.generate(pictures[0], "a red cat", seed=3, steps=2, text_guidance=2.0)
    assert isinstance(image, Image.Image)
    assert image.size == (16, 16)
    told = {"prompt": "a red cat", "seed": 3, "steps": 2, "text_guidance": 2.0, "width": 16, "model": student.name}
    assert told.items() <= image.info.items()
    assert image.info["versions"]["diptych"] == __version__
    assert len(image.info["fingerprints"]) == 2


def test_provenance_survives_the_png(student, pictures, tmp_path):
    from diptych.data.images import read_provenance, save_image

    image = student.generate(pictures[0], "a red cat", steps=1)
    assert read_provenance(save_image(image, tmp_path / "a.png", image.info)) == image.info


def test_lists_multiply_and_each_is_the_picture_made_alone(student, pictures):
    many = student.generate(pictures[:2], ["a cat", "a dog"], seed=[0, 5], steps=2)
    assert [(i.info["prompt"], i.info["seed"]) for i in many[:4]] == [
        ("a cat", 0), ("a cat", 5), ("a dog", 0), ("a dog", 5)]  # fmt: skip
    assert len(many) == 8
    alone = student.generate(pictures[1], "a dog", seed=0, steps=2)
    assert many[6].tobytes() == alone.tobytes()
    assert isinstance(student.generate([pictures[0]], "a cat", steps=1), list)


def test_batches_draw_the_same_pictures(student, pictures):
    import numpy as np

    options = {"seed": [0, 1, 2], "steps": 2, "image_guidance": 1.5}
    singles = student.generate(pictures[0], "a cat", **options)
    batched = student.generate(pictures[0], "a cat", batch_size=2, **options)
    for a, b in zip(singles, batched, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def test_a_file_is_a_reference_and_size_is_width_first(student, pictures, tmp_path):
    pictures[0].save(tmp_path / "r.png")
    image = student.generate(tmp_path / "r.png", "a cat", steps=1, size=(24, 16), fit="contain")
    assert image.size == (24, 16)
    (tmp_path / "broken.png").write_bytes((tmp_path / "r.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"broken\.png"):
        student.generate(str(tmp_path / "broken.png"), "a cat")


def test_unknown_words_are_named_once(student, pictures, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        student.generate(pictures[0], "A red Zeppelin, on the glacier", steps=1)
    said = [r.getMessage() for r in caplog.records if r.name == "diptych.api"]
    assert len(said) == 1
    assert "'zeppelin', 'glacier'" in said[0]
    assert student.unknown_words("a red cat") == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": []}, "empty list"),
        ({"prompt": " "}, "prompt is empty"),
        ({"size": 15}, "multiple of 8"),
        ({"reference": 3}, "not int"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_wrong_arguments(student, pictures, wrong, says):
    with pytest.raises(UsageError, match=says):
        student.generate(**{"reference": pictures[0], "prompt": "a cat", "steps": 1, **wrong})


def test_importing_diptych_is_light():
    code = "import sys, diptych; print(diptych.__version__, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [__version__, "False", "False"]


def test_a_students_own_sampling_settings_are_used_unless_told_otherwise(student_folder, teacher, tmp_path):
    folder = shutil.copytree(student_folder, tmp_path / "student")
    (folder / "sampling.json").write_text('{"steps": 2, "text_guidance": 2.0}')
    drawn = Student.load(folder, base=teacher).generate(None, "a cat")
    assert (drawn.info["steps"], drawn.info["guidance"], drawn.info["text_guidance"]) == (2, 3.5, 2.0)
    told = Student.load(folder, base=teacher).generate(None, "a cat", steps=1, text_guidance=1.0)
    assert (told.info["steps"], told.info["text_guidance"]) == (1, 1.0)
    (folder / "sampling.json").write_text('{"stepz": 2}')
    with pytest.raises(UserError, match="stepz"):
        Student.load(folder, base=teacher)
