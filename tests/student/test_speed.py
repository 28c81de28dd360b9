"""Presets and switches: what `exact` keeps, what each switch does, and that all of it comes off again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from diptych import Student, student
from diptych.cli.app import call
from diptych.errors import UsageError
from diptych.student.canvas import Canvas, split_tokens
from diptych.student.runtime import applied, speed
from diptych.student.runtime.applied import apply_speed, remove_speed
from diptych.student.runtime.caches import Recall, content
from raising import raises
from student.conftest import GOLDEN

CANVAS = Canvas(16, 16, 4)
GUIDED: Any = {"image_guidance_scale": 1.5, "text_guidance_scale": 2.0}
GUIDANCE = {"plain": (1.0, 1.0), "guided": (1.5, 2.0)}


@pytest.fixture
def quick(pipe):
    """The session's pipeline, on which a test may put a speed."""
    yield pipe
    remove_speed(pipe)


def latents(pipe, prompt: Any = "a red cat", **options):
    return pipe(prompt, output_type="latent", **{"generator": 0, "num_inference_steps": 5, **options}).images


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def differs(a, b):
    assert (a - b).abs().max() > 1e-3


# exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", GUIDANCE)
def test_exact_gives_what_the_released_code_gave(golden, name, packs):
    pipe = student.load(GOLDEN / "dsd_model", GOLDEN / "base", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    apply_speed(pipe, replace(speed.PRESETS["exact"], packed=packs))
    assert not getattr(pipe.transformer, "peft_config", None)
    image, text = GUIDANCE[name]
    within = {"plain": 1e-5, "guided": 2e-5}[name]  # sums in another order, which guidance multiplies
    embeds = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {key: golden[key] for key in embeds}
    got = pipe(
        reference=Image.open(GOLDEN / "reference.png"),
        latents=golden["noise"],
        num_inference_steps=4,
        guidance_scale=3.5,
        image_guidance_scale=image,
        text_guidance_scale=text,
        output_type="latent",
        **given,
    ).images
    torch.testing.assert_close(got, golden[f"latents_{name}"], rtol=within, atol=within)


def test_presets_but_exact_change_pictures_and_come_off_again(quick, pictures):
    given = {"reference": pictures[0], "num_inference_steps": 8, **GUIDED}
    plain = latents(quick, **given)
    before = {key: value.clone() for key, value in quick.transformer.state_dict().items()}
    for name, preset in speed.PRESETS.items():
        apply_speed(quick, preset)
        got = latents(quick, **given)
        (same if name == "exact" else differs)(got, plain)
    remove_speed(quick)
    assert torch.equal(latents(quick, **given), plain)
    after = quick.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_packed_layers_come_back_to_the_bit_and_give_the_same_pictures(quick, pictures, tmp_path):
    given = {"reference": pictures[0], **GUIDED}
    plain = latents(quick, **given)
    before = {key: value.clone() for key, value in quick.transformer.state_dict().items()}
    linears = sum(type(module) is torch.nn.Linear for module in quick.transformer.modules())
    left_out = apply_speed(quick, speed.PRESETS["exact"])
    assert [reason.partition(":")[0] for reason in left_out] == ["fused_qkv", "compile"]
    held = [module for module in quick.transformer.modules() if isinstance(module, applied.PackedLinear)]
    blocks = [*quick.transformer.transformer_blocks, *quick.transformer.single_transformer_blocks]
    assert len(held) > 5 * len(blocks) and all(module.original[0].weight.numel() == 0 for module in held)
    same(latents(quick, **given), plain)
    student.save(quick, tmp_path / "saved")
    assert torch.equal(latents(student.load(tmp_path / "saved", device="cpu"), **given), plain)  # pyright: ignore
    assert sum(isinstance(module, applied.PackedLinear) for module in quick.transformer.modules()) == len(held)
    remove_speed(quick)
    after = quick.transformer.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert sum(type(module) is torch.nn.Linear for module in quick.transformer.modules()) == linears


def test_what_cannot_be_packed_is_told():
    layer = torch.nn.Linear(2, 2)
    assert applied.cannot_pack(layer) == ""
    assert "float32" in applied.cannot_pack(layer.bfloat16())
    assert "CPU" in applied.cannot_pack(torch.nn.Linear(2, 2, device="meta"))


def test_a_small_transformer_is_not_compiled_and_the_reason_is_given(quick):
    left_out = apply_speed(quick, replace(speed.PRESETS["exact"], packed=False))
    assert [reason for reason in left_out if reason.startswith("compile: ") and "0 M" in reason]
    assert all(block._compiled_call_impl is None for block in quick.transformer.transformer_blocks)


def test_fused_projections_hold_no_second_copy(quick):
    apply_speed(quick, speed.Speed(fused_qkv=True))
    attn = quick.transformer.transformer_blocks[0].attn
    assert attn.to_k.weight.data_ptr() == attn.to_qkv.weight[attn.to_q.out_features :].data_ptr()
    assert attn.add_v_proj.bias.untyped_storage().data_ptr() == attn.to_added_qkv.bias.untyped_storage().data_ptr()


def test_saving_writes_a_stock_student_and_leaves_the_speed_on(quick, pictures, tmp_path):
    plain = latents(quick, reference=pictures[0])
    apply_speed(quick, speed.Speed(fused_qkv=True, cache="skip", remember=1))
    student.save(quick, tmp_path / "saved")
    assert quick.runtime.speed.cache == "skip" and quick.runtime.step_cache is not None
    again = student.load(tmp_path / "saved", device="cpu")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, reference=pictures[0]), plain)  # pyright: ignore


# Remembering -------------------------------------------------------------------------------------------------------


def test_prompts_and_references_are_encoded_once_for_several_calls(quick, pictures):
    plain = latents(quick, reference=pictures[0], **GUIDED)
    apply_speed(quick, speed.Speed(remember=16))
    calls = {"text_encoder": 0, "text_encoder_2": 0, "encoder": 0}
    places = {"text_encoder": quick.text_encoder, "text_encoder_2": quick.text_encoder_2, "encoder": quick.vae.encoder}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in places.items()]
    try:
        for _ in range(2):
            same(latents(quick, reference=pictures[0].copy(), **GUIDED), plain)
        assert calls == {"text_encoder": 2, "text_encoder_2": 2, "encoder": 1}  # the prompt and ""
        latents(quick, "a dog", reference=pictures[1], **GUIDED)
        assert calls == {"text_encoder": 3, "text_encoder_2": 3, "encoder": 2}
        latents(quick, "a dog", reference=pictures[1], height=24, width=16, **GUIDED)
        assert calls == {"text_encoder": 3, "text_encoder_2": 3, "encoder": 3}  # another canvas
    finally:
        for handle in handles:
            handle.remove()


def test_recall_drops_the_least_recently_used_and_never_holds_more_than_its_limit():
    recall = Recall(megabytes=8 / 2**20)  # two numbers

    def make(value):
        return lambda: (torch.tensor([float(value)]),)

    for key in ("a", "b", "a", "c"):
        recall(key, make(ord(key)))
    assert (recall.hits, recall.misses, len(recall), recall.size) == (1, 3, 2, 8)
    recall("a", make(0))
    assert recall.hits == 2
    recall("b", make(1))
    assert recall.misses == 4
    recall("big", lambda: (torch.zeros(100),))
    assert len(recall) == 2
    assert content(torch.zeros(2)) != content(torch.zeros(1, 2)) != content(torch.ones(1, 2))


# Lossy switches ----------------------------------------------------------------------------------------------------


def test_clamped_left_panel_ends_as_the_reference_and_moves_the_right_one(quick, pictures):
    condition, _ = split_tokens(quick.encode_reference([pictures[0]], CANVAS), CANVAS)
    given = {"reference": [pictures[0], None], "generator": [1, 2]}
    free = latents(quick, ["a cat", "a cat"], **given)
    held = latents(quick, ["a cat", "a cat"], clamp_left=True, **given)
    left, right = split_tokens(held, CANVAS)
    same(left[:1], condition)
    differs(right[0], split_tokens(free, CANVAS)[1][0])
    same(held[1], free[1])  # without a reference nothing is known of the left panel


def test_right_panel_alone_is_the_decoded_right_half(quick, pictures):
    modulation = latents(quick, reference=pictures[0])
    apply_speed(quick, speed.Speed(decode="right"))
    given: Any = {"reference": pictures[0], "generator": 0, "num_inference_steps": 5, "output_type": "pt"}
    out = quick("a red cat", return_reference=True, **given)
    left, right = split_tokens(modulation, CANVAS)
    for got, half in ((out.images, right), (out.references, left)):
        alone = quick.decode_canvas(half, Canvas(16, 8, 4))  # a canvas as wide as one panel
        same(got, (alone / 2 + 0.5).clamp(0, 1))
    differs(out.images, quick("a red cat", decode="canvas", **given).images)


def test_guidance_can_be_held_to_an_interval(quick, pictures):
    given = {"reference": pictures[0], **GUIDED}
    plain = latents(quick, reference=pictures[0])
    assert torch.equal(latents(quick, guidance_until=0.0, **given), plain)
    differs(latents(quick, guidance_until=0.6, **given), plain)
    differs(latents(quick, guidance_until=0.6, **given), latents(quick, **given))
    differs(latents(quick, guidance_from=0, **given), latents(quick, **given))


@pytest.mark.parametrize(("i", "t", "forwards"), [(2.0, 2.0, 2), (2.0, 0.0, 2), (1.0, 2.0, 2), (1.5, 2.0, 3)])
def test_forwards_without_a_weight_are_not_run(quick, pictures, i, t, forwards):
    ran = []
    handle = quick.transformer.register_forward_hook(lambda *_: ran.append(1))
    given = {"reference": pictures[0], "image_guidance_scale": i, "text_guidance_scale": t}
    try:
        got = latents(quick, guidance_from=0, **given)
        assert len(ran) == 5 * forwards
    finally:
        handle.remove()
    near = latents(quick, guidance_from=0, **given | {"image_guidance_scale": i + 1e-7 if i != 1 else 1})
    torch.testing.assert_close(got, near, rtol=1e-4, atol=1e-4)


# Words -------------------------------------------------------------------------------------------------------------


def test_switches_change_a_preset():
    got = speed.parse("fast", ["cache=first_block", "cache-threshold=0.2", "compile=off", "steps=8"])
    assert (got.cache, got.cache_threshold, got.compile, got.steps) == ("first_block", 0.2, False, 8)
    assert got.remember == speed.PRESETS["fast"].remember
    assert speed.parse(None) == speed.PLAIN
    assert speed.parse("exact").changed() and not speed.PLAIN.changed()


@pytest.mark.parametrize(
    ("preset", "switches", "code", "fact"),
    [
        ("exactly", [], "name_unknown", "'exact'"),
        ("fast", ["decod=right"], "name_unknown", "'decode'"),
        ("fast", ["decode=rigth"], "option_invalid", "'right'"),
        ("fast", ["compile"], "option_invalid", "compile=VALUE"),
        ("fast", ["compile=perhaps"], "option_invalid", "on or off"),
        ("fast", ["cache_interval=two"], "option_invalid", "cache_interval"),
        ("fast", ["cache_interval=0"], "option_invalid", "at least 1"),
        ("fast", ["cache_threshold=-1"], "option_invalid", "at least 0"),
        ("fast", ["guidance_until=2"], "option_invalid", "0 to 1"),
    ],
)
def test_wrong_words_say_what_is_right(preset, switches, code, fact):
    with raises(code, fact, kind=UsageError):
        speed.parse(preset, switches)


def test_an_attention_backend_that_is_not_there_is_refused_and_nothing_changes(quick):
    with raises("option_invalid", "'native'", kind=UsageError):
        apply_speed(quick, speed.Speed(attention="nativ"))
    with raises("speed_unsupported", "flash", kind=UsageError):
        apply_speed(quick, speed.Speed(attention="flash"))
    assert quick.runtime.speed == speed.PLAIN
    apply_speed(quick, speed.Speed(attention="native"))


def test_every_switch_is_explained_and_every_lossy_one_says_its_cost(tmp_path, monkeypatch):
    assert set(speed.HELP) == set(speed.PLAIN.__dataclass_fields__)
    costs = {"settings": {"decode=right": {"change": -0.012, "ci95": [-0.03, 0.01], "n": 50}}}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    monkeypatch.setattr(speed, "COSTS", tmp_path / "costs.json")
    switches, presets = speed.switches(), speed.presets()
    assert {name for name, switch in switches.items() if switch["cost"]} == set(speed.LOSSY)
    assert "decode=right changes CP·PF by -1.2 % [-3.0, +1.0]" in switches["decode"]["cost"]
    assert "not measured" in switches["clamp_left"]["cost"] and "not measured" in presets["fast"]["cost"]
    assert presets["fast"]["sets"]["cache"] == "skip" and presets["exact"]["cost"] == ""
    text = "\n".join(speed.format_switches({"presets": presets, "switches": switches}))
    assert all(word in text for word in ("decode=canvas", "batched_guidance=off", "Lossy: decode=right", "fastest:"))


# One way in --------------------------------------------------------------------------------------------------------


def test_student_is_loaded_with_a_speed_and_a_picture_names_it(student_folder, teacher, pictures):
    loaded = Student.load(student_folder, teacher, device="cpu", speed="fast", switches=["steps=3"], progress_bar=False)
    assert loaded.pipeline.runtime.speed.cache == "skip" and loaded.sampling["steps"] == 3
    image = loaded.generate(pictures[0], "a red cat")
    assert image.info["steps"] == 3
    assert image.info["speed"]["cache"] == "skip" and "decode" not in image.info["speed"]
    plain = Student.load(student_folder, teacher, device="cpu", progress_bar=False)
    assert plain.generate(pictures[0], "a red cat", steps=3).info["speed"] == {}


def test_few_step_lora_is_a_lora_on_top(student_folder, teacher, pictures, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    name = "transformer.transformer_blocks.0.attn.to_q"
    path = tmp_path / "few.safetensors"
    save_file({f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}, path)
    options: Any = {"device": "cpu", "progress_bar": False}
    one = Student.load(student_folder, teacher, switches=[f"few_step_lora={path}:0.5"], **options)
    two = Student.load(student_folder, teacher, lora=[(path, 0.5)], **options)
    none = Student.load(student_folder, teacher, **options)
    got, expected, without = (latents(x.pipeline, reference=pictures[0]) for x in (one, two, none))
    assert torch.equal(got, expected)  # pyright: ignore
    differs(got, without)


def test_misspelt_speeds_are_refused_before_anything_is_loaded(pictures, tmp_path, capsys):
    pictures[0].save(tmp_path / "a.png")
    words = ["generate", "--model", str(tmp_path), "--reference", str(tmp_path / "a.png"), "--prompt", "a cat"]
    assert call([*words, "--speed", "quickest"]) == 2
    assert call([*words, "--switch", "clamp-lef=on"]) == 2
    said = capsys.readouterr().err
    assert said.count("error[name_unknown]") == 2 and "exact, fast, fastest" in said and "'clamp_left'" in said
