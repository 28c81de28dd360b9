"""Painting: grids of the right size from any teacher, each row from its own noise, broken pictures set aside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diptych.data import records
from diptych.data.engine import Failure
from diptych.data.images import open_image
from diptych.errors import UsageError, UserError
from diptych.recipe.schema import Paint as PaintSettings
from diptych.stages import paint
from diptych.utils import models
from raising import raises


def prompts(count: int) -> list[dict[str, Any]]:
    text = {"prompt": "two panels of the same cat. left: on the moon. right: in a cave"}
    text |= {"subject": "cat", "task": "subject", "seed": 0}
    return [
        {"id": records.prompt_id(i), **text, "panels": ["a cat on the moon", "a cat in a cave"]} for i in range(count)
    ]


def with_paint(recipe: Any, **changes: Any) -> Any:
    return recipe.model_copy(update={"paint": recipe.paint.model_copy(update=changes)})


def grids(recipe: Any, rows: list[dict[str, Any]]) -> list[Any]:
    return [
        result[0] if not isinstance(result, Failure) else result for result in paint.PaintStage(recipe).load()(rows)
    ]


def pixels(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(open_image(row["image"])).astype(int)


def test_a_grid_row_says_what_made_it(recipe: Any, teacher: Path) -> None:
    (row,) = grids(recipe, prompts(1))
    assert list(row) == list(records.GRID)
    assert (row["id"], row["prompt_id"], row["image"]["path"]) == ("g-000000", "p-000000", "g-000000.png")
    assert (row["rows"], row["cols"], row["panel_size"]) == (1, 2, 64)
    assert row["seed"] == records.seed_of(3, "p-000000", "paint") and row["model"] == models.fingerprint(teacher)
    assert pixels(row).shape == (64, 128, 3) and pixels(row).std() > 1


def test_the_same_rows_in_the_same_batch_give_the_same_bytes(recipe: Any) -> None:
    first, second = (grids(recipe, prompts(3)) for _ in range(2))
    assert first == second
    assert len({row["image"]["bytes"] for row in first}) == 3


def test_noise_does_not_depend_on_the_batch(recipe: Any, teacher: Path) -> None:
    pipe = paint.open_teacher(teacher, torch.float32)
    seen: list[torch.Tensor] = []
    prepare = pipe.prepare_latents

    def listen(*args: Any, **options: Any) -> Any:
        found = prepare(*args, **options)
        seen.append(found[0])
        return found

    pipe.prepare_latents = listen
    text = [row["prompt"] for row in prompts(3)]
    settings = {"height": 64, "width": 128, "num_inference_steps": 2}
    together = paint.generate(pipe, text, [11, 12, 13], **settings)
    alone = paint.generate(pipe, text[:1], [12], **settings)
    assert torch.equal(seen[0][1], seen[1][0]) and not torch.equal(seen[0][0], seen[0][1])
    assert torch.allclose(together[1], alone[0], atol=1e-4)
    moved = grids(recipe, prompts(3)[1:])[0]
    assert np.abs(pixels(moved) - pixels(grids(recipe, prompts(3))[1])).max() <= 1


def test_several_images_of_a_prompt_have_names_and_noise_of_their_own(recipe: Any) -> None:
    one, other = paint.PaintStage(with_paint(recipe, images=3)).load()(prompts(2))
    assert [[row["id"] for row in rows] for rows in (one, other)] == [  # pyright: ignore[reportGeneralTypeIssues]
        ["g-000000", "g-000000.1", "g-000000.2"],
        ["g-000001", "g-000001.1", "g-000001.2"],
    ]
    assert {row["prompt_id"] for row in one} == {"p-000000"}  # pyright: ignore[reportGeneralTypeIssues]
    assert len({row["image"]["bytes"] for row in [*one, *other]}) == 6  # pyright: ignore[reportGeneralTypeIssues]
    assert [one[0], other[0]] == grids(recipe, prompts(2))  # pyright: ignore[reportIndexIssue]
    assert records.pair_id("g-000000.2", 0, 1) == "c-000000.2-01"


def test_one_broken_image_costs_its_prompt_and_no_other(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = paint.generate, []

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        images = real(*args, **options)
        calls.append(len(images))
        images[0, 0, 0, 0] = float("inf" if len(calls) == 2 else 0)
        return images

    monkeypatch.setattr(paint, "generate", broken)
    first, second = paint.PaintStage(with_paint(recipe, images=2)).load()(prompts(2))
    assert isinstance(first, Failure) and not isinstance(second, Failure) and len(second) == 2 and calls == [2, 2]


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_grids_are_kept_as_the_recipe_says(recipe: Any, kind: str) -> None:
    (exact,), (kept,) = grids(recipe, prompts(1)), grids(with_paint(recipe, format=kind), prompts(1))
    assert kept["image"]["path"] == f"g-000000.{kind}"
    assert kept["image"]["bytes"][:4] == {"webp": b"RIFF", "jpeg": b"\xff\xd8\xff\xe0"}[kind]
    off = np.abs(pixels(kept) - pixels(exact))
    assert off.max() == 0 if kind == "webp" else 0 < off.mean() < 4


def test_true_guidance_and_steps_reach_the_teacher(recipe: Any) -> None:
    plain = pixels(grids(with_paint(recipe, true_guidance=1.0), prompts(1))[0])
    assert not np.array_equal(plain, pixels(grids(with_paint(recipe, true_guidance=6.0), prompts(1))[0]))
    assert not np.array_equal(plain, pixels(grids(with_paint(recipe, true_guidance=1.0, steps=3), prompts(1))[0]))


def test_float16_files_compute_in_what_the_recipe_says(tmp_path: Path, recipe: Any, teacher: Path) -> None:
    import curation_models

    half = curation_models.make_half(teacher, tmp_path / "half")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        pipe = paint.open_teacher(half, getattr(torch, name))
        assert {p.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {
            dtype
        }
    exact = pixels(grids(recipe, prompts(1))[0])
    stored = pixels(grids(recipe.model_copy(update={"teacher": str(half)}), prompts(1))[0])
    assert np.abs(exact - stored).mean() < 0.5  # rounded once, on disk, and not at every step


def test_a_picture_that_is_not_finite_costs_its_own_row_only(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = paint.generate

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        images = draw(*args, **options)
        images[1, 0, 5, 5] = float("nan")
        return images

    monkeypatch.setattr(paint, "generate", broken)
    first, second, third = grids(recipe, prompts(3))
    assert isinstance(second, Failure) and "not finite" in second.reason
    assert (first["id"], third["id"]) == ("g-000000", "g-000002")


def test_rows_of_a_layout_the_task_has_not_fail_and_others_are_drawn(recipe: Any) -> None:
    rows = prompts(3)
    rows[0]["panels"] = ["a cat"] * 5
    rows[2]["panels"] = ["a cat"] * 4
    five, two, four = grids(recipe, rows)
    assert isinstance(five, Failure) and "no grid of 5 panels" in five.reason
    assert (two["rows"], two["cols"]) == (1, 2) and (four["rows"], four["cols"]) == (2, 2)
    assert pixels(four).shape == (128, 128, 3)


def test_panel_sizes_come_from_the_teacher_and_wrong_ones_are_refused(recipe: Any) -> None:
    assert pixels(grids(with_paint(recipe, panel_size=32), prompts(1))[0]).shape == (32, 64, 3)
    with raises("size_invalid", "panel_size 60", 64, kind=UsageError):
        paint.PaintStage(with_paint(recipe, panel_size=60)).load()
    big = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(sample_size=1024)), vae_scale_factor=8)
    assert paint.panel_size(big, None) == 512


class Pipe:
    """A pipeline by its call alone."""

    def __init__(self, call: Any, tokenizers: dict[str, int], **config: Any) -> None:
        self.call, self.transformer = call, SimpleNamespace(config=config)
        self.components = {name: SimpleNamespace(model_max_length=length) for name, length in tokenizers.items()}

    @property
    def __call__(self) -> Any:
        return self.call


def test_guidance_means_what_each_family_means_by_it() -> None:
    settings = PaintSettings(steps=5, guidance=3.5, true_guidance=2.0)

    def flux(prompt, guidance_scale, true_cfg_scale, negative_prompt, max_sequence_length, num_inference_steps): ...
    def flux2(prompt, guidance_scale, max_sequence_length, num_inference_steps): ...
    def sd3(prompt, guidance_scale, negative_prompt, max_sequence_length, num_inference_steps): ...
    def sdxl(prompt, guidance_scale, negative_prompt, num_inference_steps): ...

    steps = {"num_inference_steps": 5}
    two = {"tokenizer": 77, "tokenizer_2": 512}
    assert paint.call_options(Pipe(flux, two), settings, 2) == steps | {
        "guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": ["", ""], "max_sequence_length": 512
    }  # fmt: skip
    off = settings.model_copy(update={"true_guidance": 1.0})
    assert "negative_prompt" not in paint.call_options(Pipe(flux, two), off, 2)
    assert paint.call_options(Pipe(flux2, {"tokenizer": 10**30}, guidance_embeds=True), settings, 1) == steps | {
        "guidance_scale": 3.5
    }
    three = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}
    assert paint.call_options(Pipe(sd3, three), settings, 1)["max_sequence_length"] == 512
    assert paint.call_options(Pipe(sdxl, {"tokenizer": 77}), settings, 1) == steps | {
        "guidance_scale": 2.0, "negative_prompt": [""]
    }  # fmt: skip
    short = {"tokenizer": 56, "tokenizer_2": 56}
    assert paint.call_options(Pipe(flux, short), settings, 1)["max_sequence_length"] == 56


def test_every_family_draws_what_its_prompts_say_and_each_row_its_own(recipe: Any, tmp_path: Path) -> None:
    import tiny

    for name in ("flux2", "sd3", "qwen"):
        folder = getattr(tiny, f"{name}_teacher")(tmp_path / name)
        of = with_paint(recipe, panel_size=32).model_copy(update={"teacher": str(folder)})
        rows = prompts(2)
        plain = grids(of, rows)
        assert [pixels(row).shape for row in plain] == [(32, 64, 3)] * 2, name
        other = grids(of, [{**rows[0], "prompt": "something else altogether"}, rows[1]])
        assert other[0]["image"] != plain[0]["image"] and other[1]["image"] == plain[1]["image"], name


def test_a_folder_that_is_no_teacher_is_one_clear_line(tmp_path: Path, recipe: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=str(tmp_path / "empty")):
        paint.PaintStage(recipe.model_copy(update={"teacher": str(tmp_path / "empty")})).load()
