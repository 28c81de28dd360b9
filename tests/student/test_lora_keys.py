"""LoRA in three styles of keys: the same weight update in all, and keys without a layer are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.cli import app
from diptych.student.weights import original
from diptych.student.weights.convert import convert
from diptych.student.weights.fold import shapes_of
from diptych.student.weights.lora_delta import Delta, as_lora
from diptych.student.weights.lora_file import lora_deltas, read_deltas
from diptych.student.weights.tensors import held, open_safetensors, write_safetensors
from raising import raises
from student.conftest import TINY

WIDE = {**TINY, "in_channels": 32, "out_channels": 16}
CLOSE: Any = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return shapes_of(WIDE)


@pytest.fixture(scope="module")
def deltas(shapes: dict[str, tuple[int, ...]]) -> dict[str, Delta]:
    """Every linear layer of a widened transformer, each with its own A; one part of a fused layer is left out."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 4

    left_out = "single_transformer_blocks.0.attn.to_k"
    layers = [k.removesuffix(".weight") for k, shape in shapes.items() if k.endswith(".weight") and len(shape) == 2]
    made = {x: Delta(random(3, shapes[f"{x}.weight"][1]), random(shapes[f"{x}.weight"][0], 3)) for x in layers}
    del made[left_out]
    out, width = shapes["x_embedder.weight"]
    made["x_embedder"] = Delta(torch.eye(width), random(out, width), random(out))
    made["norm_out.linear"] = Delta(random(2, out), random(2 * out, 2), random(2 * out))
    return made


@pytest.fixture(scope="module")
def diffusers_file(deltas: dict[str, Delta], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_safetensors(path, *as_lora(deltas))
    return path


def same(path: Path, deltas: dict[str, Delta], shapes: dict[str, tuple[int, ...]]) -> None:
    found = read_deltas(path, shapes)
    for name, wanted in deltas.items():
        torch.testing.assert_close(found[name].weight(), wanted.weight(), **CLOSE, msg=name)
        if wanted.bias is not None:
            assert found[name].bias is not None
            torch.testing.assert_close(found[name].bias, wanted.bias, **CLOSE, msg=name)
    for name in found.keys() - deltas.keys():  # the rows of a fused layer that had nothing to add
        assert not found[name].weight().any() and name == "single_transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize("way", [("comfyui",), ("kohya",), ("comfyui", "kohya"), ("kohya", "comfyui")], ids="-".join)
def test_the_weight_update_survives_every_way_through_the_styles(way, diffusers_file, deltas, shapes, tmp_path) -> None:
    before = diffusers_file
    for number, style in enumerate((*way, "diffusers")):
        out = tmp_path / f"{number}-{style}.safetensors"
        done = convert(before, out, f"lora-{style}")
        assert (done["source"], done["equality"]) == ("control-lora", "function")
        same(out, deltas, shapes)
        before = out


def test_the_keys_are_those_that_each_program_looks_for(diffusers_file, tmp_path) -> None:
    convert(diffusers_file, tmp_path / "c.safetensors", "lora-comfyui")
    convert(diffusers_file, tmp_path / "k.safetensors", "lora-kohya")
    comfyui, kohya = (load_file(tmp_path / f"{x}.safetensors") for x in "ck")
    qkv = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert comfyui[f"{qkv}.lora_A.weight"].shape == (9, 32) and comfyui[f"{qkv}.lora_B.weight"].shape == (96, 9)
    # What ComfyUI widens the input layer by, and adds to its bias.
    assert comfyui["diffusion_model.img_in.reshape_weight"].tolist() == [32, 32]
    assert comfyui["diffusion_model.img_in.diff_b"].shape == (32,)
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (9, 32)
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 9
    assert kohya["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (32 * 7, 9)
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in kohya)
    spec = open_safetensors(tmp_path / "k.safetensors")[1]
    assert spec["modelspec.architecture"] == "flux-1/lora" and spec["modelspec.title"] == "k"
    assert spec["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"


def test_diffusers_own_reader_finds_the_same_in_kohyas_keys(deltas, tmp_path) -> None:
    """Of the layers whose widths it does not fix at FLUX's own."""
    from diffusers import FluxControlPipeline

    double = {name: delta for name, delta in deltas.items() if name.startswith("transformer_blocks.0.")}
    write_safetensors(tmp_path / "d.safetensors", *as_lora(double))
    convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "lora-kohya")
    found: Any = FluxControlPipeline.lora_state_dict(load_file(tmp_path / "k.safetensors"))
    for name, delta in double.items():
        got = found[f"transformer.{name}.lora_B.weight"] @ found[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(got, delta.weight(), rtol=0, atol=1e-5, msg=name)


def test_what_kohya_trained_keeps_its_rank_and_its_alpha(shapes, tmp_path) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(96, 4, generator=generator)
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    state = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "theirs.safetensors")
    found = read_deltas(tmp_path / "theirs.safetensors", shapes)
    for i, part in enumerate(("q", "k", "v")):
        got = found[f"transformer_blocks.0.attn.add_{part}_proj"].weight()
        torch.testing.assert_close(got, b[32 * i : 32 * i + 32] @ a / 4, rtol=1e-5, atol=1e-6)
    convert(tmp_path / "theirs.safetensors", tmp_path / "d.safetensors", "lora-diffusers")
    convert(tmp_path / "d.safetensors", tmp_path / "back.safetensors", "lora-kohya")
    back = load_file(tmp_path / "back.safetensors")
    assert back[f"{name}.lora_down.weight"].shape == (4, 32)  # the three share their A
    got = back[f"{name}.lora_up.weight"] @ back[f"{name}.lora_down.weight"] * back[f"{name}.alpha"] / 4
    torch.testing.assert_close(got, b @ a / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
def test_keys_without_a_layer_are_an_error_that_lists_them(style, diffusers_file, tmp_path, capsys) -> None:
    convert(diffusers_file, tmp_path / "good.safetensors", f"lora-{style}")
    prefix = {"comfyui": "diffusion_model.", "kohya": "lora_unet_"}[style]
    qkv = {"comfyui": "double_blocks.0.img_attn.qkv", "kohya": "double_blocks_0_img_attn_qkv"}[style]
    odd = {f"{prefix}{qkv}.unknown": torch.ones(1), f"{prefix}nowhere.lora_up.weight": torch.ones(2, 2)}
    save_file({**load_file(tmp_path / "good.safetensors"), **odd}, tmp_path / "bad.safetensors")
    for key in odd:
        with raises("lora_mismatch", key):
            lora_deltas(tmp_path / "bad.safetensors")
    command = ["convert", str(tmp_path / "bad.safetensors"), str(tmp_path / "o.safetensors"), "--to", "lora-diffusers"]
    assert app.call(command) == 1
    err = capsys.readouterr().err
    assert "error[lora_mismatch]" in err and "2 keys" in err
    assert not (tmp_path / "o.safetensors").exists()


def test_a_layer_that_the_model_lacks_is_named(diffusers_file, tmp_path) -> None:
    convert(diffusers_file, tmp_path / "k.safetensors", "lora-kohya")
    with raises("lora_mismatch", "transformer.single_transformer_blocks.0"):
        read_deltas(tmp_path / "k.safetensors", shapes_of({**WIDE, "num_single_layers": 0}))


def test_diffusers_keys_of_a_text_encoder_have_no_name_there(deltas, tmp_path) -> None:
    tensors, metadata = as_lora({"proj_out": deltas["proj_out"]})
    for part in "AB":
        tensors[f"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{part}.weight"] = held(torch.ones(1, 1))
    write_safetensors(tmp_path / "t.safetensors", tensors, metadata)
    with raises("lora_unsupported", "1 layers", "text_encoder.encoder.layers.0.mlp.fc1"):
        convert(tmp_path / "t.safetensors", tmp_path / "o.safetensors", "lora-comfyui")


def test_original_keys_go_there_and_back_bit_for_bit(shapes) -> None:
    state = {key: held(torch.randn(shape)) for key, shape in shapes.items()}
    back = original.from_original(original.to_original(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key].read(), state[key].read()) for key in state)


def test_an_exported_program_takes_any_number_of_tokens(student_folder, tmp_path) -> None:
    from diptych.student.settings import Settings
    from diptych.student.weights.exported import SETTINGS_FILE, TOLERANCE, inputs
    from layouts import read_student

    done = convert(student_folder, tmp_path / "student.pt2", "exported")
    assert done["bytes"] == (tmp_path / "student.pt2").stat().st_size
    beside = {SETTINGS_FILE: ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=beside).module()
    assert json.loads(beside[SETTINGS_FILE]) == Settings().values() == done["settings"]
    folded = read_student(student_folder / "transformer")
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel.from_config(folded.config)
    model.load_state_dict(folded.state_dict)
    for image, text in ((32, 7), (4, 40)):  # neither is a size that the export itself compares
        given = inputs(folded.config, image, text)
        with torch.no_grad():
            wanted = model.eval()(**given, return_dict=False)[0]
            got = program(**given, return_dict=False)[0]
        assert got.shape == (1, image, 16)
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_the_merged_file_says_what_it_is(student_folder, tmp_path) -> None:
    convert(student_folder, tmp_path / "merged.safetensors", "original")
    tensors, metadata = open_safetensors(tmp_path / "merged.safetensors")
    assert tensors["img_in.weight"].shape == (32, 32) and "double_blocks.0.img_attn.qkv.weight" in tensors
    assert metadata["modelspec.architecture"] == "flux-1/control" and json.loads(metadata["diptych"])["config"]
