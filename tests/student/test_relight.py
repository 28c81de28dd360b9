"""Relighting: the task's own words, the reference's detail, and what a mask keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych import Student
from diptych.apps import relight
from diptych.cli import app
from diptych.data.images import read_provenance
from diptych.errors import UsageError
from diptych.pocket import render as renderer
from diptych.pocket import world
from diptych.student.callbacks import Hold, held_latents
from diptych.student.canvas import Canvas, fit_image, split_tokens
from diptych.student.sampling import FITS
from raising import raises

LIGHT = "dim blue light from above"
SIDE = world.PANEL


@pytest.fixture(scope="module")
def pocket() -> Student:
    return Student.load("pocket", device="cpu", progress_bar=False)


@pytest.fixture(scope="module")
def render() -> Image.Image:
    rng = np.random.default_rng(5)
    return Image.fromarray(renderer.render(world.sample_identity(rng, "cat"), world.sample_scene(rng)))


@pytest.fixture
def mask() -> Image.Image:
    """White, so free, on the left; black on the right and for a pixel more, so that one latent is partly kept."""
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (0, 0, SIDE // 2 - 1, SIDE))
    return image


def test_the_student_is_told_the_light_in_its_task_s_words(pocket: Student, render: Image.Image) -> None:
    alone = pocket.relight(render, LIGHT, steps=2, seed=4)
    assert alone.info["prompt"] == "the same scene, dim blue light from above" and alone.size == (SIDE, SIDE)
    assert (alone.info["light"], alone.info["task"], alone.info["seed"]) == (LIGHT, "relight", 4)
    told = pocket.relight(render, LIGHT, scene="a cat in a cave", steps=2)
    assert told.info["prompt"] == "a cat in a cave, dim blue light from above"


def test_another_aligned_task_is_a_file(pocket: Student, render: Image.Image, tmp_path: Path) -> None:
    import yaml

    from diptych.recipe import tasks

    values = yaml.safe_load((Path(tasks.__file__).parent / "relight.yaml").read_text())
    values["captions"]["instruction_templates"] = ["in this season: {change}"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "mine"}))
    image = pocket.relight(render, "in winter", task=str(path), steps=1)
    assert image.info["prompt"] == "in this season: in winter" and image.info["task"] == "mine"
    with raises("task_unsuited", "'subject'", kind=UsageError):
        pocket.relight(render, "in winter", task="subject")


def test_lists_give_lists_and_one_seed_one_picture(pocket: Student, render: Image.Image) -> None:
    many = pocket.relight(render, [LIGHT, "bright white light from behind"], seed=[1, 2], steps=1)
    assert [(i.info["light"], i.info["seed"]) for i in many] == [
        (LIGHT, 1),
        (LIGHT, 2),
        ("bright white light from behind", 1),
        ("bright white light from behind", 2),
    ]
    assert np.array_equal(np.asarray(pocket.relight(render, LIGHT, seed=2, steps=1)), np.asarray(many[1]))


def test_what_a_mask_keeps_is_the_reference_to_the_pixel(
    pocket: Student, render: Image.Image, mask: Image.Image
) -> None:
    seen: list[int] = []
    image = pocket.relight(
        render, LIGHT, mask=mask, steps=3, callback_on_step_end=lambda pipe, step, t, tensors: seen.append(step)
    )
    new, old, white = np.asarray(image), np.asarray(render), SIDE // 2 - 1
    assert np.array_equal(new[:, white:], old[:, white:]) and not np.array_equal(new[:, :white], old[:, :white])
    assert seen == [0, 1, 2], "the caller's own callback is called as well"
    assert len(image.info["mask"]) == 64
    half = Image.new("L", (SIDE, SIDE), 128)
    mixed = np.asarray(pocket.relight(render, LIGHT, mask=half, steps=3), dtype=int)
    free = np.asarray(pocket.relight(render, LIGHT, steps=3), dtype=int)
    assert np.abs(mixed - (old * (127 / 255) + free * (128 / 255))).max() <= 1


def test_the_kept_part_is_held_while_the_rest_is_drawn(pocket: Student, render: Image.Image, mask: Image.Image) -> None:
    pipe, canvas = pocket.pipeline, pocket.canvas()
    kept = np.asarray(mask) == 0
    hold = Hold(pipe, render, kept, canvas, 7)
    drawn: list[torch.Tensor] = []

    def note(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = hold(pipe, step, t, tensors)
        drawn.append(changed["latents"])
        return changed

    pipe(prompt=LIGHT, reference=render, generator=7, num_inference_steps=3, callback_on_step_end=note)
    held = hold.held
    sigma = float(pipe.scheduler.sigmas[1])
    path = (1 - sigma) * hold.clean + sigma * hold.noise
    assert torch.allclose(drawn[0][held], path[held], atol=1e-5)
    assert torch.allclose(drawn[-1][held], hold.clean[held], atol=1e-5)
    _, right = split_tokens(held.float(), canvas)
    _, picture = split_tokens((drawn[-1] - hold.clean).abs() * ~held, canvas)
    assert 0.3 < right.mean() < 0.6 and picture.max() > 0.05, "the rest is drawn freely"


def test_only_latents_of_which_every_pixel_is_kept_are_held() -> None:
    canvas = Canvas(32, 32, 4)
    kept = np.zeros((32, 32), dtype=bool)
    kept[4:12, 8:15] = True  # latent rows 1 and 2; latent column 2 whole, 3 short of a pixel
    held = held_latents(kept, canvas, 8)
    assert held.shape == (1, canvas.tokens, 32) and int(held.sum()) == 2 * 8
    left, right = split_tokens(held, canvas)
    assert not left.any() and right.any()


def test_detail_takes_light_from_the_drawing_and_the_rest_from_the_reference(render: Image.Image) -> None:
    old = np.asarray(render, dtype=float)
    blurred = Image.fromarray((relight.soft(old, 1.5) * np.array([0.9, 0.7, 0.5])).round().astype(np.uint8))
    tinted = np.clip((old + 255 * relight.DARK) * [0.9, 0.7, 0.5] - 255 * relight.DARK, 0, 255)
    lit = np.asarray(relight.keep_detail(blurred, render), dtype=float)
    assert np.abs(lit - tinted).mean() < 6 < np.abs(np.asarray(blurred, dtype=float) - tinted).mean()
    assert np.array_equal(np.asarray(relight.keep_detail(render, render)), np.asarray(render))
    assert relight.keep_detail(blurred, render, 0) is blurred
    half = np.asarray(relight.keep_detail(blurred, render, 0.5), dtype=float)
    assert np.abs(half - (lit + np.asarray(blurred)) / 2).max() <= 1


def test_the_whole_reference_is_relit_at_its_own_size(pocket: Student, render: Image.Image) -> None:
    photo = Image.new("RGB", (300, 200), "gray")
    photo.paste(render.resize((200, 200)), (50, 0))
    lit = pocket.relight(photo, LIGHT, steps=3)
    assert lit.size == photo.size
    # Seen small, it is what the model made of the small photo; its fine detail is the photo's.
    small = pocket.relight(photo.resize((64, 43), Image.Resampling.LANCZOS), LIGHT, steps=3)
    assert small.size == (64, 43)
    shrunk = np.asarray(lit.resize(small.size, Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(shrunk - np.asarray(small)).mean() < 3
    blurred = Image.fromarray(relight.soft(np.asarray(photo, dtype=np.float32), 8).astype(np.uint8))
    dull = pocket.relight(blurred, LIGHT, steps=3)
    assert (
        np.abs(np.diff(np.asarray(lit, dtype=float), axis=1)).mean()
        > 2 * np.abs(np.diff(np.asarray(dull, dtype=float), axis=1)).mean()
    )
    mask = Image.new("L", photo.size, 255)
    mask.paste(0, (0, 0, 150, 200))
    kept = np.asarray(pocket.relight(photo, LIGHT, mask=mask, steps=3))
    assert np.array_equal(kept[:, :150], np.asarray(photo)[:, :150])
    assert not np.array_equal(kept[:, 150:], np.asarray(photo)[:, 150:])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"fit": "crop"}, (200, 200)),
        ({"fit": "pad"}, (300, 200)),
        ({"detail": 0}, (64, 43)),
        ({"detail": 0, "mask": Image.new("L", (300, 200), 200)}, (64, 43)),
        ({"size": SIDE}, (SIDE, SIDE)),
    ],
)
def test_size_fit_and_detail_decide_how_large_a_relit_picture_is(
    pocket: Student, options: dict[str, Any], size: tuple[int, int]
) -> None:
    assert pocket.relight(Image.new("RGB", (300, 200), "teal"), LIGHT, steps=1, **options).size == size
    assert pocket.relight(Image.new("RGB", (30, 20)), LIGHT, steps=1).size == (64, 43), "never smaller than drawn"


@pytest.mark.parametrize("size", [(300, 200), (7, 500), (64, 64), (30, 20)])
@pytest.mark.parametrize("fit", [fit for fit in FITS if fit != "keep"])
def test_where_a_reference_lies_on_its_panel(size: tuple[int, int], fit: str) -> None:
    ramp = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 250, size[0])[None]
    ramp[..., 1] = np.linspace(0, 250, size[1])[:, None]
    image = Image.fromarray(ramp)
    seen, inside = relight.placed(size, (64, 48), fit)
    panel = np.asarray(fit_image(image, 48, 64, fit).crop(inside), dtype=float)
    part = image.crop(seen).resize((inside[2] - inside[0], inside[3] - inside[1]), Image.Resampling.LANCZOS)
    assert np.abs(panel - np.asarray(part)).mean() < 6


def test_blurring_keeps_the_mean_and_a_flat_picture() -> None:
    flat = np.full((9, 7, 3), 0.3, dtype=np.float32)
    assert np.allclose(relight.soft(flat, 2), 0.3, atol=1e-6)
    point = np.zeros((31, 31, 1), dtype=np.float32)
    point[15, 15] = 1
    spread = relight.soft(point, 3)
    assert spread.sum() == pytest.approx(1, abs=1e-4) and spread.max() == spread[15, 15] < 0.03


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"light": "  "}, "(?i)light"),
        ({"light": []}, "light"),
        ({"detail": 1.5}, r"0 to 1.*1\.5"),
        ({"reference": None}, "reference"),
        ({"mask": Image.new("L", (16, SIDE), 255)}, f"16×{SIDE}.*{SIDE}×{SIDE}"),
        ({"mask": Image.new("L", (SIDE, SIDE), 0)}, "mask.*black"),
        ({"task": "relihgt"}, "did you mean 'relight'"),
        ({"size": 30}, "16"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(
    pocket: Student, render: Image.Image, options: dict[str, Any], says: str
) -> None:
    given: dict[str, Any] = {"reference": render, "light": LIGHT, **options}
    with pytest.raises(UsageError, match=says):
        pocket.relight(given.pop("reference"), given.pop("light"), **given)


def test_the_command_draws_a_strip_or_a_folder_and_says_what_made_it(
    pocket: Student,
    render: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Student, "load", lambda *_, **__: pocket)
    render.save("cat.png")
    mask.save("mask.png")
    command = ["relight", "--reference", "cat.png", "--steps", "1", "--light", LIGHT]
    assert app.call([*command, "--out", "lit.png", "--mask", "mask.png"]) == 0
    assert capsys.readouterr().out == "lit.png\n"
    told = read_provenance("lit.png")
    assert told is not None and told["light"] == LIGHT and told["reference_file"] == "cat.png" and "mask" in told
    assert app.call([*command, "--light", "soft pink light from the left", "--out", "strip.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == ["strip.png"] and len(found["pictures"]) == 2
    strip = np.asarray(Image.open("strip.png"))
    assert strip.shape == (SIDE, 2 * SIDE + 2, 3) and (strip[:, SIDE : SIDE + 2] == 255).all()
    assert np.array_equal(strip[:, :SIDE], np.asarray(pocket.relight(render, LIGHT, steps=1)))
    assert app.call([*command, "--light", LIGHT + ".", "--out", "many/"]) == 0
    assert len({*capsys.readouterr().out.split()}) == 2 == len(list(Path("many").iterdir()))
    assert app.call([*command, "--out", "cat.png"]) == 2
    assert "error[output_collision]: --out cat.png" in capsys.readouterr().err
    assert app.call([*command, "--out", "lit.tiff"]) == 2
