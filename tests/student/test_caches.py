"""Step caches: what is skipped, for which rows, in which branches, and that nothing outlives its call."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from diptych.student.canvas import Canvas
from diptych.student.families.base import pack
from diptych.student.runtime import caches
from diptych.student.runtime.applied import apply_speed, remove_speed
from diptych.student.runtime.modulation import precomputed
from diptych.student.runtime.speed import Speed
from diptych.student.weights.files import RATIOS_FILE
from raising import raises
from student.conftest import tiny_transformer

STEPS = 8
GUIDED: Any = {"image_guidance_scale": 1.5, "text_guidance_scale": 2.0}


@pytest.fixture
def quick(pipe):
    yield pipe
    remove_speed(pipe)


def latents(pipe, prompt: Any = "a red cat", **options):
    return pipe(prompt, output_type="latent", **{"generator": 0, "num_inference_steps": STEPS, **options}).images


def counts(pipe) -> tuple[int, int]:
    return pipe.runtime.step_cache.computed, pipe.runtime.step_cache.skipped


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def differs(a, b):
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "exact",
    [
        Speed(cache="first_block", cache_threshold=0.0),
        Speed(cache="magnitude", cache_threshold=0.0),
        Speed(cache="skip", cache_interval=1),
    ],
    ids=lambda s: s.cache,
)
def test_a_cache_that_tolerates_nothing_changes_nothing(quick, pictures, exact, batched):
    plain = latents(quick, reference=pictures[0], **GUIDED)
    apply_speed(quick, exact)
    for _ in range(2):
        same(latents(quick, reference=pictures[0], batched_guidance=batched, **GUIDED), plain)
    assert counts(quick) == (2 + 3 * (STEPS - 2), 0)


@pytest.mark.parametrize("table", [False, True])
def test_first_block_decides_for_each_row(table):
    """Row 0 stays as it is, so its blocks need not run again; row 1 is another picture at every step."""
    transformer = tiny_transformer(num_layers=2, num_single_layers=2)
    torch.manual_seed(0)
    pooled, text = torch.randn(2, 20), torch.randn(2, 12, 24)
    still, moving = torch.randn(8, 16), torch.randn(3, 8, 16)
    time = torch.tensor([500.0])
    given = {"pooled_projections": pooled, "encoder_hidden_states": text, "timestep": time.expand(2) / 1000,
             "txt_ids": torch.zeros(12, 3), "img_ids": torch.zeros(8, 3), "return_dict": False}  # fmt: skip

    def forward(step: int) -> torch.Tensor:
        with torch.no_grad(), transformer.cache_context("cond"):
            return transformer(hidden_states=torch.stack([still, moving[step]]), **given)[0]

    expected = [forward(step) for step in range(3)]
    cache = caches.enable(transformer, Speed(cache="first_block", cache_threshold=0.05, cache_warmup=1))
    cache.begin(Canvas(16, 16, 4), [500.0] * 3, torch.device("cpu"))
    with precomputed(transformer, time, [pooled], wanted=table):
        for step in range(3):
            cache.step = step
            same(forward(step), expected[step])
    assert (cache.computed, cache.skipped) == (4, 2)


@pytest.mark.parametrize("batched", [False, True])
def test_image_of_a_cached_batch_is_the_image_made_alone(quick, pictures, batched):
    prompts, seeds = ["a red cat", "the moon at night"], [3, 4]
    given: Any = {"batched_guidance": batched, **GUIDED}
    plain = latents(quick, prompts, reference=pictures[:2], generator=seeds, **given)
    apply_speed(quick, Speed(cache="first_block", cache_threshold=0.5, modulation=True))
    alone, computed = [], []
    for prompt, seed, picture in zip(prompts, seeds, pictures, strict=False):
        alone.append(latents(quick, prompt, reference=picture, generator=seed, **given))
        computed.append(counts(quick))
    together = latents(quick, prompts, reference=pictures[:2], generator=seeds, **given)
    same(together, torch.cat(alone))
    assert counts(quick) == tuple(map(sum, zip(*computed, strict=True)))
    assert counts(quick)[1] > 0
    differs(together, plain)


def test_the_trigger_sees_the_right_panels_columns_only(quick, pictures):
    apply_speed(quick, Speed(cache="first_block", cache_threshold=0.1))
    cache, canvas = quick.runtime.step_cache, Canvas(16, 24, 4)
    cache.begin(canvas, [1000.0, 500.0], torch.device("cpu"))
    panels = torch.zeros(1, 4, 2 * canvas.rows, 2 * canvas.columns)
    panels[..., canvas.columns :] = 1
    assert cache.right.tolist() == pack(panels)[0].any(dim=1).nonzero().flatten().tolist()


def test_skip_follows_the_line_of_the_last_two_computed_velocities():
    class Line(torch.nn.Module):
        ran = 0

        def forward(self, hidden_states, timestep):
            self.ran += 1
            return (hidden_states * 0 + 3.0 - 2.0 * timestep,)

    model: Any = Line()
    cache = caches.enable(model, Speed(cache="skip", cache_interval=3, cache_warmup=2))
    times = [1000.0, 950.0, 850.0, 600.0, 500.0, 300.0, 100.0, 50.0]
    cache.begin(Canvas(16, 16, 4), times, torch.device("cpu"))
    for cache.step, time in enumerate(times):
        _set_cache_context(model, CacheContext("cond"))
        (v,) = model(hidden_states=torch.zeros(2, 8, 4), timestep=torch.tensor(time))
        torch.testing.assert_close(v, torch.full((2, 8, 4), 3.0 - 2.0 * time))
    assert model.ran == 4  # steps 0, 1, 4, 7
    caches.disable(model)


def test_fixed_schedule_computes_warm_up_every_nth_and_the_last_step(quick, pictures):
    apply_speed(quick, Speed(cache="skip", cache_interval=3, cache_warmup=3))
    latents(quick, reference=pictures[0], num_inference_steps=12)
    assert counts(quick) == (6, 6)  # 0, 1, 2, 5, 8, 11
    latents(quick, reference=pictures[0], num_inference_steps=11)
    assert counts(quick) == (6, 5)  # 0, 1, 2, 5, 8, and the last
    latents(quick, reference=pictures[0], num_inference_steps=2)
    assert counts(quick) == (2, 0)


def test_magnitude_learns_from_the_first_picture_and_skips_in_the_next(quick, pictures, tmp_path):
    plain = latents(quick, reference=pictures[0], **GUIDED)
    setting = Speed(cache="magnitude", cache_threshold=0.5, cache_interval=3)
    apply_speed(quick, setting)
    same(latents(quick, reference=pictures[0], **GUIDED), plain)
    assert counts(quick)[1] == 0
    ratios = quick.runtime.step_cache.ratios[STEPS]
    assert len(ratios) == STEPS and ratios[0] == 1.0 and all(x > 0 for x in ratios)
    differs(latents(quick, reference=pictures[0], **GUIDED), plain)
    skipped = counts(quick)[1]
    assert skipped > 0
    latents(quick, reference=pictures[0], num_inference_steps=6)
    assert counts(quick)[1] == 0  # another number of steps is another calibration
    # Kept in the model's folder, the ratios serve the first picture of a later session.
    path = tmp_path / RATIOS_FILE
    path.write_text(json.dumps({"kept": "too"}))
    caches.write_ratios(quick.runtime.step_cache, path)
    assert json.loads(path.read_text())["kept"] == "too"
    before, quick.loaded_from = quick.loaded_from, (tmp_path, *quick.loaded_from)
    try:
        apply_speed(quick, setting)
        latents(quick, reference=pictures[0], **GUIDED)
    finally:
        quick.loaded_from = before
    assert counts(quick)[1] == skipped


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"magnitude_ratios": {"3": [1.0]}}', '{"magnitude_ratios": {"1": ["x"]}}']
)
def test_a_damaged_ratios_file_is_named(tmp_path, text):
    path = tmp_path / RATIOS_FILE
    path.write_text(text)
    with raises("file_damaged", path):
        caches.read_ratios(path)


@pytest.mark.parametrize("cache", ["first_block", "skip"])
def test_a_call_that_was_cut_short_leaves_nothing_behind(quick, pictures, cache):
    apply_speed(quick, Speed(cache=cache, cache_threshold=0.2))
    expected = latents(quick, reference=pictures[0])

    def stop(*_):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        latents(quick, reference=pictures[1], generator=5, callback_on_step_end=stop)
    assert torch.equal(latents(quick, reference=pictures[0]), expected)


def test_two_caches_at_once_are_refused(quick):
    from diffusers import FirstBlockCacheConfig

    quick.transformer.enable_cache(FirstBlockCacheConfig())
    try:
        with raises("speed_unsupported", "disable_cache"):
            apply_speed(quick, Speed(cache="skip"))
    finally:
        quick.transformer.disable_cache()
    with raises("speed_unsupported", "first_block"):
        caches.enable(tiny_transformer(num_single_layers=0), Speed(cache="first_block"))
