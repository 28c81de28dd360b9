"""`Student`: load by folder, generate one picture or many, and say what made each."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from diptych import Student, __version__
from diptych.errors import UsageError, UserError
from raising import raises


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
    with raises("image_unreadable", tmp_path / "broken.png"):
        student.generate(str(tmp_path / "broken.png"), "a cat")


def test_unknown_words_are_named_once(student, pictures, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        student.generate(pictures[0], "A red Zeppelin, on the glacier", steps=1)
    said = [r.getMessage() for r in caplog.records if r.name == "diptych.apps.student"]
    assert len(said) == 1
    assert "'zeppelin', 'glacier'" in said[0]
    assert student.unknown_words("a red cat") == []


@pytest.mark.parametrize(
    ("wrong", "code", "facts"),
    [
        ({"seed": -1}, "option_invalid", ["seed", "-1"]),
        ({"seed": 1.5}, "option_invalid", ["seed", "1.5"]),
        ({"seed": []}, "option_missing", ["seed"]),
        ({"prompt": " "}, "text_empty", ["prompt"]),
        ({"size": 15}, "size_invalid", ["15", "8 or 16"]),
        ({"size": (16, 20)}, "size_invalid", ["height", "20", "8"]),
        ({"size": "big"}, "size_invalid", ["'big'"]),
        ({"size": (16, 16, 16)}, "size_invalid", ["(16, 16, 16)"]),
        ({"size": -16}, "size_invalid", ["-16"]),
        ({"guidance": -1}, "option_invalid", ["guidance", "-1"]),
        ({"text_guidance": float("nan")}, "option_invalid", ["text_guidance", "nan"]),
        ({"image_guidance": "2"}, "option_invalid", ["image_guidance", "'2'"]),
        ({"fit": "padd"}, "option_invalid", ["'padd'", "'pad'"]),
        ({"background": "blu"}, None, ["'blue'"]),
        ({"negative_prompt": ["a cat"]}, "argument_type", ["negative_prompt", "list"]),
        ({"reference": 3}, "argument_type", ["int"]),
        ({"batch_size": 0}, None, ["batch_size"]),
        ({"steps": 0}, "option_invalid", ["steps", "0"]),
    ],
)
def test_wrong_arguments(student, pictures, wrong, code, facts):
    with pytest.raises(UsageError) as caught:
        student.generate(**{"reference": pictures[0], "prompt": "a cat", "steps": 1, **wrong})
    assert caught.value.code == (code or caught.value.code)
    assert all(fact in str(caught.value) for fact in facts), str(caught.value)


def test_a_transparent_reference_lies_over_the_chosen_colour(student):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    for name in ("white", "red"):
        over = student.generate(clear, "a cat", steps=1, background=name)
        assert over.tobytes() == student.generate(Image.new("RGB", (16, 16), name), "a cat", steps=1).tobytes()
        assert over.info["background"] == name


def test_a_negative_prompt_acts_with_true_guidance_and_says_when_it_does_not(student, pictures, caplog):
    plain = student.generate(pictures[0], "a cat", steps=3)
    assert student.generate(pictures[0], "a cat", steps=3, negative_prompt="a dog").tobytes() == plain.tobytes()
    assert "does nothing unless image or text guidance is above 1" in caplog.text
    guided = [student.generate(pictures[0], "a cat", steps=3, text_guidance=3, negative_prompt=text) for text in
              (None, "A Dog", "a dog")]  # fmt: skip
    assert guided[0].tobytes() != guided[1].tobytes()
    assert guided[1].tobytes() == guided[2].tobytes()  # read as the prompt is


def test_callbacks_are_called_after_every_step_and_may_change_the_latents(student, pictures):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))

    plain = student.generate(pictures[0], "a cat", steps=2)
    assert student.generate(pictures[0], "a cat", steps=2, callback_on_step_end=note).tobytes() == plain.tobytes()
    assert seen == [(0, ["latents"]), (1, ["latents"])]
    zero = student.generate(
        pictures[0], "a cat", steps=2, callback_on_step_end=lambda p, i, t, given: {"latents": 0 * given["latents"]}
    )
    assert zero.tobytes() != plain.tobytes()


def test_previews_come_while_drawing_and_change_nothing(student, pictures):
    shown = []

    def show(done, steps, images):
        shown.append((done, steps, [image.size for image in images]))

    options = {"seed": [0, 1], "steps": 5, "size": (24, 16), "batch_size": 2}
    plain = student.generate(pictures[0], "a cat", **options)
    drawn = student.generate(pictures[0], "a cat", **options, on_preview=show, preview_every=2)
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in plain]
    assert shown == [(done, 5, [(24, 16), (24, 16)]) for done in (2, 4, 5)]


def test_memory_that_runs_out_says_what_to_ask_for_instead(student, pictures):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    with raises("memory_insufficient", "16×16", "--memory auto"):
        student.generate(pictures[0], "a cat", steps=1, callback_on_step_end=full)
    with raises("memory_insufficient", "2 images of 16×16"):
        student.generate(pictures[0], "a cat", seed=[0, 1], batch_size=2, steps=1, callback_on_step_end=full)

    def other(*_):
        raise NotImplementedError("something else")

    with pytest.raises(NotImplementedError):
        student.generate(pictures[0], "a cat", steps=1, callback_on_step_end=other)


def test_memory_that_runs_out_while_loading_names_the_presets(student_folder, teacher, monkeypatch):
    import torch

    from diptych.student.pipeline import DiptychPipeline

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(DiptychPipeline, "to", full)
    with raises("memory_insufficient", student_folder, "--memory auto", "diptych doctor"):
        Student.load(student_folder, base=teacher, device="cpu")


def test_a_picture_says_which_loras_were_on_it_and_how_strong(student_folder, teacher, pictures, tmp_path):
    import torch
    from safetensors.torch import save_file

    name, path = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "style.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}, path)
    drawn = Student.load(student_folder, base=teacher, device="cpu", lora=[(path, 0.5)]).generate(
        None, "a cat", steps=1
    )
    (told,) = drawn.info["loras"]
    assert (told["file"], told["scale"], len(told["fingerprint"])) == ("style.safetensors", 0.5, 64)
    plain = Student.load(student_folder, base=teacher, device="cpu").generate(None, "a cat", steps=1)
    assert "loras" not in plain.info and "memory" not in plain.info


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    import torch

    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with raises("device_unavailable", "mps", kind=UsageError):
        Student.load(tmp_path / "no such folder", device="mps")


def test_loading_and_drawing_show_no_bars_of_other_libraries_when_told_not_to(student_folder, teacher, capfd):
    quiet = Student.load(student_folder, base=teacher, device="cpu", progress_bar=False)
    quiet.generate(None, "a cat", steps=1)
    assert capfd.readouterr().err == ""
    from diffusers.utils import logging as of_diffusers

    assert of_diffusers.is_progress_bar_enabled()


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


def _truncated(folder, teacher):
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "diffusion_pytorch_model.safetensors"


def _wrong_shape(folder, teacher):
    from safetensors.torch import load_file, save_file

    weights = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].clone()
    save_file(tensors, weights)
    return "proj_out.weight"


def _missing_part(folder, teacher):
    shutil.rmtree(teacher / "vae")
    return "vae"


def _missing_base(folder, teacher):
    shutil.rmtree(teacher)
    return "teacher"


@pytest.mark.parametrize("spoil", [_truncated, _wrong_shape, _missing_part, _missing_base])
def test_the_command_says_in_one_line_what_is_wrong_with_a_model(
    student_folder, teacher, pictures, tmp_path, capfd, monkeypatch, spoil
):
    from diptych.cli import app

    monkeypatch.chdir(tmp_path)
    pictures[0].save("r.png")
    model, base = shutil.copytree(student_folder, tmp_path / "model"), shutil.copytree(teacher, tmp_path / "teacher")
    named = spoil(model, base)
    args = ["--model", str(model), "--base", str(base), "--reference", "r.png", "--prompt", "a cat", "--device", "cpu"]
    code = app.call(["generate", *args, "--out", "out/a.png", "--json"])
    out, err = capfd.readouterr()
    assert code in (1, 2) and out == "" and not (tmp_path / "out").exists()
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and named in json.loads(lines[0])["error"]["message"], err
    assert "DIPTYCH_DEBUG" not in lines[0], "a mistake that was foreseen"


def test_sizes_that_the_model_was_not_trained_at_are_warned_about(student, pictures, caplog):
    from dataclasses import replace

    caplog.set_level(logging.WARNING)
    student.pipeline.settings = replace(student.pipeline.settings, sizes=((16, 16), (16, 24)))
    for size in (None, 16, (24, 16)):
        student.generate(pictures[0], "a cat", size=size, steps=1)
        assert student.warnings("a cat", size=size) == []
    assert not [record for record in caplog.records if "trained at" in record.getMessage()]
    for size in (24, (16, 24)):
        student.generate(pictures[0], "a cat", size=size, steps=1)
        (said,) = student.warnings("a cat", size=size)
        assert "16×16, 24×16" in said and said in [record.getMessage() for record in caplog.records]
    student.pipeline.settings = replace(student.pipeline.settings, sizes=None)
    assert student.warnings("a cat", size=24) == [], "a model that does not say"


@pytest.mark.parametrize(("size", "warned"), [(None, False), (64, False), (96, True), ((256, 176), True)])
def test_the_pocket_student_says_that_it_was_trained_at_one_size(size, warned):
    pocket = Student.load("pocket", device="cpu", progress_bar=False)
    assert any("64×64" in line for line in pocket.warnings("a cat", size=size)) == warned


def test_generate_relight_and_story_are_typed_and_listed(student, pictures):
    import inspect
    from importlib.resources import files

    import diptych

    assert "Student" in dir(diptych) and (files("diptych") / "py.typed").is_file()
    wanted = {"steps", "guidance", "image_guidance", "text_guidance", "size", "seed"}
    for method, more in ((Student.generate, {"prompt"}), (Student.relight, {"light", "mask", "scene", "detail"})):
        signature = inspect.signature(method)
        assert wanted | more <= set(signature.parameters)
        assert signature.return_annotation == "Image.Image | list[Image.Image]"
    page = student.story(pictures[0], ["a cat", "a dog", "a cat", "the moon"], seed=2, steps=1)
    assert page.seeds == [2, 3, 4, 5] and len(page.panels) == 4


def test_diffusers_names_are_taken_and_refused_beside_ours(student, pictures):
    ours = student.generate(pictures[0], "a cat", steps=2, text_guidance=2.0)
    theirs = student.generate(pictures[0], "a cat", num_inference_steps=2, text_guidance_scale=2.0)
    assert ours.tobytes() == theirs.tobytes() and ours.info == theirs.info
    with raises("option_conflict", "num_inference_steps", "steps", kind=UsageError):
        student.generate(pictures[0], "a cat", steps=2, num_inference_steps=2)
    with pytest.raises(TypeError, match="unknown option 'stepz'; did you mean 'steps'"):
        student.relight(pictures[0], "soft light", stepz=2)
