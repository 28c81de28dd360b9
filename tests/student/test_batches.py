"""An image of a batch is the image made alone, whatever is drawn beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych import Student
from diptych.student.runtime.applied import apply_speed, remove_speed
from diptych.student.runtime.speed import Speed

SCALES = (0.0, 0.5, 1.0, 1.5, 2.5, 4.0)
PROMPTS = ("a red cat", "a dog", "a cat on the beach at night in the snow a red dog", "A Moon")
PICTURES = [
    None,
    *(
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8))
        for n, size in enumerate([(16, 16), (40, 24), (9, 70)])
    ),
]
ROW = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))  # picture, prompt, seed


@pytest.fixture(scope="module")
def drawing(student_folder: Any, teacher: Any) -> Student:
    return Student.load(student_folder, teacher, device="cpu", progress_bar=False)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(ROW, min_size=2, max_size=4),
    batch_size=st.integers(2, 4),
    image=st.sampled_from(SCALES),
    text=st.sampled_from(SCALES),
    options=st.fixed_dictionaries(
        {
            "null_panel": st.sampled_from(["shared", "own"]),
            "negative_prompt": st.sampled_from([None, "snow"]),
            "size": st.sampled_from([16, (24, 16)]),
            "fit": st.sampled_from(["crop", "pad", "contain"]),
        }
    ),
)
@example([(1, 0, 0), (0, 0, 0)], 2, 2.5, 1.5, {"null_panel": "own"})
@example([(0, 0, 0), (1, 0, 0), (0, 1, 1)], 3, 2.5, 1.0, {"null_panel": "own"})
@example([(0, 0, 0), (2, 1, 0)], 2, 0.5, 2.5, {})
def test_any_mixture_is_what_single_calls_draw(
    drawing: Student, rows: list[Any], batch_size: int, image: float, text: float, options: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"steps": 4, "image_guidance": image, "text_guidance": text, **options}
    pictures, prompts, seeds = zip(*((PICTURES[p], PROMPTS[t], seed) for p, t, seed in rows), strict=True)
    last: list[torch.Tensor] = []  # latents of the rows, in order, after the last step

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        last.extend(tensors["latents"] if step == 3 else [])

    asked["callback_on_step_end"] = keep
    together = drawing.generate(
        list(pictures), list(prompts), seed=list(seeds), pairwise=True, batch_size=batch_size, **asked
    )
    alone = [
        drawing.generate(picture, prompt, seed=seed, **asked)
        for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True)
    ]
    assert [image.info for image in together] == [image.info for image in alone]
    ours, theirs = (torch.stack(part) for part in (last[: len(rows)], last[len(rows) :]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wanted",
    [
        Speed(),
        Speed(batched_guidance=True, clamp_left=True),
        Speed(cache="first_block", cache_threshold=0.5, cache_warmup=1),
        Speed(cache="skip", cache_warmup=2),
        Speed(modulation=True, guidance_from=0, guidance_until=0.6),
    ],
    ids=["plain", "batched", "first_block", "skip", "modulation"],
)
def test_it_is_with_every_speed_too(drawing: Student, wanted: Speed) -> None:
    pipe = drawing.pipeline
    apply_speed(pipe, wanted)
    try:
        asked: dict[str, Any] = {"num_inference_steps": 6, "image_guidance_scale": 2.5, "text_guidance_scale": 1.5}
        asked |= {"null_panel": "own", "output_type": "latent"}
        pictures = [None, PICTURES[1], None, PICTURES[2]]
        together: Any = pipe(list(PROMPTS), reference=pictures, generator=[0, 1, 2, 3], **asked)
        for n, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
            alone: Any = pipe(prompt, reference=picture, generator=n, **asked)
            torch.testing.assert_close(together.images[n : n + 1], alone.images, rtol=1e-4, atol=1e-4)
    finally:
        remove_speed(pipe)


def test_several_images_of_a_prompt_are_guided_as_their_reference_is(drawing: Student) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 4, "image_guidance_scale": 2.5, "text_guidance_scale": 1.5}
    asked |= {"null_panel": "own", "output_type": "latent"}
    pictures = [PICTURES[1], None]
    two: Any = drawing.pipeline("a cat", reference=pictures, generator=0, num_images_per_prompt=2, **asked)
    for n, picture in enumerate(pictures):
        for seed in (0, 1):
            alone: Any = drawing.pipeline("a cat", reference=picture, generator=seed, **asked)
            row = two.images[2 * n + seed][None]
            torch.testing.assert_close(row, alone.images, rtol=1e-4, atol=1e-4)


def test_rows_without_a_reference_run_no_forward_for_it(drawing: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, forward = [], drawing.pipeline.transformer.forward

    def count(*args: Any, **given: Any) -> Any:
        rows.append(len(given["hidden_states"]))
        return forward(*args, **given)

    monkeypatch.setattr(drawing.pipeline.transformer, "forward", count)
    asked: dict[str, Any] = {"steps": 4, "image_guidance": 2.5, "text_guidance": 1.0, "batch_size": 3}
    drawing.generate([PICTURES[1], None, None], ["a cat"] * 3, seed=[0] * 3, pairwise=True, **asked)
    assert sum(rows) == 4 + 2 * 2 + 2 * 4  # three forwards (cond, reference, null) for one row at two steps, one else
