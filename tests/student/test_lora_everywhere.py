"""LoRA and DoRA on every way through the program: converted, fused, beside quantized weights, hurried, stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline
from safetensors.torch import load_file, save_file

from diptych import student
from diptych.student.runtime.applied import apply_speed
from diptych.student.runtime.speed import Speed
from diptych.student.weights.convert import convert
from diptych.student.weights.lora import apply_lora, fuse_loras
from diptych.student.weights.lora_delta import Delta, as_lora
from diptych.student.weights.lora_file import lora_deltas
from diptych.student.weights.tensors import write_safetensors
from layouts import dora, read_state, write_gguf
from raising import raises

CLOSE: Any = {"rtol": 0, "atol": 2e-5}
QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
CLIP, T5 = "encoder.layers.0.self_attn.v_proj", "encoder.block.0.layer.0.SelfAttention.q"


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


@pytest.fixture(scope="module")
def state(student_folder: Path) -> dict[str, torch.Tensor]:
    return read_state(student_folder / "transformer")


@pytest.fixture(scope="module")
def doras(state) -> dict[str, Delta]:
    """DoRA on three layers that are one in Black Forest Labs' naming, on a plain one and on the last modulation."""
    made = {}
    for seed, name in enumerate([*QKV, "proj_out", "norm_out.linear"]):
        out, width = state[f"{name}.weight"].shape
        made[name] = Delta(random(seed, 2, width), random(9 + seed, out, 2), None, random(20 + seed, out, 1).abs())
    return made


@pytest.fixture(scope="module")
def dora_file(doras, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dora") / "dora.safetensors"
    write_safetensors(path, *as_lora(doras))
    return path


def wanted(state: dict[str, torch.Tensor], doras: dict[str, Delta], scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {n: dora(state[f"{n}.weight"], scale * d.b @ d.a, d.magnitude) for n, d in doras.items()}  # pyright: ignore


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
def test_a_dora_survives_every_style(dora_file, doras, tmp_path, style) -> None:
    convert(dora_file, tmp_path / "theirs.safetensors", f"lora-{style}")
    keys = load_file(tmp_path / "theirs.safetensors").keys()
    assert any(key.endswith("img_attn.qkv.dora_scale") or key.endswith("img_attn_qkv.dora_scale") for key in keys)
    convert(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", "lora-diffusers")
    back = lora_deltas(tmp_path / "back.safetensors")
    assert back.keys() == doras.keys()
    for name, delta in doras.items():
        torch.testing.assert_close(back[name].weight(), delta.weight(), **CLOSE)
        torch.testing.assert_close(back[name].magnitude, delta.magnitude, rtol=0, atol=0)


def test_a_dora_is_fused_by_converting(dora_file, doras, state, student_folder, tmp_path) -> None:
    folder = tmp_path / "student"
    convert(student_folder, folder, "folded", dtype="float32")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(dora_file.read_bytes())
    convert(folder, tmp_path / "one.safetensors", "file", fuse_lora=True)
    fused = load_file(tmp_path / "one.safetensors")
    changed = {f"{name}.weight": weight for name, weight in wanted(state, doras).items()}
    assert fused.keys() == state.keys()
    for key, value in fused.items():
        torch.testing.assert_close(value, changed.get(key, state[key]), **CLOSE, msg=key)


def test_a_dora_that_a_style_cannot_say_is_refused(doras, student_folder, teacher, tmp_path) -> None:
    q = doras[QKV[0]]
    write_safetensors(tmp_path / "q.safetensors", *as_lora({QKV[0]: q}))
    with raises("lora_unsupported", "img_attn.qkv", "1 of its 3 parts"):
        convert(tmp_path / "q.safetensors", tmp_path / "o.safetensors", "lora-kohya")
    some = {QKV[0]: q, "proj_out": Delta(doras["proj_out"].a, doras["proj_out"].b)}
    with raises("lora_unsupported", "1 of 2 layers"):
        as_lora(some)
    flat = "lora_unet_double_blocks_0_img_attn_qkv"
    columns = {f"{flat}.lora_down.weight": random(1, 2, 32), f"{flat}.lora_up.weight": random(2, 96, 2)}
    save_file({**columns, f"{flat}.dora_scale": torch.ones(1, 32)}, tmp_path / "columns.safetensors")
    with raises("lora_unsupported", "img_attn.qkv", "(1, 32)", "wd_on_output"):
        lora_deltas(tmp_path / "columns.safetensors")
    folder = tmp_path / "student"
    convert(student_folder, folder, "folded", dtype="float32")
    (tmp_path / "q.safetensors").rename(folder / "pytorch_lora_weights.safetensors")
    with raises("lora_unsupported", "to_q", "--fuse"):
        convert(folder, tmp_path / "lora", "control-lora", base=teacher)


def test_stock_diffusers_takes_the_doras_and_ranks_that_we_write(
    doras, state, student_folder, teacher, tmp_path
) -> None:
    """`proj_out` has another rank than the layers of the blocks whose names end in it."""
    pipe = student.load(student_folder, teacher, device="cpu")
    student.save(pipe, tmp_path / "saved")
    block = "single_transformer_blocks.0.proj_out"
    out, width = state[f"{block}.weight"].shape
    plain = {block: Delta(random(1, 3, width), random(2, out, 3)), QKV[0]: Delta(random(1, 3, 32), random(2, 32, 3))}
    plain |= {"proj_out": Delta(doras["proj_out"].a, doras["proj_out"].b)}
    for name, deltas in (("dora", doras), ("plain", plain)):
        write_safetensors(tmp_path / f"{name}.safetensors", *as_lora(deltas))
        stock: Any = FluxControlPipeline.from_pretrained(tmp_path / "saved")
        stock.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        stock.fuse_lora(components=["transformer"])
        ours = student.load(student_folder, teacher, device="cpu", lora=tmp_path / f"{name}.safetensors", fuse=True)
        stock.unload_lora_weights()
        theirs = stock.transformer.state_dict()
        for key, value in ours.transformer.state_dict().items():
            torch.testing.assert_close(value, theirs[key], **CLOSE, msg=key)


def test_a_dora_stays_beside_quantized_weights(doras, dora_file, state, teacher, tmp_path) -> None:
    path = write_gguf(tmp_path / "student.gguf", state, "Q8_0")
    pipe = student.load(path, teacher, device="cpu", lora=(dora_file, 0.5), fuse=True)
    layer: Any = pipe.transformer.get_submodule(QKV[0])
    plain = layer.get_base_layer()
    with torch.no_grad():
        eye = torch.eye(32)
        start, got = plain(eye) - plain(0 * eye), layer(eye) - layer(0 * eye)
    added = 0.5 * doras[QKV[0]].b @ doras[QKV[0]].a
    expected = dora(start.T, added, doras[QKV[0]].magnitude)  # pyright: ignore
    torch.testing.assert_close(got.T, expected, rtol=0, atol=1e-3)  # GGUF's scales are in half precision
    assert (expected - start.T).abs().max() > 0.1


def text_lora(pipe: Any, path: Path) -> dict[str, torch.Tensor]:
    """A file for CLIP and T5; the weights that it makes."""
    tensors, changed = {}, {}
    for component, name in (("text_encoder", CLIP), ("text_encoder_2", T5)):
        weight = getattr(pipe, component).get_submodule(name).weight.detach()
        a, b = random(3, 2, weight.shape[1]), random(4, weight.shape[0], 2)
        tensors |= {f"{component}.{name}.lora_A.weight": a, f"{component}.{name}.lora_B.weight": b}
        changed[component] = weight + 0.5 * b @ a
    save_file(tensors, path)
    return changed


def test_a_speed_preset_fuses_the_text_encoders_too(student_folder, teacher, tmp_path) -> None:
    pipe: Any = student.load(student_folder, teacher, device="cpu")
    changed = text_lora(pipe, tmp_path / "text.safetensors")
    apply_lora(pipe, tmp_path / "text.safetensors", 0.5)
    apply_speed(pipe, Speed(fused_lora=True))
    for component, name in (("text_encoder", CLIP), ("text_encoder_2", T5)):
        layer = getattr(pipe, component).get_submodule(name)
        torch.testing.assert_close(layer.weight, changed[component], **CLOSE)


def test_a_text_encoders_lora_beside_gguf_weights_is_fused(state, teacher, tmp_path) -> None:
    pipe: Any = student.load(write_gguf(tmp_path / "s.gguf", state, "Q8_0"), teacher, device="cpu")
    changed = text_lora(pipe, tmp_path / "text.safetensors")
    lora = (tmp_path / "text.safetensors", 0.5)
    pipe = student.load(tmp_path / "s.gguf", teacher, device="cpu", lora=lora, fuse=True)
    torch.testing.assert_close(pipe.text_encoder.get_submodule(CLIP).weight, changed["text_encoder"], **CLOSE)


def test_scales_that_were_set_stay_when_another_lora_comes(student_folder, teacher, dora_file, tmp_path) -> None:
    """Also those of an adapter that diffusers loaded, rank-stabilized; and one that is off stays off."""
    pipe: Any = student.load(student_folder, teacher, device="cpu")
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["to_q"])
    pipe.transformer.add_adapter(config, adapter_name="theirs")
    pipe.transformer.add_adapter(config, adapter_name="off")
    pipe.set_adapters(["theirs"], [0.7])
    layer = pipe.transformer.get_submodule(QKV[0])
    before = layer.scaling["theirs"]
    name = apply_lora(pipe, dora_file, 0.5)
    assert layer.scaling["theirs"] == before == pytest.approx(0.7 * 2 / 2)
    assert (layer.scaling[name], list(layer.active_adapters)) == (0.5, ["theirs", name])


def test_the_pipelines_own_call_reads_the_whole_file_too(doras, dora_file, state, student_folder, teacher) -> None:
    pipe: Any = student.load(student_folder, teacher, device="cpu")
    pipe.load_lora_weights(dora_file.parent, weight_name=dora_file.name, adapter_name="mine")
    assert pipe.get_active_adapters() == ["mine"]
    fuse_loras(pipe)
    for name, weight in wanted(state, doras).items():
        torch.testing.assert_close(pipe.transformer.get_submodule(name).weight, weight, **CLOSE)


def test_a_dora_is_not_trained_on_as_a_lora(dora_file, student_folder) -> None:
    from diffusers import FluxTransformer2DModel

    from diptych.errors import UsageError
    from diptych.train import parts

    model: Any = FluxTransformer2DModel.from_pretrained(student_folder / "transformer")
    linears: Any = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with raises("lora_unsupported", dora_file, "DoRA", kind=UsageError):
        parts._load_init(model, str(dora_file), linears)
