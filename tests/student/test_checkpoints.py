"""What other programs save: folders with a variant, all-in-one files, scaled fp8, `.sft`. All draw the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych import student
from diptych.errors import UsageError
from diptych.stages.paint import open_teacher
from diptych.student.weights.convert import convert
from diptych.student.weights.sources import teacher_state
from layouts import latent_diffusion_keys, original_keys, read_state
from raising import raises


@pytest.fixture(scope="module")
def state(student_folder: Path) -> dict[str, torch.Tensor]:
    return read_state(student_folder / "transformer")


def same(pipe: Any, other: Any) -> None:
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        one, two = (getattr(p, part).state_dict() for p in (pipe, other))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, two[key]), f"{part}.{key}"


def with_variant(source: Path, target: Path, variant: str, shards: bool) -> Path:
    """A copy whose weights are saved as a variant, by the libraries themselves."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    classes: dict[str, Any] = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
    classes |= {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    for part, cls in classes.items():
        if (source / part).is_dir():
            size: Any = {"max_shard_size": "4KB"} if shards else {}
            cls.from_pretrained(source / part).save_pretrained(target / part, variant=variant, **size)
    assert not list(target.glob("*/*model.safetensors"))
    return target


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_with_a_variant_is_the_same_student(pipe, student_folder, teacher, tmp_path, shards) -> None:
    base = with_variant(teacher, tmp_path / "base", "fp16", shards)
    folder = with_variant(student_folder, tmp_path / "student", "fp16", shards)
    if shards:
        assert all(list((base / part).glob("*.index.fp16.json")) for part in ("transformer", "vae", "text_encoder_2"))
    same(student.load(folder, base, device="cpu"), pipe)
    state = open_teacher(base, torch.float32).transformer.state_dict()
    assert all(torch.equal(value, teacher_state(base)[0][key].read()) for key, value in state.items())
    # Copied along, they have their plain names, for stock diffusers.
    convert(folder, tmp_path / "whole", "folded", base=base)
    same(student.load(tmp_path / "whole", device="cpu"), pipe)
    from diffusers import FluxControlPipeline

    same(FluxControlPipeline.from_pretrained(tmp_path / "whole"), pipe)


def test_several_variants_are_named(student_folder, teacher, tmp_path) -> None:
    folder = with_variant(student_folder, tmp_path / "student", "fp16", False)
    weights = folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with raises("model_unsupported", folder / "transformer", "bf16, fp16"):
        student.load(folder, teacher, device="cpu")
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.safetensors"))
    student.load(folder, teacher, device="cpu")  # the plain one is meant


def all_in_one(state, pipe) -> dict[str, torch.Tensor]:
    """As ComfyUI saves a checkpoint."""
    found = {f"model.diffusion_model.{key}": value for key, value in original_keys(state).items()}
    found |= {f"vae.{key}": value for key, value in latent_diffusion_keys(pipe.vae.state_dict()).items()}
    clip = {f"transformer.text_model.{key}": value for key, value in pipe.text_encoder.state_dict().items()}
    clip |= {"logit_scale": torch.tensor(4.6), "transformer.text_projection.weight": torch.eye(20)}
    t5 = {f"transformer.{key}": value for key, value in pipe.text_encoder_2.state_dict().items()}
    found |= {f"text_encoders.clip_l.{key}": value for key, value in clip.items()}
    found |= {f"text_encoders.t5xxl.{key}": value for key, value in t5.items()}
    return {key: value.clone().contiguous() for key, value in found.items()}


@pytest.fixture
def changed(student_folder: Path, teacher: Path) -> Any:
    """A student whose parts are not the base's."""
    pipe: Any = student.load(student_folder, teacher, device="cpu")
    with torch.no_grad():
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            for parameter in part.parameters():
                parameter.mul_(1.25)
    return pipe


def test_an_all_in_one_file_brings_its_own_parts(state, changed, teacher, tmp_path) -> None:
    found = all_in_one(state, changed)
    save_file(found, tmp_path / "one.safetensors")
    loaded = student.load(tmp_path / "one.safetensors", teacher, device="cpu")
    same(loaded, changed)
    out = student.save(loaded, tmp_path / "saved")
    same(student.load(out, device="cpu"), changed)
    # Only the transformer is converted, and that is said.
    shutil.copyfile(teacher / "transformer" / "config.json", tmp_path / "config.json")
    done = convert(tmp_path / "one.safetensors", tmp_path / "folded", "folded")
    assert done["left_out"] == ["text_encoder", "text_encoder_2", "vae"]
    with raises("option_conflict", "text_encoder, text_encoder_2, vae", "--base"):
        convert(tmp_path / "one.safetensors", tmp_path / "whole", "folded", base=teacher)
    with pytest.raises(UsageError, match="text_encoder and text_encoder_2"):
        student.load(tmp_path / "one.safetensors", teacher, device="cpu", memory="24")


@pytest.mark.parametrize(
    ("change", "code", "facts"),
    [
        (lambda s: s.update({"control_model.x": torch.zeros(1)}), "model_unsupported", ["control_model.x"]),
        (lambda s: s.pop("vae.decoder.conv_in.weight"), "model_mismatch", ["vae", "decoder.conv_in.weight"]),
        (lambda s: s.update({"vae.decoder.new.weight": torch.zeros(1)}), "model_mismatch", ["vae", "1 keys"]),
        (
            lambda s: s.pop("text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"),
            "model_mismatch",
            ["text_encoder_2", "encoder.final_layer_norm.weight"],
        ),
        (
            lambda s: s.update({"text_encoders.clip_l.transformer.text_model.x": torch.zeros(1)}),
            "model_mismatch",
            ["text_encoder ", "text_encoder/config.json: x."],
        ),
        (lambda s: s.pop("model.diffusion_model.img_in.bias"), "model_mismatch", ["missing x_embedder.bias"]),
    ],
)
def test_an_all_in_one_file_is_opened_whole_or_not_at_all(state, pipe, teacher, tmp_path, change, code, facts) -> None:
    found = all_in_one(state, pipe)
    change(found)
    save_file(found, tmp_path / "one.safetensors")
    with raises(code, *facts):
        student.load(tmp_path / "one.safetensors", teacher, device="cpu")


def scaled(state: dict[str, torch.Tensor], new: bool, rows: bool = False) -> tuple[dict[str, torch.Tensor], Any]:
    """A state in scaled fp8 in ComfyUI's older or newer keys, and what it stands for."""
    out: dict[str, torch.Tensor] = {} if new else {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    meant = dict(state)
    for key, value in state.items():
        layer = key.removesuffix(".weight")
        if not key.endswith("weight") or value.ndim != 2:
            out[key] = value
            continue
        scale = value.abs().amax(1, keepdim=True) / 448 if rows else value.abs().max() / 448
        out[key] = (value / scale).to(torch.float8_e4m3fn)
        meant[key] = out[key].float() * scale
        out[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale.squeeze()
        out[f"{layer}.{'input_scale' if new else 'scale_input'}"] = torch.tensor(1.0)
        if new:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return {key: value.contiguous() for key, value in out.items()}, meant


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("new", "rows"), [(False, False), (True, False), (True, True)])
def test_scaled_fp8_is_multiplied_by_its_scales(state, teacher, tmp_path, prefix, new, rows) -> None:
    stored, meant = scaled(original_keys(state), new, rows)
    save_file({(k if k == "scaled_fp8" else prefix + k): v for k, v in stored.items()}, tmp_path / "fp8.sft")
    loaded = student.load(tmp_path / "fp8.sft", teacher, device="cpu")
    got = original_keys(loaded.transformer.state_dict())
    assert got.keys() == meant.keys()
    for key, value in meant.items():
        assert torch.equal(got[key], value), key
    done = convert(tmp_path / "fp8.sft", tmp_path / "plain.safetensors", "original", base=teacher)
    assert done["equality"] == "function"
    assert torch.equal(load_file(tmp_path / "plain.safetensors")["img_in.weight"], meant["img_in.weight"])


@pytest.mark.parametrize(
    ("key", "value", "code", "facts"),
    [
        (
            "txt_in.comfy_quant",
            torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
            "model_quantized",
            ["nvfp4", "txt_in.comfy_quant"],
        ),
        ("txt_in.scale_weight", torch.ones(3, 3), "model_unsupported", ["txt_in.weight", "(3, 3)"]),
        ("nowhere.scale_weight", torch.ones(()), "weights_damaged", ["nowhere.scale_weight"]),
        ("txt_in.weight.absmax", torch.ones(3), "model_quantized", ["bitsandbytes"]),
        ("double_blocks.0.img_attn.qkv.wscales", torch.ones(3), "model_quantized", ["nunchaku"]),
    ],
)
def test_other_quantized_files_say_what_they_are(state, teacher, tmp_path, key, value, code, facts) -> None:
    save_file({**original_keys(state), key: value}, tmp_path / "odd.safetensors")
    with raises(code, *facts):
        student.load(tmp_path / "odd.safetensors", teacher, device="cpu")


def test_sft_is_a_safetensors_file(state, pipe, teacher, tmp_path) -> None:
    save_file(state, tmp_path / "student.sft")
    same(student.load(tmp_path / "student.sft", teacher, device="cpu"), pipe)
    name = "transformer.proj_out"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(16, 1)}, tmp_path / "l.sft"
    )
    loaded = student.load(tmp_path / "student.sft", teacher, device="cpu", lora=tmp_path / "l.sft", fuse=True)
    assert torch.allclose(loaded.transformer.proj_out.weight, state["proj_out.weight"] + 1)
