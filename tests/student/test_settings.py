"""What a student needs to be run right travels with its transformer, whatever door it comes through."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from diptych import Student, student
from diptych.student.pipeline import DiptychPipeline
from diptych.student.settings import KEY, Settings
from diptych.student.weights.convert import convert
from diptych.student.weights.directions import summary
from diptych.student.weights.lora_file import RELEASED_LORA
from diptych.student.weights.sources import read_settings
from layouts import write_gguf
from raising import raises

OWN = Settings(
    steps=4,
    image_guidance=2.5,
    text_guidance=1.5,
    null_panel="own",
    relight={"image_guidance": 2.0, "null_panel": "shared"},
    sizes=((16, 16), (24, 16)),
)
PROMPT = "A Red CAT"  # a small model reads it lower-case


def as_before(folder: Path) -> None:
    """The folder as it was written when settings lay beside the weights."""
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    said = config.pop(KEY)
    path.write_text(json.dumps(config))
    (folder / "words.json").write_text(json.dumps(said.pop("words")))
    (folder / "sampling.json").write_text(json.dumps(said))


@pytest.fixture(scope="module", params=["diptych", "channel", "before"])
def folder(request: Any, student_folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole student with settings of its own, registered or as folders had them before."""
    place = tmp_path_factory.mktemp("settings") / "student"
    pipe = student.load(student_folder, teacher, device="cpu")
    conditioning: Any = "diptych" if request.param == "diptych" else "channel"
    pipe.settings = replace(OWN, conditioning=conditioning, words=pipe.settings.words)
    student.save(pipe, place)
    if request.param == "before":
        as_before(place)
    return place


def drawn(pipe: Any, picture: Image.Image) -> bytes:
    assert isinstance(pipe, DiptychPipeline)
    pipe.set_progress_bar_config(disable=True)
    images: Any = pipe(PROMPT, reference=picture, generator=1)
    return images.images[0].tobytes()


def test_every_door_draws_the_same(folder: Path, teacher: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    loaded = Student.load(folder, device="cpu")
    wanted = loaded.generate(pictures[0], PROMPT, seed=1)
    wanted_relit = loaded.relight(pictures[0], "red at night", seed=1)
    settings = loaded.pipeline.settings
    loaded.pipeline.settings = replace(Settings(), words=settings.words)
    assert drawn(loaded.pipeline, pictures[0]) != wanted.tobytes()  # the settings matter here
    loaded.pipeline.settings = settings

    opened: Any = DiptychPipeline.from_pretrained(folder)
    opened.save_pretrained(tmp_path / "again")
    stock: Any = FluxControlPipeline.from_pretrained(folder)
    stock.save_pretrained(tmp_path / "stock")
    convert(folder, tmp_path / "folded", "folded", dtype="float32")
    doors = {
        "from_pretrained": opened,
        "saved again": DiptychPipeline.from_pretrained(tmp_path / "again"),
        "its components": DiptychPipeline(**opened.components),
        "the loaded one's components": DiptychPipeline(**loaded.pipeline.components),
        "stock components": DiptychPipeline(**stock.components),
        "a conversion": DiptychPipeline.from_pretrained(tmp_path / "folded"),
        "saved by stock": student.load(tmp_path / "again", device="cpu"),
    }
    for copied in ("again", "folded"):
        shutil.copytree(tmp_path / copied / "transformer", tmp_path / "copies" / copied / "transformer")
        for place in (tmp_path / "copies" / copied, tmp_path / "copies" / copied / "transformer"):
            doors[f"transformer/ alone: {place}"] = student.load(place, teacher, device="cpu")
    for name, pipe in doors.items():
        assert drawn(pipe, pictures[0]) == wanted.tobytes(), name
        assert pipe.settings == settings, name
    assert opened.loaded_from == (folder,)
    again = Student(opened)
    assert again.generate(pictures[0], PROMPT, seed=1).tobytes() == wanted.tobytes()
    assert again.relight(pictures[0], "red at night", seed=1).tobytes() == wanted_relit.tobytes()
    assert again.unknown_words("a Blue cat") == ["blue"]


def test_stock_diffusers_opens_it_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        FluxTransformer2DModel.from_pretrained(folder / "transformer")
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_file_beside_it_that_contradicts_the_config_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    said = {**read_settings(folder, None).values(), "steps": 7}
    del said["words"]
    (tmp_path / "copy" / "sampling.json").write_text(json.dumps(said))
    if (folder / "sampling.json").is_file():  # there it is the only one
        assert DiptychPipeline.from_pretrained(tmp_path / "copy").settings.steps == 7
        return
    for door in (student.load, DiptychPipeline.from_pretrained):
        with raises("model_mismatch", "sampling.json", "steps is 7", "4"):
            door(tmp_path / "copy")


@pytest.mark.parametrize(
    "said",
    [
        {"stepz": 3},
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"steps": None},
        {"guidance": "3"},
        {"image_guidance": float("nan")},
        {"text_guidance": -1},
        {"conditioning": "left"},
        {"null_panel": "mine"},
        {"words": "cat"},
        {"words": [1]},
        {"relight": {"steps": 3}},
        {"relight": 3},
        ["steps"],
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_every_door(said: Any, pipe: Any, teacher: Path, tmp_path: Path) -> None:
    transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, KEY: said})
    with raises("json_invalid", KEY):
        DiptychPipeline(**{**pipe.components, "transformer": transformer})
    assert isinstance(transformer, FluxTransformer2DModel)
    transformer.save_pretrained(tmp_path / "transformer")
    with raises("json_invalid", KEY):
        student.load(tmp_path, teacher, device="cpu")


def test_a_lora_beside_the_weights_is_not_left_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    save_file({"a": torch.zeros(1)}, tmp_path / "copy" / RELEASED_LORA)
    with raises("lora_unsupported", RELEASED_LORA):
        DiptychPipeline.from_pretrained(tmp_path / "copy")


def test_a_student_that_diffusers_made_of_a_lora_is_not_run_without_its_settings(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "lora", "control-lora", base=teacher)
    stock: Any = FluxControlPipeline.from_pretrained(teacher)
    stock.load_lora_weights(tmp_path / "lora")
    with raises("model_unsupported", "not a student"):  # stock diffusers leaves the config the teacher's
        DiptychPipeline(**stock.components)
    loaded = student.load(
        tmp_path / "lora", teacher, device="cpu"
    )  # its LoRA beside the weights, and its settings known
    assert DiptychPipeline(**loaded.components).settings == read_settings(folder, None)


def test_weights_that_say_nothing_are_run_as_their_base(folder: Path, tmp_path: Path) -> None:
    """A GGUF file holds no settings; the folder that it was made from does."""
    write_gguf(
        tmp_path / "student.gguf", load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), "F32"
    )
    opened = student.load(tmp_path / "student.gguf", folder, device="cpu")
    assert opened.settings == read_settings(folder, None) != Settings()


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("released", "released"),
        ("control-lora", "lora"),
        ("file", "one.safetensors"),
        ("original", "bfl.safetensors"),
        ("lora-diffusers", "a.safetensors"),
        ("lora-comfyui", "b.safetensors"),
        ("lora-kohya", "c.safetensors"),
    ],
)
def test_a_conversion_keeps_them(
    to: str, name: str, folder: Path, teacher: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    loaded = student.load(folder, device="cpu")
    if to == "released" and loaded.conditioning == "channel":
        with raises("model_unsupported", "channel"):
            convert(folder, tmp_path / name, to, base=teacher)
        return
    done = convert(folder, tmp_path / name, to, base=teacher)
    said = summary(done)
    assert all(word in said for word in ("steps 4", "image_guidance 2.5", "null_panel own", "image_guidance: 2.0"))
    (tmp_path / "alone").mkdir()
    alone = shutil.move(tmp_path / name, tmp_path / "alone" / name)
    again = student.load(alone, teacher, device="cpu", fuse=True)
    assert again.settings == loaded.settings
    a, b = (torch.frombuffer(bytearray(drawn(pipe, pictures[0])), dtype=torch.uint8).int() for pipe in (loaded, again))
    assert (a - b).abs().max() <= 1
    if to.startswith("lora-"):  # a LoRA file becomes one of another style without being opened as a student
        convert(alone, tmp_path / "other.safetensors", "lora-comfyui")
        assert read_settings(tmp_path / "other.safetensors", None) == loaded.settings


def test_what_one_file_has_no_room_for_is_said(student_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(student_folder, tmp_path / "student")
    (tmp_path / "student" / "speed.json").write_text('{"magnitude_ratios": {"2": [1.0, 0.9]}}')
    done = convert(tmp_path / "student", tmp_path / "one.safetensors", "file")
    assert done["left_out"] == ["speed.json"] and "speed.json" in summary(done)
    done = convert(tmp_path / "student", tmp_path / "released", "released")
    assert done["left_out"] == [] and (tmp_path / "released" / "speed.json").is_file()
    assert len(summary(done).splitlines()) == 1  # the family's own settings need no word
