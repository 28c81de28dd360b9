"""Opening and saving: every layout, every damage, one clear line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import load_file, save_file

from diptych import student
from diptych.errors import UsageError, UserError
from diptych.student.loading import pick_dtype
from diptych.student.weights import files, sources
from diptych.student.weights.convert import convert
from diptych.student.weights.lora import apply_lora
from diptych.utils import models
from layouts import read_state, write_gguf
from raising import raises

GOLDEN = Path(__file__).parents[1] / "fixtures" / "release_golden"
LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def pipe(student_folder: Path, teacher: Path):
    """A fresh one for each test here: they cast it and put LoRAs on it."""
    return student.load(student_folder, teacher, device="cpu")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_stock_pipeline_opens_a_saved_student_and_computes_the_same(pipe, tmp_path):
    student.save(pipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "FluxControlPipeline"
    stock = FluxControlPipeline.from_pretrained(tmp_path / "out")
    assert type(stock) is FluxControlPipeline
    inputs = {
        "hidden_states": torch.randn(1, 8, 32),
        "timestep": torch.tensor([0.5]),
        "pooled_projections": torch.randn(1, 20),
        "encoder_hidden_states": torch.randn(1, 12, 24),
        "txt_ids": torch.zeros(12, 3),
        "img_ids": pipe._prepare_latent_image_ids(1, 2, 4, "cpu", torch.float32),
    }
    with torch.no_grad():
        assert torch.equal(stock.transformer(**inputs).sample, pipe.transformer(**inputs).sample)
    again = student.load(tmp_path / "out", device="cpu")
    assert again.settings == pipe.settings and pipe.settings.words


def test_a_saved_released_student_keeps_its_bias_split(tmp_path):
    pipe = student.load(GOLDEN / "dsd_model", GOLDEN / "base", device="cpu", released_lora=False)
    student.save(pipe, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "released", "released")
    before = read_state(GOLDEN / "dsd_model" / "transformer")
    after = read_state(tmp_path / "released" / "transformer")
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_saving_refuses_what_would_be_lost(pipe, student_folder, teacher, tmp_path):
    student.save(pipe, tmp_path / "out")
    with raises("output_exists", tmp_path / "out"):
        student.save(pipe, tmp_path / "out")
    student.save(pipe, tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary folders are left
    lora = make_lora(tmp_path / "lora.safetensors")
    loaded = student.load(student_folder, teacher, device="cpu", lora=lora)
    with raises("lora_unsupported"):
        student.save(loaded, tmp_path / "other")


def test_float16_weights_load_as_float32_on_a_cpu(pipe, teacher, tmp_path):
    student.save(pipe.to(torch.float16), tmp_path / "half")
    loaded = student.load(tmp_path / "half", device="cpu")
    parts = (loaded.transformer, loaded.vae, loaded.text_encoder, loaded.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    assert student.load(tmp_path / "half", device="cpu", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    assert pick_dtype(tmp_path / "half" / "transformer", torch.device("cuda")) == torch.float32
    student.save(pipe.to(torch.bfloat16), tmp_path / "brain")
    assert pick_dtype(tmp_path / "brain" / "transformer", torch.device("cuda")) == torch.bfloat16


def make_lora(path: Path, change=None) -> Path:
    torch.manual_seed(3)
    state = {f"{LAYER}.lora_A.weight": torch.randn(2, 32), f"{LAYER}.lora_B.weight": torch.randn(32, 2)}
    if change:
        change(state)
    save_file(state, path)
    return path


def weight(pipe):
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight


def test_fusing_adds_the_scaled_product(student_folder, teacher, tmp_path):
    state = load_file(make_lora(tmp_path / "a.safetensors"))
    plain = student.load(student_folder, teacher, device="cpu")
    fused = student.load(student_folder, teacher, device="cpu", lora=(tmp_path / "a.safetensors", 0.5), fuse=True)
    a, b = state[f"{LAYER}.lora_A.weight"], state[f"{LAYER}.lora_B.weight"]
    torch.testing.assert_close(weight(fused), weight(plain) + 0.5 * b @ a)
    assert not getattr(fused.transformer, "peft_config", {})


def test_alpha_in_the_header_scales(student_folder, teacher, tmp_path):
    from peft import LoraConfig

    state = load_file(make_lora(tmp_path / "a.safetensors"))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[LAYER.removeprefix("transformer.")]).to_dict()
    config = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    save_file(state, tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    plain = student.load(student_folder, teacher, device="cpu")
    fused = student.load(student_folder, teacher, device="cpu", lora=tmp_path / "b.safetensors", fuse=True)
    a, b = state[f"{LAYER}.lora_A.weight"], state[f"{LAYER}.lora_B.weight"]
    torch.testing.assert_close(weight(fused), weight(plain) + 3 * b @ a)


def test_a_control_lora_goes_on_the_widened_teacher(student_folder, teacher, tmp_path):
    """A folder with only the LoRA file; the input layer as stock diffusers stores it, a full-rank adapter with bias."""
    wide = read_state(student_folder / "transformer")["x_embedder.weight"]
    start = torch.zeros_like(wide)
    start[:, :16] = read_state(teacher / "transformer")["x_embedder.weight"]
    bias = torch.randn(32)
    name = "transformer.x_embedder"
    state = {f"{name}.lora_A.weight": torch.eye(32), f"{name}.lora_B.weight": wide - start, f"{name}.lora_B.bias": bias}
    (tmp_path / "lora").mkdir()
    save_file(state, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    pipe = student.load(tmp_path / "lora", teacher, device="cpu", fuse=True)
    plain = student.load(student_folder, teacher, device="cpu")
    torch.testing.assert_close(pipe.transformer.x_embedder.weight, plain.transformer.x_embedder.weight)
    torch.testing.assert_close(pipe.transformer.x_embedder.bias, plain.transformer.x_embedder.bias + bias)
    make_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with raises("lora_unsupported", "x_embedder"):
        student.load(tmp_path / "lora", teacher, device="cpu")


@pytest.mark.parametrize("fuse", [True, False])
def test_several_loras_add_up_at_their_scales(student_folder, teacher, tmp_path, pictures, fuse):
    paths = [make_lora(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    once = student.load(student_folder, teacher, device="cpu", lora=(paths[0], 1.0), fuse=True)
    scaled = [(paths[0], 0.25), (paths[1], 0.75)]
    twice = student.load(student_folder, teacher, device="cpu", lora=scaled, fuse=fuse)
    call = {"prompt": "a cat", "reference": pictures[0], "num_inference_steps": 2, "generator": 0}
    outs = [p(**call, output_type="latent").images for p in (once, twice)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_lora_on_the_released_input_layer_acts_on_the_noisy_half_only(student_folder, teacher, tmp_path):
    def change(state):
        state["transformer.x_embedder.lora_A.weight"] = torch.randn(2, 16)
        state["transformer.x_embedder.lora_B.weight"] = torch.randn(32, 2)

    plain = student.load(student_folder, teacher, device="cpu")
    path = make_lora(tmp_path / "x.safetensors", change)
    pipe = student.load(student_folder, teacher, device="cpu", lora=path, fuse=True)
    state = load_file(path)
    expected = plain.transformer.x_embedder.weight.clone()
    expected[:, :16] += state["transformer.x_embedder.lora_B.weight"] @ state["transformer.x_embedder.lora_A.weight"]
    torch.testing.assert_close(pipe.transformer.x_embedder.weight, expected)


@pytest.mark.parametrize(
    ("change", "code", "fact"),
    [
        (
            lambda s: s.update({"transformer.lost.lora_A.weight": torch.zeros(2, 32)}),
            "lora_mismatch",
            "transformer.lost.lora_A.weight",
        ),
        (
            lambda s: s.update({"transformer.proj_out.weight": torch.zeros(2, 32)}),
            "lora_mismatch",
            "transformer.proj_out.weight",
        ),
        (
            lambda s: s.update({"unet.to_q.lora_A.weight": torch.zeros(2, 32)}),
            "lora_mismatch",
            "unet.to_q.lora_A.weight",
        ),
        (
            lambda s: s.update({"transformer.c_embedder.lora_A.weight": torch.zeros(2, 16)}),
            "lora_unsupported",
            "transformer.c_embedder.lora_A.weight",
        ),
        (lambda s: s.update({f"{LAYER}.lora_A.weight": torch.zeros(2, 31)}), "lora_mismatch", "width 31"),
        (lambda s: s.update({f"{LAYER}.lora_A.weight": torch.zeros(2, 16)}), "lora_mismatch", "width 16"),
        (lambda s: s.update({f"{LAYER}.lora_A.weight": torch.zeros(3, 32)}), "weights_damaged", "(3, 32)"),
        (lambda s: s.pop(f"{LAYER}.lora_B.weight"), "weights_damaged", "attn.to_q"),
        (lambda s: s.clear(), "file_damaged", "bad.safetensors"),
    ],
)
def test_lora_keys_without_a_layer_are_refused_by_name(pipe, tmp_path, change, code, fact):
    before = weight(pipe).clone()
    with raises(code, fact):
        apply_lora(pipe, make_lora(tmp_path / "bad.safetensors", change))
    assert not getattr(pipe.transformer, "peft_config", {})
    assert torch.equal(weight(pipe), before)


def test_missing_base_and_missing_parts_say_what_to_give(student_folder, teacher, tmp_path):
    with raises("option_missing", "base", kind=UsageError):
        student.load(student_folder, device="cpu")
    with raises("model_incomplete", "scheduler, vae"):
        student.load(student_folder, tmp_path, device="cpu")
    (tmp_path / "empty").mkdir()
    with raises("model_incomplete", tmp_path / "empty", "transformer/"):
        student.load(tmp_path / "empty", teacher, device="cpu")
    save_file({"x": torch.zeros(1)}, tmp_path / "empty" / "mine.safetensors")
    with raises("model_incomplete", "transformer/", tmp_path / "empty" / "mine.safetensors"):
        student.load(tmp_path / "empty", teacher, device="cpu")
    with raises("model_not_found", "nosuch", kind=UsageError):
        student.load("nosuch", teacher)
    with raises("device_unavailable", "warp", kind=UsageError):
        student.load(student_folder, teacher, device="warp")


def test_the_base_of_a_run_is_its_teacher(student_folder, teacher, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"{{name: mine, teacher: {teacher}}}")
    shutil.copytree(student_folder, run / "student")
    for model in (run, run / "student"):
        assert sources.resolve(model, None) == (run / "student", Path(teacher))
    assert sources.resolve(run, "pocket")[1] == models.resolve("pocket", "teacher")
    (run / "student" / "vae").mkdir()  # a whole pipeline needs no base, which may not be on this machine
    assert sources.resolve(run, None) == (run / "student", None)


@pytest.mark.parametrize(
    ("part", "file", "damage", "code"),
    [
        ("transformer", files.WEIGHTS_FILE, "cut", "weights_damaged"),
        ("transformer", files.WEIGHTS_FILE, "gone", "model_incomplete"),
        ("transformer", "config.json", "gone", "model_incomplete"),
        ("transformer", "config.json", "cut", "json_invalid"),
        ("vae", "config.json", "cut", None),
        ("vae", files.WEIGHTS_FILE, "cut", "weights_damaged"),
        ("vae", files.WEIGHTS_FILE, "gone", "model_incomplete"),
        ("vae", files.WEIGHTS_FILE, "thinned", "model_incomplete"),
        ("text_encoder_2", "model.safetensors", "cut", "weights_damaged"),
        ("text_encoder_2", "model.safetensors", "thinned", "model_incomplete"),
        ("tokenizer", "tokenizer_config.json", "cut", None),
        ("scheduler", "scheduler_config.json", "gone", "weights_damaged"),
    ],
)
def test_damaged_files_are_named(pipe, tmp_path, part, file, damage, code):
    folder = student.save(pipe, tmp_path / "whole")
    path = folder / part / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "gone":
        path.unlink()
    else:
        state = load_file(path)
        state.pop(sorted(state)[0])
        save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        student.load(folder, device="cpu")
    assert part in str(caught.value) and caught.value.code == (code or caught.value.code)


def test_an_index_that_names_no_files_and_an_encoder_without_a_tokenizer_are_told(student_folder, teacher, tmp_path):
    folder = copy(student_folder, tmp_path / "sharded")
    (folder / "transformer" / files.WEIGHTS_FILE).unlink()
    (folder / "transformer" / f"{files.WEIGHTS_FILE}.index.json").write_text('{"weight_map": [1]}')
    with raises("file_damaged", "index.json", "weight_map"):
        student.load(folder, teacher, device="cpu")
    base = copy(teacher, tmp_path / "base")
    shutil.rmtree(base / "tokenizer_2")
    with raises("model_incomplete", base, "text_encoder_2", "tokenizer_2"):
        student.load(student_folder, base, device="cpu")


def test_a_base_for_whole_weights_needs_no_transformer_weights(tmp_path):
    """docs/flux.md: `hf download … --exclude "transformer/*.safetensors"` leaves the other files of the transformer."""
    base = copy(GOLDEN / "base", tmp_path / "base")
    (base / "transformer").mkdir()
    shutil.copy(GOLDEN / "dsd_model" / "transformer" / "config.json", base / "transformer")
    index = {"weight_map": {"x_embedder.weight": "diffusion_pytorch_model-00001-of-00003.safetensors"}}
    (base / "transformer" / f"{files.WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    whole, pipe = (student.load(GOLDEN / "dsd_model", each, device="cpu") for each in (GOLDEN / "base", base))
    assert all(torch.equal(a, b) for a, b in zip(*(p.transformer.parameters() for p in (whole, pipe)), strict=True))


def test_a_base_of_another_family_is_refused(student_folder):
    with raises("model_mismatch", "64", "16"):
        student.load(student_folder, GOLDEN / "base", device="cpu")


def test_a_base_that_is_no_flux_pipeline_is_refused_by_its_name(student_folder, teacher, tmp_path):
    base = copy(teacher, tmp_path / "other")
    index = base / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"StableDiffusion3Pipeline"'))
    with raises("model_mismatch", "StableDiffusion3Pipeline", "FLUX.1"):
        student.load(student_folder, base, device="cpu")


def test_local_paths_need_no_network(student_folder, teacher, monkeypatch):
    def connect(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert student.load(student_folder, teacher, device="cpu").text_encoder is not None


def test_a_single_file_is_opened_with_its_header_or_its_base(student_folder, teacher, pipe, tmp_path):
    """The header of a converted file holds what shapes do not say; another's file asks the base's config."""
    convert(student_folder, tmp_path / "student.safetensors", "file")
    state = read_state(student_folder / "transformer")
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, tmp_path / "bare.safetensors")
    for name in ("student", "bare"):
        loaded = student.load(tmp_path / f"{name}.safetensors", teacher, device="cpu")
        assert dict(loaded.transformer.config) | {"_name_or_path": ""} == dict(pipe.transformer.config) | {
            "_name_or_path": ""
        }
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.transformer.state_dict().items())
        assert loaded.loaded_from == (tmp_path / f"{name}.safetensors", teacher)
    with raises("option_missing", "base", kind=UsageError):
        student.load(tmp_path / "student.safetensors", device="cpu")
    bare_base = tmp_path / "base"
    for part in ("vae", "scheduler"):
        copy(teacher / part, bare_base / part)
    assert student.load(tmp_path / "student.safetensors", bare_base, device="cpu").transformer.config.in_channels == 32
    with raises("model_incomplete", "axes_dims_rope", "16", "base"):
        student.load(tmp_path / "bare.safetensors", bare_base, device="cpu")


def test_a_control_lora_file_alone_is_a_model(student_folder, teacher, tmp_path):
    convert(student_folder, tmp_path / "lora", "control-lora", base=teacher)
    alone = tmp_path / "mine.safetensors"
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").rename(alone)
    loaded = student.load(alone, teacher, device="cpu", fuse=True).transformer
    wide = read_state(student_folder / "transformer")["x_embedder.weight"]
    torch.testing.assert_close(loaded.x_embedder.weight, wide)
    with raises("option_missing", alone, "base", kind=UsageError):
        student.load(alone, device="cpu")


def test_gguf_stays_quantized_and_takes_a_lora_beside_it(student_folder, teacher, tmp_path, pictures):
    state = read_state(student_folder / "transformer")
    path = write_gguf(tmp_path / "student.gguf", state, "Q8_0")
    lora = (make_lora(tmp_path / "a.safetensors"), 0.25)
    exact = student.load(student_folder, teacher, device="cpu", lora=lora, fuse=True)
    pipe = student.load(path, teacher, device="cpu", lora=lora, fuse=True)
    assert type(pipe.transformer.x_embedder) is torch.nn.Linear
    assert type(pipe.transformer.transformer_blocks[0].attn.to_k).__name__ == "GGUFLinear"
    call = {"prompt": "a cat", "reference": pictures[0], "num_inference_steps": 2, "generator": 0}
    outs = [p(**call, output_type="latent").images for p in (exact, pipe)]
    assert 1e-6 < (outs[0] - outs[1]).abs().max() < 0.05 * outs[0].abs().max()  # pyright: ignore
    with raises("lora_unsupported"):
        student.save(pipe, tmp_path / "saved")
    with raises("model_quantized"):
        student.save(student.load(path, teacher, device="cpu"), tmp_path / "saved")


def test_damaged_and_unreadable_files_are_named(teacher, tmp_path, student_folder):
    state = read_state(student_folder / "transformer")
    whole = write_gguf(tmp_path / "whole.gguf", state, "F16").read_bytes()
    for name, size in (("head.gguf", 200), ("tail.gguf", len(whole) - 500)):
        (tmp_path / name).write_bytes(whole[:size])
        with raises("weights_damaged", name, "GGUF"):
            student.load(tmp_path / name, teacher, device="cpu")
    cut = tmp_path / "cut.safetensors"
    save_file(state, cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with raises("weights_damaged", cut):
        student.load(cut, teacher, device="cpu")
    for name in ("pointer.safetensors", "pointer.gguf"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 24\n")
        with raises("model_incomplete", name, "git lfs pull"):
            student.load(tmp_path / name, teacher, device="cpu")
    (tmp_path / "student.ckpt").write_bytes(b"")
    with raises("file_format_unknown", "student.ckpt", ".safetensors", ".gguf", kind=UsageError):
        student.load(tmp_path / "student.ckpt", teacher, device="cpu")
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with raises("model_unsupported", "other.safetensors", "x_embedder.weight"):
        student.load(tmp_path / "other.safetensors", teacher, device="cpu")
    for name in ("nosuch.safetensors", "nosuch"):
        with raises("lora_not_found", tmp_path / name):
            student.load(student_folder, teacher, device="cpu", lora=tmp_path / name)


def test_another_kind_of_transformer_is_refused(student_folder, teacher, tmp_path):
    folder = copy(student_folder, tmp_path / "other")
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("FluxTransformer2DModel", "SD3Transformer2DModel"))
    with raises("model_unsupported", "SD3Transformer2DModel"):
        student.load(folder, teacher, device="cpu")


def test_weights_that_were_saved_quantized_or_pickled_are_refused_with_what_to_give(student_folder, teacher, tmp_path):
    folder = copy(student_folder, tmp_path / "nf4")
    config = folder / "transformer" / "config.json"
    said = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(said))
    with raises("model_quantized", "bitsandbytes"):
        student.load(folder, teacher, device="cpu")
    base = copy(teacher, tmp_path / "base")
    (base / "text_encoder_2" / "model.safetensors").rename(base / "text_encoder_2" / "pytorch_model.bin")
    with raises("model_unsafe", "text_encoder_2", "safetensors"):
        student.load(student_folder, base, device="cpu")


def test_a_transformer_folder_itself_is_a_model(student_folder, teacher):
    assert student.load(student_folder / "transformer", teacher, device="cpu").transformer.config.in_channels == 32
