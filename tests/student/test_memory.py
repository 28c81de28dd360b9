"""Memory presets: plans that count what a load really holds, pictures that stay, and refusals before loading."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diptych import student
from diptych.cli import app
from diptych.errors import UsageError
from diptych.student.runtime import memory, quantize, speed
from diptych.student.runtime.applied import apply_speed
from diptych.student.runtime.memory import GIB, PRESETS, MemoryPlan, Preset, choose, pick, plan, problems, shapes_in
from raising import raises
from student.conftest import GOLDEN, tiny_transformer

ROOT = Path(__file__).parents[2]
_spec: Any = importlib.util.spec_from_file_location("benchmark_memory", ROOT / "benchmarks" / "memory.py")
benchmark: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)
FLUX = benchmark.FLUX
HAVE = {"int8": "torchao", "fp8": "torch"}


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters as they are stored, those inside tensor subclasses too."""
    total = 0
    for parameter in model.parameters():
        names = getattr(parameter, "tensor_data_names", None)
        parts = [getattr(parameter, name) for name in names] if names else [parameter]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def latents(pipe, pictures, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        ["a red cat", "a dog on the beach"],
        reference=pictures[:2],
        generator=[3, 4],
        num_inference_steps=4,
        output_type="latent",
        image_guidance_scale=1.5,
        text_guidance_scale=2.0,
        **options,
    ).images


def draw(pipe, golden, name):
    """The latents of the release's fixture."""
    image, text = {"plain": (1.0, 1.0), "guided": (1.5, 2.0)}[name]
    embeds = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        reference=Image.open(GOLDEN / "reference.png"),
        latents=golden["noise"],
        num_inference_steps=4,
        image_guidance_scale=image,
        text_guidance_scale=text,
        output_type="latent",
        **{key: golden[key] for key in embeds},
    ).images


@pytest.fixture(scope="module")
def load(student_folder, teacher):
    def load(preset, **options):
        return student.load(student_folder, teacher, device="cpu", memory=preset, **options)

    return load


def test_plan_counts_every_byte_of_a_real_load(pipe, student_folder, teacher):
    places = {part: teacher / part for part in ("vae", *memory.TEXT_PARTS)}
    counted = plan(shapes_in(dict(pipe.transformer.config), places), Preset(), device="cpu", dtype_bytes=4)
    assert counted.blocks + counted.modulation + counted.other == stored_bytes(pipe.transformer)
    assert counted.text == stored_bytes(pipe.text_encoder) + stored_bytes(pipe.text_encoder_2)
    assert counted.vae == stored_bytes(pipe.vae)


@pytest.mark.parametrize("kind", HAVE)
def test_plan_counts_quantized_bytes_and_what_is_kept_keeps_its_precision(kind):
    pytest.importorskip(HAVE[kind])
    model = tiny_transformer(in_channels=32, out_channels=16, num_layers=2, num_single_layers=2)
    whole = stored_bytes(model)
    config = dict(model.config)
    quantize.quantize(model, kind, "cpu", torch.float32)
    counted = plan(memory.Shapes(config, FLUX.vae), Preset(transformer=kind), device="cpu", dtype_bytes=4)
    assert stored_bytes(model) == counted.blocks + counted.modulation + counted.other < whole
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in quantize.quantizable(model):
            assert type(module.weight.data) is torch.Tensor and module.weight.dtype == torch.float32, name
    assert {"x_embedder", "proj_out", "norm_out.linear"}.isdisjoint(quantize.quantizable(model))
    assert "single_transformer_blocks.1.proj_out" in quantize.quantizable(model)


def test_flux_is_what_is_known_of_it_and_every_preset_fits_its_card():
    whole = plan(FLUX, Preset())
    assert (whole.blocks + whole.modulation + whole.other) / 1e9 == pytest.approx(23.8, abs=0.05)
    assert whole.text / 1e9 == pytest.approx(9.5 + 0.25, abs=0.1)
    tabled = plan(FLUX, Preset(modulation=True))
    assert (whole.blocks + tabled.other) / 1e9 == pytest.approx(17.3, abs=0.1)
    assert tabled.table / 2 / 1e6 == pytest.approx(59, abs=1)  # two texts: the prompt and the negative one
    for name, rows in PRESETS.items():
        for preset in rows:
            assert plan(FLUX, preset).peak <= memory.HEADROOM * int(name) * GIB, (name, preset)


def test_the_documented_table_is_the_plan():
    assert benchmark.table() in (ROOT / "docs/memory.md").read_text("utf8"), "python benchmarks/memory.py table"
    short = (ROOT / "docs/flux.md").read_text("utf8")
    for row in benchmark.table().splitlines()[2:]:
        _, _, peaks, waits = (cell.strip() for cell in row.strip("|").split("|"))
        assert max(peaks.split(" · "), key=float) in short and waits.removesuffix(".0") in short, row


def test_staged_texts_and_precomputed_modulation_change_no_picture(pipe, load, pictures):
    held = load(Preset(staged=True, modulation=True))
    assert held.text_encoder_2 is None and held.device.type == "cpu"
    for batched in (False, True):
        expected = latents(pipe, pictures, batched_guidance=batched)
        torch.testing.assert_close(latents(held, pictures, batched_guidance=batched), expected, rtol=1e-5, atol=1e-5)
    assert held.text_encoder is None and held.text_encoder_2 is None  # freed again
    kept = sum(p.numel() for p in held.transformer.parameters())
    assert kept < 0.75 * sum(p.numel() for p in pipe.transformer.parameters())


def test_staged_text_encoders_are_opened_for_new_prompts_only(load, pictures, monkeypatch):
    from diptych.student.weights import sources

    opened, held = [], load(Preset(staged=True))
    really = sources.open_part
    monkeypatch.setattr(sources, "open_part", lambda part, *rest: opened.append(part) or really(part, *rest))
    first = latents(held, pictures)  # two prompts and "", in two calls of the encoders that are open by then
    assert opened == ["text_encoder", "text_encoder_2"]
    assert torch.equal(latents(held, pictures), first)
    held("a cat", reference=pictures[0], generator=0, num_inference_steps=1, output_type="latent")
    assert opened == 2 * ["text_encoder", "text_encoder_2"]


def test_projections_are_not_fused_where_the_transformer_leaves_the_device_for_new_prompts(load):
    held = load(Preset(staged=True))
    assert apply_speed(held, speed.Speed(fused_qkv=True)) == []  # on a CPU it stays where it is
    held.runtime.memory.device = torch.device("cuda")  # nothing is moved before the next call
    (reason,) = apply_speed(held, speed.Speed(fused_qkv=True))
    assert "leaves the device" in reason
    assert not any(getattr(module, "fused_projections", False) for module in held.transformer.modules())


def test_group_offload_changes_no_bit(pipe, load, pictures):
    held = load(Preset(offload="group"))
    assert torch.equal(latents(held, pictures), latents(pipe, pictures))


def test_tiles_are_for_decoding_alone_and_nearly_the_same_picture(pipe, load, pictures):
    held = load(Preset(tile=16))
    whole = pipe("a cat", reference=pictures[0], generator=0, num_inference_steps=2, output_type="pt").images
    tiled = held("a cat", reference=pictures[0], generator=0, num_inference_steps=2, output_type="pt").images
    assert held.vae.use_tiling and tiled.shape == whole.shape and 0 < (whole - tiled).abs().mean() < 0.1
    assert torch.equal(latents(held, pictures), latents(pipe, pictures)) and not held.vae.use_tiling


# The largest difference of the final guided latents (themselves up to 8.3): 1.5 × what was measured, 0.23 and 0.057.
@pytest.mark.parametrize(("kind", "bound"), [("fp8", 0.35), ("int8", 0.09)])
def test_quantized_paths_stay_near_the_released_latents(kind, bound, golden):
    pytest.importorskip(HAVE[kind])
    preset = Preset(transformer=kind, modulation=True)
    pipe = student.load(GOLDEN / "dsd_model", GOLDEN / "base", device="cpu", fuse=True, memory=preset)
    error = (draw(pipe, golden, "guided") - golden["latents_guided"]).abs()
    assert 1e-4 < error.max() < bound


def test_exact_preset_gives_the_released_latents(golden):
    pipe = student.load(GOLDEN / "dsd_model", GOLDEN / "base", device="cpu", fuse=True, memory="24")
    got = draw(pipe, golden, "guided")
    torch.testing.assert_close(got, golden["latents_guided"], rtol=1e-5, atol=1e-5)


def test_saving_has_every_weight_and_quantized_ones_are_refused(pipe, load, tmp_path):
    held = load(Preset(staged=True, modulation=True))
    student.save(held, tmp_path / "saved")
    again = student.load(tmp_path / "saved", device="cpu")
    for part in ("transformer", "text_encoder_2"):
        state = getattr(again, part).state_dict()
        assert all(torch.equal(state[key], value) for key, value in getattr(pipe, part).state_dict().items())
    assert held.text_encoder_2 is None and held.runtime.memory.modulation.detached
    with raises("model_quantized", "--memory"):
        student.save(load(Preset(transformer="fp8")), tmp_path / "quantized")


def test_what_cannot_work_is_refused_with_every_reason(monkeypatch):
    assert problems(PRESETS["8"][0], "cpu") == ["nf4 does not run on cpu (only on cuda)"]
    assert pick("8", "cpu") == PRESETS["8"][1]  # the next row of it
    absent = replace(quantize.QUANTIZATIONS["int8"], package="no_such_module_at_all")
    monkeypatch.setitem(quantize.QUANTIZATIONS, "int8", absent)
    assert problems(PRESETS["16"][0], "cuda") == ["int8 needs no_such_module_at_all: pip install no_such_module_at_all"]
    with raises("device_unavailable", "--memory 12", "fp8", "mps", kind=UsageError):
        pick("12", "mps")
    together = Preset(transformer="int8", offload="group")
    assert any("use fp8" in reason for reason in problems(together, "cuda"))
    with raises("name_unknown", "'auto'", kind=UsageError):
        pick("autp", "cpu")


def test_unfused_lora_is_refused_before_anything_is_loaded(golden):
    with raises("device_unavailable", "fuse=True", kind=UsageError):
        student.load(GOLDEN / "dsd_model", GOLDEN / "base", device="cpu", memory="24")


def test_gguf_keeps_its_weights_and_its_modulation_is_precomputed_from_them(teacher, pipe, pictures, tmp_path):
    pytest.importorskip("gguf")
    from layouts import write_gguf

    path = write_gguf(tmp_path / "student.gguf", dict(pipe.transformer.state_dict()), "Q8_0")
    plain = student.load(path, teacher, device="cpu")
    held: Any = student.load(path, teacher, device="cpu", memory="24")
    assert held.runtime.memory.preset.transformer == "none" and held.runtime.memory.modulation.detached
    torch.testing.assert_close(latents(held, pictures), latents(plain, pictures), rtol=1e-4, atol=1e-4)
    places = {part: teacher / part for part in ("vae", *memory.TEXT_PARTS)}
    packed = sum(p.nbytes for p in plain.transformer.parameters() if p.dtype == torch.uint8)
    counted = plan(shapes_in(dict(pipe.transformer.config), places, packed), Preset(), device="cpu", dtype_bytes=4)
    assert counted.blocks + counted.modulation + counted.other == pytest.approx(
        stored_bytes(plain.transformer), rel=0.1
    )


def test_a_lora_on_the_modulation_beside_a_gguf_file_is_refused_where_that_is_precomputed(teacher, pipe, tmp_path):
    pytest.importorskip("gguf")
    from safetensors.torch import save_file

    from layouts import write_gguf

    path = write_gguf(tmp_path / "student.gguf", dict(pipe.transformer.state_dict()), "Q8_0")
    for layer, rows in (("attn.to_q", 32), ("norm1.linear", 192)):
        name = f"transformer.transformer_blocks.0.{layer}"
        state = {f"{name}.lora_A.weight": torch.zeros(2, 32), f"{name}.lora_B.weight": torch.zeros(rows, 2)}
        save_file(state, tmp_path / f"{layer}.safetensors")
    options: Any = {"device": "cpu", "memory": "24", "fuse": True}
    held: Any = student.load(path, teacher, lora=tmp_path / "attn.to_q.safetensors", **options)
    assert held.runtime.memory.modulation.detached
    with raises("lora_unsupported", "norm1.linear.safetensors", "--memory 48", kind=UsageError):
        student.load(path, teacher, lora=tmp_path / "norm1.linear.safetensors", **options)
    student.load(path, teacher, lora=tmp_path / "norm1.linear.safetensors", **{**options, "memory": "48"})


def test_a_damaged_text_encoder_is_told_at_once_though_it_is_opened_later(student_folder, teacher, tmp_path):
    base = shutil.copytree(teacher, tmp_path / "base")
    weights = base / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with raises("weights_damaged", weights):
        student.load(student_folder, base, device="cpu", memory="24")
    weights.unlink()
    with raises("model_incomplete", weights):
        student.load(student_folder, base, device="cpu", memory="24")


def test_staged_text_encoders_take_no_lora_of_their_own(load, tmp_path):
    from safetensors.torch import save_file

    pairs = {"A": torch.zeros(2, 32), "B": torch.zeros(32, 2)}
    plain = {f"transformer.transformer_blocks.0.attn.to_q.lora_{key}.weight": value for key, value in pairs.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    assert load(Preset(staged=True), lora=tmp_path / "plain.safetensors", fuse=True).runtime.memory.waiting
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    text = {name.format(key): value[:20, :20].clone() for key, value in pairs.items()}
    save_file(plain | text, tmp_path / "text.safetensors")
    with raises("lora_unsupported", tmp_path / "text.safetensors", kind=UsageError):
        load(Preset(staged=True), lora=tmp_path / "text.safetensors", fuse=True)


def test_auto_takes_the_largest_that_fits_and_says_so(load):
    name, preset = choose(FLUX, 100 * GIB, "a card", device="cuda")
    assert (name, preset) == ("auto → 80", PRESETS["80"][0])
    name, _ = choose(FLUX, int(22.5 * GIB), "a card", device="cuda")
    assert name == "auto → 24"
    with raises("memory_insufficient", "a card", "0.2 GiB", "80 needs"):
        choose(FLUX, GIB // 4, "a card", device="cuda")
    held = load("auto")
    assert held.runtime.memory.reason.startswith("memory auto → 80: transformer as loaded")
    assert "free on this machine" in held.runtime.memory.reason


def test_on_a_cpu_what_waits_counts_too():
    tabled, whole = (plan(FLUX, Preset(modulation=on), device="cpu", dtype_bytes=4) for on in (True, False))
    assert isinstance(tabled, MemoryPlan) and tabled.host == 0
    assert tabled.stages["denoise"] == whole.stages["denoise"] + tabled.table


@pytest.mark.parametrize("command", [["generate", "--prompt", "a cat"], ["relight", "--light", "red"]])
def test_commands_say_what_was_chosen_and_the_picture_does(
    command, student_folder, teacher, pictures, tmp_path, capsys
):
    from diptych.data.images import read_provenance

    pictures[0].save(tmp_path / "r.png")
    model = ["--model", str(student_folder), "--base", str(teacher), "--device", "cpu", "--memory", "12"]
    asked = [*command, *model, "--reference", str(tmp_path / "r.png"), "--steps", "1"]
    assert app.call([*asked, "--out", str(tmp_path / "o.png")]) == 0
    said = capsys.readouterr().err
    assert "memory 12: transformer fp8" in said and "Loading weights" not in said
    told = read_provenance(tmp_path / "o.png")
    assert told is not None and told["memory"] == json.loads(json.dumps(asdict(PRESETS["12"][0])))


def test_the_command_refuses_an_unknown_size_before_loading(capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "r.png")
    options: Any = ["generate", "--reference", str(tmp_path / "r.png"), "--prompt", "a cat", "--memory", "10"]
    assert app.call([*options, "--out", str(tmp_path / "o.png")]) == 2
    err = capsys.readouterr().err
    assert "error[name_unknown]" in err and "'10'" in err and "8, 12" in err
