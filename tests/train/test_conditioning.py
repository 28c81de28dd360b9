"""The other conditioning design: no left panel, the reference in the target's own condition channels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych import Student
from diptych.data.images import open_image, read_provenance
from diptych.errors import UsageError
from diptych.student.weights.convert import convert
from diptych.train.distill import distill
from raising import raises

SIDE = tiny_run.PANEL


@pytest.fixture(scope="module")
def channel(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained channel student: `out`."""
    out = tmp_path_factory.mktemp("channel") / "student"
    distill(tiny_run.make_recipe(world.teacher, conditioning="channel", learning_rate=1e-2), world.pairs, out)
    return SimpleNamespace(out=out)


def test_it_trains_on_one_panel_and_learns(channel: Any) -> None:
    lines, _ = kills.result(channel.out)
    assert {line["left"] for line in lines} == {0.0} and all(line["loss"] == line["right"] > 0 for line in lines)
    checks = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert checks[-1] < checks[0]


def test_a_saved_one_draws_what_its_sample_sheet_shows(world: Any, channel: Any) -> None:
    from PIL import Image

    student = Student.load(channel.out, device="cpu")
    assert student.pipeline.conditioning == "channel" and student.pipeline.canvas().tokens == 4  # 2 × 2 of one panel
    path = channel.out / "training" / "samples" / "step-000012.png"
    sheet, made_by = Image.open(path).convert("RGB"), read_provenance(path)
    assert made_by is not None
    captions = {row["id"]: row["caption"] for row in world.pairs}
    for line, name in enumerate(made_by["pairs"]):
        reference = sheet.crop((0, line * SIDE, SIDE, (line + 1) * SIDE))
        given = {"steps": 20, "image_guidance": 1.0, "text_guidance": 1.0}
        drawn = student.generate(reference, captions[name], seed=line, **given)
        assert drawn.tobytes() == sheet.crop((2 * SIDE, line * SIDE, 3 * SIDE, (line + 1) * SIDE)).tobytes()
    with raises("option_unsuited", "channel", "return_reference", kind=UsageError):
        student.pipeline("a cat", reference=reference, return_reference=True)


def test_stock_flux_control_draws_the_same_from_the_reference_itself(world: Any, channel: Any) -> None:
    from diffusers import FluxControlPipeline

    student = Student.load(channel.out, device="cpu").pipeline
    row = next(iter(world.pairs))
    reference = open_image(row["conditioning"])
    canvas = student.canvas()
    condition = student.encode_reference([reference], canvas)
    noise = torch.randn(1, canvas.tokens, 16, generator=torch.Generator().manual_seed(0))
    embeds, pooled = student.encode_text([row["caption"]])
    stock: Any = FluxControlPipeline.from_pretrained(channel.out)
    stock.set_progress_bar_config(disable=True)
    stock.prepare_image = lambda *_, **__: condition  # it would sample the posterior, of the very same picture
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": SIDE, "width": SIDE}
    given |= {"num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    theirs = stock(control_image=reference, **given).images
    ours: Any = student(reference=reference, **given)
    torch.testing.assert_close(ours.images, theirs, rtol=1e-4, atol=1e-5)


def test_saving_again_and_converting_keep_its_conditioning(channel: Any, tmp_path: Path) -> None:
    from diptych import student

    pipe = student.load(channel.out, device="cpu")
    student.save(pipe, tmp_path / "again")
    assert student.load(tmp_path / "again", device="cpu").settings == pipe.settings
    convert(channel.out, tmp_path / "half", "folded", dtype="float16")
    assert student.load(tmp_path / "half", device="cpu").conditioning == "channel"
    with raises("model_unsupported", "channel"):
        convert(channel.out, tmp_path / "released", "released")


def test_a_lora_of_it_is_opened_as_it_was_trained(world: Any, tmp_path: Path) -> None:
    lora = {"conditioning": "channel", "mode": "lora", "rank": 4, "steps": 2}
    distill(tiny_run.make_recipe(world.teacher, **lora), world.pairs, tmp_path / "lora")
    for place in (tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"):
        student = Student.load(place, base=world.teacher, device="cpu")
        assert student.pipeline.conditioning == "channel"
        assert student.generate(open_image(next(iter(world.pairs))["image"]), "a cat", steps=2).size == (SIDE, SIDE)
    with raises("model_mismatch", "distill.conditioning=channel", kind=UsageError):
        again = tiny_run.make_recipe(world.teacher, mode="lora", rank=4, init=str(tmp_path / "lora"))
        distill(again, world.pairs, tmp_path / "out")


def test_a_word_that_is_no_conditioning_is_refused(channel: Any, tmp_path: Path) -> None:
    import shutil

    from diptych import student

    shutil.copytree(channel.out, tmp_path / "copy", ignore=shutil.ignore_patterns("training"))
    (tmp_path / "copy" / "sampling.json").write_text('{"conditioning": "left"}')
    with raises("json_invalid", "diptych or tokens or channel", "'left'"):
        student.load(tmp_path / "copy", device="cpu")


def test_without_weight_on_the_left_only_the_right_panel_teaches(world: Any, straight: Any, tmp_path: Path) -> None:
    distill(tiny_run.make_recipe(world.teacher, left_weight=0), world.pairs, tmp_path / "out")
    right, both = (kills.result(out)[0] for out in (tmp_path / "out", straight.out))
    assert all(line["loss"] == line["right"] and line["left"] > 0 for line in right)
    assert right[0]["right"] == both[0]["right"]  # the same samples and noise
    assert right[0]["grad_norm"] != both[0]["grad_norm"] and right[-1]["left"] > both[-1]["left"]
    with pytest.raises(ValueError, match="right_weight above 0"):
        tiny_run.make_recipe(world.teacher, conditioning="channel", right_weight=0)
