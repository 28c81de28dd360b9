"""The sampler on a tiny whole student: batches, seeds, guidance, outputs, and wrong calls."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline

from diptych import DiptychPipeline, student
from diptych.errors import UsageError
from diptych.student.canvas import Canvas, split_panels, to_pixels
from diptych.student.families.base import pack
from raising import raises

STEPS = 4


def latents(pipe, prompt: Any = "a red cat", **options):
    return pipe(prompt, num_inference_steps=STEPS, output_type="latent", **{"generator": 0, **options}).images


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def differs(a, b):
    assert (a - b).abs().max() > 1e-3


def test_image_of_a_batch_is_the_image_made_alone(pipe, pictures):
    prompts = ["a red cat", "a dog on the beach", "the moon at night"]
    guidance = {"image_guidance_scale": 1.5, "text_guidance_scale": 2.0}
    batch = latents(pipe, prompts, reference=pictures, generator=[3, 4, 5], **guidance)
    for i, prompt in enumerate(prompts):
        same(batch[i : i + 1], latents(pipe, prompt, reference=pictures[i], generator=3 + i, **guidance))
    differs(batch[0], batch[1])


def test_one_reference_serves_many_prompts_and_one_prompt_many_references(pipe, pictures):
    several = latents(pipe, ["a cat", "a dog"], reference=pictures[0])
    same(several[1:], latents(pipe, "a dog", reference=pictures[0]))
    several = latents(pipe, "a cat", reference=pictures[:2])
    same(several[1:], latents(pipe, "a cat", reference=pictures[1]))


def test_several_images_of_a_prompt_count_the_seed_up(pipe, pictures):
    out = latents(pipe, ["a cat", "a dog"], reference=pictures[0], num_images_per_prompt=2, generator=7)
    same(out[3:], latents(pipe, "a dog", reference=pictures[0], generator=8))
    same(out[2:3], latents(pipe, "a dog", reference=pictures[0], generator=7))


def test_a_seed_is_its_generator_and_repeats_to_the_bit(pipe, pictures):
    first = latents(pipe, reference=pictures[0], generator=11)
    assert torch.equal(first, latents(pipe, reference=pictures[0], generator=11))
    assert torch.equal(first, latents(pipe, reference=pictures[0], generator=torch.Generator().manual_seed(11)))
    differs(first, latents(pipe, reference=pictures[0], generator=12))


def test_plain_sampling_is_stock_sampling_of_the_condition_canvas(pipe, pictures):
    """Against stock FluxControlPipeline, given the same noise and packed condition latents."""
    canvas = Canvas(16, 16, 4)
    condition = pipe.encode_reference([pictures[0]], canvas)
    noise = torch.randn(1, canvas.tokens, 16)
    stock: Any = FluxControlPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    expected = stock("a cat", control_image=condition, height=16, width=32, latents=noise,
                     num_inference_steps=STEPS, max_sequence_length=12, output_type="latent").images  # fmt: skip
    got = latents(pipe, "a cat", reference=pictures[0], latents=noise)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)  # stock rounds timestep frequencies otherwise


def test_the_condition_is_the_joint_encoding_of_reference_and_black_at_the_mode(pipe, pictures):
    canvas = Canvas(16, 16, 4)
    pixels = torch.full((1, 3, 16, 32), -1.0)
    pixels[..., :16] = to_pixels(pictures[0])
    with torch.no_grad():
        mode = (pipe.vae.encode(pixels).latent_dist.mean - 0.1) * 0.7
    assert torch.equal(pipe.encode_reference([pictures[0], None], canvas), torch.cat([pack(mode), 0 * pack(mode)]))


def branch(pipe, x, c, text, t):
    return pipe.transformer(
        hidden_states=torch.cat([x, c], 2), timestep=t.expand(1) / 1000, pooled_projections=text[1],
        encoder_hidden_states=text[0], txt_ids=torch.zeros(12, 3),
        img_ids=pipe._prepare_latent_image_ids(1, 2, 4, "cpu", torch.float32), return_dict=False,
    )[0]  # fmt: skip


SCALES = [(1.5, 2.0), (1.5, 1.0), (1.0, 3.0), (3.0, 0.5), (1.0, 1.0), (0.5, 2.0), (2, 2), (2.0, 0)]


@pytest.mark.parametrize(("i", "t"), SCALES)
def test_guidance_is_the_formula_from_the_third_step_on(pipe, pictures, i, t):
    with torch.no_grad():
        text, empty = pipe.encode_text(["a red cat"]), pipe.encode_text([""])
        condition = pipe.encode_reference([pictures[0]], Canvas(16, 16, 4))
        x = noise = torch.randn(1, 8, 16)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
        for step, time in enumerate(pipe.scheduler.timesteps.clone()):
            v = branch(pipe, x, condition, text, time)
            if step >= 2 and (i > 1 or t > 1):
                null = branch(pipe, x, torch.zeros_like(condition), empty, time)
                reference = branch(pipe, x, condition, empty, time)
                v = null + i * (reference - null) + t * (v - reference)
            x = pipe.scheduler.step(v, time, x, return_dict=False)[0]
    scales = {"image_guidance_scale": i, "text_guidance_scale": t}
    got = latents(pipe, reference=pictures[0], latents=noise, **scales)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)
    same(latents(pipe, reference=pictures[0], latents=noise, batched_guidance=True, **scales), got)
    if (i, t) != (1.0, 1.0):
        differs(got, latents(pipe, reference=pictures[0], latents=noise))


def test_text_guidance_alone_does_something_and_a_negative_prompt_too(pipe, pictures):
    plain = latents(pipe, reference=pictures[0])
    guided = latents(pipe, reference=pictures[0], text_guidance_scale=3.0)
    differs(plain, guided)
    differs(guided, latents(pipe, reference=pictures[0], text_guidance_scale=3.0, negative_prompt="snow"))


def test_no_reference_is_text_only(pipe, pictures):
    differs(latents(pipe), latents(pipe, reference=pictures[0]))
    same(latents(pipe, image_guidance_scale=5.0), latents(pipe))  # nothing for image guidance to hold on to
    differs(latents(pipe, text_guidance_scale=3.0), latents(pipe))


def test_outputs(pipe, pictures):
    out = pipe("a cat", reference=pictures[0], num_inference_steps=2, generator=0, return_reference=True)
    assert out.images[0].size == out.references[0].size == (16, 16)
    packed = latents(pipe, "a cat", reference=pictures[0])
    assert packed.shape == (1, 8, 16)
    whole = pipe.decode_canvas(packed, Canvas(16, 16, 4))
    tensors = pipe("a cat", reference=pictures[0], num_inference_steps=STEPS, generator=0, output_type="pt",
                   return_reference=True, return_dict=False)  # fmt: skip
    for got, panel in zip(tensors[::-1], split_panels(whole), strict=True):
        same(got, (panel / 2 + 0.5).clamp(0, 1))
    wide = pipe("a cat", reference=pictures[0], num_inference_steps=1, height=24, width=40, generator=0)
    assert wide.images[0].size == (40, 24)
    assert pipe.default_panel_size == 16
    assert pipe.text_length == 12


def test_tensor_reference_is_the_picture(pipe, pictures):
    pixels = torch.stack([to_pixels(p) for p in pictures[:2]])
    same(latents(pipe, "a cat", reference=pixels), latents(pipe, "a cat", reference=pictures[:2]))


def test_diffusers_image_is_the_reference_as_pil_array_or_tensor_of_any_size(pipe, pictures):
    expected = latents(pipe, ["a cat", "a dog"], reference=pictures[:2])
    assert torch.equal(latents(pipe, ["a cat", "a dog"], image=pictures[:2]), expected)
    arrays = np.stack([np.asarray(picture) for picture in pictures[:2]]) / 255
    assert torch.equal(latents(pipe, ["a cat", "a dog"], image=arrays), expected)
    tensors = torch.from_numpy(arrays).movedim(-1, 1)
    assert torch.equal(latents(pipe, ["a cat", "a dog"], image=tensors), expected)
    assert torch.equal(latents(pipe, ["a cat", "a dog"], image=list(tensors)), expected)
    wide = latents(pipe, "a cat", image=pictures[0].resize((40, 16)))
    assert torch.equal(wide, latents(pipe, "a cat", image=np.asarray(pictures[0].resize((40, 16))) / 255))


def test_a_callback_of_diffusers_says_which_tensors_it_is_given(pipe, pictures):
    from diffusers.callbacks import PipelineCallback

    class Look(PipelineCallback):
        tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012  # pyright: ignore[reportAssignmentType] (diffusers' name)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(sorted(callback_kwargs))
            return callback_kwargs

    seen: list[list[str]] = []
    got = latents(pipe, reference=pictures[0], callback_on_step_end=Look())
    assert seen == [["latents", "prompt_embeds"]] * STEPS
    assert torch.equal(got, latents(pipe, reference=pictures[0]))


def test_from_pretrained_needs_the_folder_alone(pipe, pictures, tmp_path):
    student.save(pipe, tmp_path / "saved")
    again = DiptychPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    given = {"prompt": "a red cat", "image": pictures[0], "generator": torch.Generator().manual_seed(0)}
    assert (
        again(**given).images[0].tobytes() == pipe("a red cat", reference=pictures[0], generator=0).images[0].tobytes()
    )


def test_callback_sees_and_changes_the_latents(pipe, pictures):
    seen = []

    def callback(_, step, time, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if step == STEPS - 1 else None

    out = latents(pipe, reference=pictures[0], callback_on_step_end=callback)
    assert seen == [(i, (1, 8, 16)) for i in range(STEPS)]
    assert not out.any()


def test_step_caches_of_diffusers_work(pipe, pictures):
    from diffusers import FirstBlockCacheConfig

    guided = {"reference": pictures[0], "image_guidance_scale": 1.5, "text_guidance_scale": 2.0}
    plain = latents(pipe, **guided)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    same(latents(pipe, **guided), plain)
    pipe.transformer.disable_cache()


def test_the_transformer_is_stock_again_after_a_call(pipe, pictures):
    from diffusers.models.embeddings import Timesteps

    before = pipe.transformer.time_text_embed.time_proj

    def stop(*_):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        latents(pipe, reference=pictures[0], callback_on_step_end=stop)
    assert pipe.transformer.time_text_embed.time_proj is before
    assert type(before) is Timesteps


def test_long_prompts_warn_once_and_name_what_is_lost(pipe, pictures, caplog):
    caplog.set_level(logging.WARNING)
    prompt = "a cat on the beach at night in the snow on the moon"
    latents(pipe, prompt, reference=pictures[0])
    latents(pipe, prompt, reference=pictures[0])
    said = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("'the moon'")


@pytest.mark.parametrize(
    ("wrong", "code", "facts"),
    [
        ({"height": 20}, "size_invalid", ["20", "8"]),
        ({"output_type": "jpeg"}, "name_unknown", ["output_type", "jpeg"]),
        ({"fit": "crp"}, "option_invalid", ["'crop'"]),
        ({"generator": [1, 2]}, "count_mismatch", ["2 generators", "1 images"]),
        ({"generator": "zero"}, "argument_type", ["generator", "str"]),
        ({"latents": torch.zeros(1, 4, 16)}, "argument_type", ["latents", "(1, 4, 16)"]),
        ({"prompt": None}, "option_missing", ["prompt"]),
        ({"prompt": 3}, "argument_type", ["prompt", "int"]),
        ({"prompt": ["a", "b"], "reference": [None] * 3}, "count_mismatch", ["2 prompts", "3 references"]),
        ({"reference": 3}, "argument_type", ["reference", "int"]),
        ({"reference": torch.zeros(3, 8, 8)}, "argument_type", ["(3, 16, 16)", "(3, 8, 8)"]),
        ({"prompt_embeds": torch.zeros(1, 12, 24)}, "option_conflict", ["prompt_embeds"]),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 24)}, "option_missing", ["pooled_prompt_embeds"]),
        ({"num_inference_steps": 0}, "option_invalid", ["num_inference_steps"]),
        ({"image": torch.zeros(3, 16, 16)}, "option_conflict", ["image", "reference"]),
        ({"reference": None, "image": torch.full((3, 16, 16), -1.0)}, "argument_type", ["0 to 1"]),
        ({"true_cfg_scale": 2.0}, "option_unsuited", ["true_cfg_scale", "text_guidance_scale"]),
        ({"control_image": torch.zeros(3, 16, 32)}, "option_unsuited", ["control_image", "image"]),
        ({"num_inference_step": 2}, "option_unsuited", ["'num_inference_steps'"]),
    ],
)
def test_wrong_calls_say_what_is_wrong(pipe, pictures, wrong, code, facts):
    with raises(code, *facts, kind=UsageError):
        pipe(**{"prompt": "a cat", "reference": pictures[0], "num_inference_steps": 1, **wrong})


def test_guidance_without_text_encoders_asks_for_negative_embeddings(student_folder, teacher, pictures, tmp_path):
    for part in ("vae", "scheduler"):
        (tmp_path / part).symlink_to(teacher / part)
    bare: Any = student.load(student_folder, tmp_path, device="cpu")
    embeds: Any = {"prompt_embeds": torch.zeros(1, 12, 24), "pooled_prompt_embeds": torch.zeros(1, 20)}
    assert bare(reference=pictures[0], num_inference_steps=1, **embeds).images
    with raises("model_incomplete", "text_encoder", "tokenizer"):
        bare(reference=pictures[0], text_guidance_scale=2.0, **embeds)
