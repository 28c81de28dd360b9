"""Widen, fold, unfold: exact, and strict about keys."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import UserError
from diptych.student.weights import files, fold
from diptych.student.weights.convert import convert
from layouts import read_state, read_student
from raising import raises

GOLDEN = Path(__file__).parents[1] / "fixtures" / "release_golden"
RELEASED = GOLDEN / "dsd_model" / "transformer"


@st.composite
def configs(draw):
    head, axes = draw(st.sampled_from([(8, (2, 2, 4)), (16, (4, 6, 6))]))
    return {
        "in_channels": draw(st.sampled_from([4, 16, 32])),
        "num_layers": draw(st.integers(0, 2)),
        "num_single_layers": draw(st.integers(0, 2)),
        "attention_head_dim": head,
        "num_attention_heads": draw(st.integers(1, 3)),
        "joint_attention_dim": draw(st.integers(4, 20)),
        "pooled_projection_dim": draw(st.integers(4, 20)),
        "guidance_embeds": draw(st.booleans()),
        "axes_dims_rope": axes,
    }


def inputs(config, seed, rows=2, columns=4):
    torch.manual_seed(seed)
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    rest = {
        "encoder_hidden_states": torch.randn(2, 3, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"]),
        "timestep": torch.rand(2),
        "img_ids": ids,
        "txt_ids": torch.zeros(3, 3),
        "guidance": torch.full((2,), 3.5) if config["guidance_embeds"] else None,
        "return_dict": False,
    }
    x, c = torch.randn(2, 2, rows * columns, config["in_channels"])
    return x, c, rest


class TwoLinear(torch.nn.Module):
    """The release's input, literally: x_embedder(x) + c_embedder(c)."""

    def __init__(self, x_embedder, channels, c):
        super().__init__()
        self.x_embedder, self.c = x_embedder, c
        self.c_embedder = torch.nn.Linear(channels, x_embedder.out_features)

    def forward(self, x):
        return self.x_embedder(x) + self.c_embedder(self.c)


@settings(max_examples=15, deadline=None)
@given(configs(), st.integers(0, 2**31))
def test_folded_model_equals_the_two_linear_form(config, seed):
    torch.manual_seed(seed)
    model: Any = FluxTransformer2DModel(**config).eval()
    x, c, rest = inputs(config, seed + 1)
    released = dict(model.state_dict())
    model.x_embedder = TwoLinear(model.x_embedder, config["in_channels"], c)
    released["c_embedder.weight"] = model.x_embedder.c_embedder.weight.detach()
    released["c_embedder.bias"] = model.x_embedder.c_embedder.bias.detach()
    folded = fold.fold(released, config)
    student: Any = fold.build(folded.config, folded.state_dict)
    with torch.no_grad():
        torch.testing.assert_close(student(torch.cat([x, c], 2), **rest)[0], model(x, **rest)[0], rtol=1e-5, atol=1e-5)
    assert student.config.in_channels == 2 * config["in_channels"]
    assert student.config.out_channels == config["in_channels"]
    back, back_config = fold.unfold(folded.state_dict, folded.config, folded.split)
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in released)
    assert {k: v for k, v in back_config.items() if not k.startswith("_")} == config


@settings(max_examples=10, deadline=None)
@given(configs(), st.integers(0, 2**31))
def test_widened_model_computes_the_teacher_whatever_the_condition(config, seed):
    torch.manual_seed(seed)
    teacher = FluxTransformer2DModel(**config).eval()
    student = fold.widen(teacher)
    x, c, rest = inputs(config, seed + 1)
    with torch.no_grad():
        expected = teacher(x, **rest)[0]
        for condition in (c, 100 * c, torch.zeros_like(c)):
            got = student(torch.cat([x, condition], 2), **rest)[0]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert student.x_embedder.weight.device.type == "cpu"
    assert student.proj_out.weight.data_ptr() == teacher.proj_out.weight.data_ptr()  # shared, not copied
    assert all(p.requires_grad for p in student.parameters())


def test_widening_twice_is_refused():
    model = FluxTransformer2DModel(in_channels=8, num_layers=0, num_single_layers=1, num_attention_heads=1,
                                   attention_head_dim=8, axes_dims_rope=(2, 2, 4))  # fmt: skip
    with raises("model_unsupported", "16", "8"):
        fold.widen(fold.widen(model))


def test_released_to_folded_to_released_is_bit_equal_on_disk(tmp_path):
    done = convert(RELEASED, tmp_path / "folded", "folded")
    convert(tmp_path / "folded", tmp_path / "out", "released")
    released = tmp_path / "out" / "transformer"
    before, after = read_state(RELEASED), read_state(released)
    dropped = before.keys() - after.keys()
    assert len(dropped) == done["ignored_adapter_tensors"] == 50 and all(".default." in key for key in dropped)
    assert all(torch.equal(before[key], after[key]) for key in after)
    # Stock diffusers opens the folder, sidecar and all.
    FluxTransformer2DModel.from_pretrained(tmp_path / "folded" / "transformer")
    first, second = (json.loads((p / "config.json").read_text()) for p in (RELEASED, released))
    assert {**first, "_diffusers_version": ""} == {**second, "_diffusers_version": ""}


def test_unfolding_a_trained_bias_ignores_the_old_split(tmp_path):
    folded = fold.fold(read_state(RELEASED), files.read_config(RELEASED))
    folded.state_dict["x_embedder.bias"] = folded.state_dict["x_embedder.bias"] + 1
    state, _ = fold.unfold(folded.state_dict, folded.config, folded.split)
    assert torch.equal(state["x_embedder.bias"] + state["c_embedder.bias"], folded.state_dict["x_embedder.bias"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update({"mystery.weight": torch.zeros(1)}), "unexpected mystery.weight"),
        (lambda s: s.update({"nowhere.to_k.lora_A.default.weight": torch.zeros(1)}), "nowhere.to_k.lora_A"),
        (lambda s: s.pop("proj_out.bias"), "missing proj_out.bias"),
        (lambda s: s.pop("c_embedder.bias"), "missing c_embedder.bias"),
        (lambda s: s.update({"c_embedder.weight": torch.zeros(64, 3)}), "c_embedder.weight is (64, 3)"),
    ],
)
def test_keys_that_do_not_match_are_refused_by_name(change, named):
    state = read_state(RELEASED)
    change(state)
    with raises("model_mismatch", named):
        fold.fold(state, files.read_config(RELEASED))


def test_a_plain_teacher_is_no_student(teacher):
    from diptych import student

    with raises("model_unsupported", teacher):
        student.load(teacher, device="cpu")


def test_a_missing_shard_and_a_broken_index_are_named(tmp_path):
    state = read_state(RELEASED)
    (tmp_path / "config.json").write_text((RELEASED / "config.json").read_text())
    index = {"weight_map": dict.fromkeys(state, "part-1.safetensors")}
    (tmp_path / f"{files.WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    with raises("model_incomplete", "part-1.safetensors"):
        read_student(tmp_path)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "part-1.safetensors")
    assert read_student(tmp_path).config["in_channels"] == 128
    save_file({k: v for k, v in state.items() if k != "proj_out.bias"}, tmp_path / "part-1.safetensors")
    with raises("model_incomplete", "proj_out.bias"):
        read_student(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_layers": 10_000_000},
        {"num_single_layers": 10_000_000},
        {"num_layers": -1},
        {"attention_head_dim": 10**15},
        {"joint_attention_dim": -4},
        {"num_layers": "many"},
    ],
)
def test_an_absurd_config_is_refused_before_a_model_is_built(changed: dict[str, Any], tmp_path: Path) -> None:
    config, state = files.read_config(RELEASED), files.open_state(RELEASED)
    before = time.monotonic()
    with pytest.raises(UserError) as caught:
        files.fold_stored(state, config | changed, None, "here")
    folded = files.fold_stored(state, config, None, "here")
    with pytest.raises(UserError):
        files.fold_stored(folded.state_dict, folded.config | changed, None, "here")
    assert time.monotonic() - before < 5 and "\n" not in str(caught.value)
    if changed != {"num_layers": -1}:
        with pytest.raises(UserError):
            fold.shapes_of(fold.stock_config(config) | changed)


def test_the_pipeline_s_own_door_refuses_it_too(tmp_path: Path) -> None:
    from diptych.student.pipeline import DiptychPipeline

    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"num_layers": 10_000_000}))
    with pytest.raises(UserError, match="num_layers"):
        DiptychPipeline.from_pretrained(tmp_path)
