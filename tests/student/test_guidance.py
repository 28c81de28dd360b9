"""What guidance's null pass sees: the left panel of all forwards, as released, or one of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from diptych import Student, student
from diptych.cli.app import call
from diptych.student import guidance
from diptych.student.canvas import Canvas, split_tokens
from diptych.student.settings import KEY
from raising import raises

CANVAS = Canvas(16, 16, 4)
GUIDED: Any = {"image_guidance_scale": 2.5, "text_guidance_scale": 1.5, "num_inference_steps": 5}


def latents(pipe, **options):
    return pipe("a red cat", output_type="latent", **{"generator": 0, **GUIDED, **options}).images


def shown_to_null(pipe, monkeypatch, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(left, right) latents that the null pass is given, step by step: its condition is the only one of zeros."""
    seen, forward = [], pipe.transformer.forward

    def spy(*args: Any, **given: Any):
        x, condition = given["hidden_states"].chunk(2, dim=2)
        if not condition.any():
            seen.append(split_tokens(x, CANVAS))
        return forward(*args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer, "forward", spy)
        latents(pipe, **options)
    return seen


def test_the_shared_panel_shows_null_the_reference_and_its_own_does_not(pipe, pictures, monkeypatch):
    noise, _ = split_tokens(pipe.noise([0], CANVAS), CANVAS)
    for name in ("shared", "own"):
        one, other = (
            shown_to_null(pipe, monkeypatch, reference=reference, null_panel=name) for reference in pictures[:2]
        )
        assert len(one) == len(other) == 3  # steps 2, 3 and 4 are guided
        same = torch.equal(one[0][0], other[0][0])
        assert same == (name == "own")
        if name == "own":  # it begins as the canvas's own noise, at the noise level of its first step
            level = (one[0][0] / noise).flatten()
            assert level.std() < 1e-5 and 0 < level[0] < 1
            assert not torch.allclose(one[1][0], one[0][0] * (one[1][0] / one[0][0]).median())  # and then moves


def test_batched_it_is_the_same(pipe, pictures):
    given = {"reference": pictures[0], "null_panel": "own"}
    together, alone = (latents(pipe, batched_guidance=batched, **given) for batched in (True, False))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (alone - latents(pipe, reference=pictures[0])).abs().max() > 1e-3


def test_a_picture_of_a_batch_is_the_one_made_alone(pipe, pictures):
    given = {"generator": [3, 4], "output_type": "latent", "null_panel": "own", **GUIDED}
    several = pipe(["a red cat", "a dog"], reference=pictures[:2], **given).images
    alone = latents(pipe, reference=pictures[0], generator=3, null_panel="own")
    torch.testing.assert_close(several[:1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales", [(1.0, 2.0), (1.0, 1.0)])
def test_without_image_guidance_there_is_no_null_pass_to_change(pipe, pictures, scales):
    given = {"reference": pictures[0], "image_guidance_scale": scales[0], "text_guidance_scale": scales[1]}
    assert torch.equal(latents(pipe, **given), latents(pipe, null_panel="own", **given))


def test_the_left_panel_of_the_canvas_is_not_guided_away_from_nulls():
    noise, x = (torch.randn(2, CANVAS.tokens, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    null = guidance.NullPanel(noise, CANVAS, torch.tensor([1.0, 0.8, 0.5, 0.0]))
    left, right = split_tokens(null.see(x, 1), CANVAS)
    assert torch.equal(right, split_tokens(x, CANVAS)[1]) and torch.equal(left, 0.8 * split_tokens(noise, CANVAS)[0])
    v = {name: torch.full_like(x, value) for name, value in (("cond", 3.0), ("reference", 2.0), ("null", 1.0))}
    moved = null.moved(v, 1)
    left, right = split_tokens(moved["null"], CANVAS)
    assert (left == 2).all() and (right == 1).all()
    torch.testing.assert_close(split_tokens(null.see(x, 2), CANVAS)[0], 0.8 * split_tokens(noise, CANVAS)[0] - 0.3)
    del v["reference"]  # at equal scales it does not run
    assert (split_tokens(null.moved(v, 2)["null"], CANVAS)[0] == 3).all()


def test_a_student_says_how_it_is_guided(pictures, student_folder, teacher, tmp_path, capsys):
    own = student.load(student_folder, teacher, device="cpu")
    assert own.settings.null_panel == "shared"
    own.settings = replace(own.settings, null_panel="own")
    student.save(own, tmp_path / "own")
    config = tmp_path / "own" / "transformer" / "config.json"
    assert json.loads(config.read_text())[KEY]["null_panel"] == "own"
    again = Student.load(tmp_path / "own", device="cpu")
    assert again.pipeline.settings.null_panel == "own"
    given = {"reference": pictures[0], "prompt": "a red cat", "steps": 4, "image_guidance": 2.5, "text_guidance": 1.5}
    drawn = again.generate(**given)
    plain = Student.load(tmp_path / "own", device="cpu", switches=["null_panel=shared"]).generate(**given)
    assert drawn.tobytes() != plain.tobytes()
    assert plain.tobytes() == Student.load(student_folder, teacher, device="cpu").generate(**given).tobytes()

    config.write_text(json.dumps(json.loads(config.read_text()) | {KEY: {"null_panel": "mine"}}))
    with raises("json_invalid", "null_panel", "shared or own", "'mine'"):
        student.load(tmp_path / "own", device="cpu")
    wanted = ["--reference", "cat.png", "--switch", "null_panel=mine", "--out", str(tmp_path / "a.png")]
    code = call(["generate", "--prompt", "a cat", *wanted])
    err = capsys.readouterr().err
    assert code == 2 and "error[option_invalid]" in err and "null_panel" in err and "shared, own, not 'mine'" in err


def test_relighting_may_be_guided_otherwise(pictures, student_folder, teacher, tmp_path, monkeypatch):
    """`relight` in the settings: what a call says goes first, then that, then how everything is guided."""
    made = student.load(student_folder, teacher, device="cpu")
    lit = {"image_guidance": 2.0, "text_guidance": 3.0, "null_panel": "own"}
    made.settings = replace(made.settings, relight=lit)
    student.save(made, tmp_path / "lit")
    again = Student.load(tmp_path / "lit", device="cpu")
    seen, call_ = [], type(again.pipeline).__call__

    def spy(pipe, *args: Any, **given: Any):
        seen.append(tuple(given[key] for key in ("image_guidance_scale", "text_guidance_scale", "null_panel")))
        return call_(pipe, *args, **given)

    monkeypatch.setattr(type(again.pipeline), "__call__", spy)
    again.generate(pictures[0], "a red cat", steps=2)
    again.relight(pictures[0], "night", steps=2)
    again.relight(pictures[0], "night", steps=2, text_guidance=1.0, null_panel="shared")
    assert seen == [(1.0, 1.0, None), (2.0, 3.0, "own"), (2.0, 1.0, "shared")]
    switched = Student.load(tmp_path / "lit", device="cpu", switches=["null_panel=shared"])
    switched.relight(pictures[0], "night", steps=2)
    assert seen[-1] == (2.0, 3.0, None)  # as the switch says

    for said, facts in (
        ({"text_guidance": "much"}, ["text_guidance", "'much'"]),
        ({"steps": 3}, ["steps", "image_guidance, text_guidance, null_panel"]),
        ({"null_panel": "mine"}, ["null_panel", "shared or own"]),
    ):
        (tmp_path / "lit" / "sampling.json").write_text(json.dumps({"relight": said}))
        with raises("json_invalid", *facts):
            student.load(tmp_path / "lit", device="cpu")
