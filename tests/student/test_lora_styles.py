"""LoRA files in every prefix, name and part that programs write: made from one known change, applied, and compared.

What is compared is what the layers of a loaded student compute, with each file beside the weights and fused into them.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diptych import student
from diptych.student.weights.lora import apply_lora
from diptych.student.weights.lora_file import read_lora
from layouts import dora
from raising import raises

State = dict[str, torch.Tensor]
RANK, ALPHA = 2, 3.0
CLOSE: Any = {"rtol": 0, "atol": 2e-5}
DOUBLE = "double_blocks.0", "transformer_blocks.0"
SINGLE = "single_blocks.0", "single_transformer_blocks.0"
# Black Forest Labs' layers, and diffusers' in the order of their rows.
LAYERS = {
    f"{DOUBLE[0]}.img_attn.qkv": [f"{DOUBLE[1]}.attn.to_{x}" for x in "qkv"],
    f"{DOUBLE[0]}.txt_attn.qkv": [f"{DOUBLE[1]}.attn.add_{x}_proj" for x in "qkv"],
    f"{DOUBLE[0]}.img_mlp.0": [f"{DOUBLE[1]}.ff.net.0.proj"],
    f"{DOUBLE[0]}.txt_mod.lin": [f"{DOUBLE[1]}.norm1_context.linear"],
    f"{SINGLE[0]}.linear1": [*(f"{SINGLE[1]}.attn.to_{x}" for x in "qkv"), f"{SINGLE[1]}.proj_mlp"],
    f"{SINGLE[0]}.linear2": [f"{SINGLE[1]}.proj_out"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "guidance_in.in_layer": [],  # this transformer has none
    "img_in": ["x_embedder"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
}
CLIP = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc2"]
T5 = ["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wo"]
DOTTED = ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
DOTTED += ("transformer.base_model.model.", "base_model.model.transformer.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
CLIP_PREFIXES = ("text_encoder.text_model.", "text_encoder.", "lora_te_text_model_", "lora_te1_text_model_")
CLIP_PREFIXES += ("text_encoders.clip_l.transformer.text_model.", "base_model.model.text_model.")
T5_PREFIXES = ("text_encoder_2.", "lora_te2_", "lora_te3_", "lora_te_", "text_encoders.t5xxl.transformer.")
PARTS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.default_0.weight", "lora_B.default_0.weight"),
    ("lora_A", "lora_B"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]
MAGNITUDES = ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


@pytest.fixture(scope="module")
def loaded(student_folder: Path, teacher: Path) -> Any:
    return student.load(student_folder, teacher, device="cpu")


@pytest.fixture(scope="module")
def known(loaded: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A, B and the DoRA magnitudes of each layer in Black Forest Labs' names; rows as they have them."""
    made = {}
    for seed, (name, ours) in enumerate((n, o) for n, o in LAYERS.items() if o):
        modules = [loaded.transformer.get_submodule(layer) for layer in ours]
        rows, width = sum(m.out_features for m in modules), modules[0].in_features
        made[name] = random(seed, RANK, width), random(50 + seed, rows, RANK), random(90 + seed, rows).abs() + 0.1
    return made


def effective(module: torch.nn.Module) -> torch.Tensor:
    """The weight that a layer computes with, adapters and all: the outputs for each unit vector."""
    with torch.no_grad():
        eye = torch.eye(module.in_features)  # pyright: ignore
        return (module(eye) - module(torch.zeros_like(eye))).T


def effective_all(pipe: Any) -> State:
    names = [layer for ours in LAYERS.values() for layer in ours]
    state = {f"transformer.{name}": effective(pipe.transformer.get_submodule(name)) for name in names}
    state |= {f"text_encoder.{name}": effective(pipe.text_encoder.get_submodule(name)) for name in CLIP}
    return state | {f"text_encoder_2.{name}": effective(pipe.text_encoder_2.get_submodule(name)) for name in T5}


def halves(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def wanted(known: Any, start: State, with_dora: bool, scale: float = 1.0, alpha: float = RANK) -> State:
    """The weights that must come out, by the definition."""
    out = {}
    for name, (a, b, m) in known.items():
        b, m = (halves(b), halves(m)) if "adaLN" in name else (b, m)
        row = 0
        for layer in LAYERS[name]:
            weight = start[f"transformer.{layer}"]
            rows = slice(row, row := row + len(weight))
            added = scale * alpha / RANK * b[rows] @ a
            out[layer] = dora(weight, added, m[rows, None]) if with_dora else weight + added
    return {f"transformer.{layer}": weight for layer, weight in out.items()}


def as_file(known: Any, prefix: str, names: str, parts: tuple[str, str], alpha: bool, magnitude: str = "") -> State:
    """The same change in a style."""
    state: State = {}

    def put(layer: str, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> None:
        layer = layer.replace(".", "_") if prefix in FLAT else layer
        state[f"{prefix}{layer}.{parts[0]}"], state[f"{prefix}{layer}.{parts[1]}"] = a, b.contiguous()
        if alpha:
            state[f"{prefix}{layer}.alpha"] = torch.tensor(ALPHA)
        if magnitude:
            state[f"{prefix}{layer}.{magnitude}"] = m[:, None] if magnitude == "dora_scale" else m

    for name, (a, b, m) in known.items():
        if names == "original":
            put(name, a, b, m)
            continue
        b, m = (halves(b), halves(m)) if "adaLN" in name else (b, m)
        parts_of = b.split([RANK_ROWS[layer] for layer in LAYERS[name]]), m.split([RANK_ROWS[x] for x in LAYERS[name]])
        for layer, rows, own in zip(LAYERS[name], *parts_of, strict=True):
            put(layer, a.clone(), rows, own.contiguous())
    return state


RANK_ROWS: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def _rows(loaded: Any) -> None:
    for ours in LAYERS.values():
        RANK_ROWS.update({layer: loaded.transformer.get_submodule(layer).out_features for layer in ours})


@pytest.fixture(scope="module")
def start(loaded: Any) -> State:
    return effective_all(loaded)


@pytest.fixture
def pipe(loaded: Any, start: State):
    """The shared student, as it was before and after."""
    yield loaded
    loaded.unload_lora_weights()
    for key, weight in effective_all(loaded).items():
        assert torch.equal(weight, start[key]), key


def check(pipe: Any, start: State, changed: State) -> None:
    for key, weight in effective_all(pipe).items():
        torch.testing.assert_close(weight, changed.get(key, start[key]), **CLOSE, msg=key)


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", [*DOTTED, *FLAT])
def test_every_prefix_name_and_part_gives_the_same_change(known, loaded, start, tmp_path, prefix, names) -> None:
    ways = [*((*way, "") for way in product(PARTS, (True, False))), *((PARTS[0], True, m) for m in MAGNITUDES)]
    for parts, alpha, magnitude in ways:
        path = tmp_path / "lora.safetensors"
        save_file(as_file(known, prefix, names, parts, alpha, magnitude), path)
        changed = wanted(known, start, bool(magnitude), alpha=ALPHA if alpha else RANK)
        found = read_lora(path)
        assert found.keys() == changed.keys()
        for key, weight in changed.items():
            got = start[key] + found[key].change(start[key])
            torch.testing.assert_close(got, weight, **CLOSE, msg=f"{prefix} {names} {parts} {alpha} {magnitude} {key}")


@pytest.mark.parametrize(("prefix", "names"), [("transformer.", "diffusers"), ("lora_unet_", "original")])
@pytest.mark.parametrize("magnitude", ["", "dora_scale", "lora_magnitude_vector"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_file_changes_the_loaded_student_by_exactly_that(
    known, pipe, start, tmp_path, prefix, names, magnitude, scale
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(as_file(known, prefix, names, PARTS[4], True, magnitude), path)
    apply_lora(pipe, path, scale)
    check(pipe, start, wanted(known, start, bool(magnitude), scale, ALPHA))
    pipe.set_adapters(["lora"], [0.25])
    check(pipe, start, wanted(known, start, bool(magnitude), 0.25, ALPHA))


def test_onetrainers_newer_names_are_of_the_parts_of_a_layer(known, loaded, start, tmp_path) -> None:
    state: State = {}
    for name, (a, b, _) in known.items():
        row = 0
        for i, layer in enumerate(LAYERS[name]):
            part = f"{name}.{i}" if len(LAYERS[name]) > 1 else "img_in.proj" if name == "img_in" else name
            rows = b[row : (row := row + RANK_ROWS[layer])]
            state |= {
                f"transformer.{part}.lora_down.weight": a.clone(),
                f"transformer.{part}.lora_up.weight": rows.clone(),
            }
    state |= adapter(f"clip_l.text_model.{CLIP[0]}", loaded.text_encoder.get_submodule(CLIP[0]), 1, PARTS[4])
    state |= adapter(f"t5.{T5[0]}", loaded.text_encoder_2.get_submodule(T5[0]), 1, PARTS[4])
    save_file(state, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors")
    changed = wanted(known, start, False)
    assert found.keys() == {*changed, f"text_encoder.{CLIP[0]}", f"text_encoder_2.{T5[0]}"}
    for key, weight in changed.items():
        torch.testing.assert_close(start[key] + found[key].change(start[key]), weight, **CLOSE, msg=key)


def test_xlabs_names_the_projections_by_their_processor(known, pipe, start, tmp_path) -> None:
    """Of a single block it adapts the rows of q, k and v alone."""
    state: State = {}
    for name, theirs in {
        "double_blocks.0.img_attn.qkv": "double_blocks.0.processor.qkv_lora1",
        "double_blocks.0.txt_attn.qkv": "double_blocks.0.processor.qkv_lora2",
        "single_blocks.0.linear1": "single_blocks.0.processor.qkv_lora",
        "single_blocks.0.linear2": "single_blocks.0.processor.proj_lora",
    }.items():
        a, b, _ = known[name]
        b = b[: 3 * 32] if "qkv" in theirs else b
        state |= {f"{theirs}.down.weight": a, f"{theirs}.up.weight": b}
    save_file(state, tmp_path / "lora.safetensors")
    apply_lora(pipe, tmp_path / "lora.safetensors")
    adapted = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.0.proj_out")
    changed = {
        k: w for k, w in wanted(known, start, False).items() if k.removeprefix("transformer.").startswith(adapted)
    }
    check(pipe, start, changed)


def adapter(name: str, module: torch.nn.Module, seed: int, parts: tuple[str, str] = PARTS[0]) -> State:
    rows, width = module.out_features, module.in_features
    return {f"{name}.{parts[0]}": random(seed, RANK, width), f"{name}.{parts[1]}": random(seed + 1, rows, RANK)}  # pyright: ignore


@pytest.mark.parametrize(
    ("clip", "t5"), [*((p, T5_PREFIXES[0]) for p in CLIP_PREFIXES), *(("", p) for p in T5_PREFIXES)]
)
@pytest.mark.parametrize("parts", [PARTS[0], PARTS[4]], ids=["lora_A", "lora_down"])
def test_text_encoders_are_adapted_beside_the_transformer(pipe, start, tmp_path, clip, t5, parts) -> None:
    """Also where the file mixes the styles of its parts, as files that were merged do."""
    layers = {"transformer.proj_out": "lora_unet_final_layer_linear"}
    layers |= {f"text_encoder.{x}": clip + (x.replace(".", "_") if clip.startswith("lora_te") else x) for x in CLIP}
    layers |= {f"text_encoder_2.{x}": t5 + (x.replace(".", "_") if t5.startswith("lora_te") else x) for x in T5}
    state, changed = {}, {}
    for seed, (ours, theirs) in enumerate(layers.items()):
        component, _, name = ours.partition(".")
        state |= adapter(theirs, getattr(pipe, component).get_submodule(name), 10 * seed, parts)
        changed[ours] = start[ours] + state[f"{theirs}.{parts[1]}"] @ state[f"{theirs}.{parts[0]}"]
    save_file(state, tmp_path / "lora.safetensors")
    apply_lora(pipe, tmp_path / "lora.safetensors")
    check(pipe, start, changed)


def test_fusing_keeps_every_component_and_every_scale(known, student_folder, teacher, start, tmp_path) -> None:
    """A plain LoRA, two DoRAs and a rank-stabilized one, each at its scale: beside the weights and in them, in any
    order, the weights are W plus what each of them adds alone."""
    clip, t5 = f"text_encoder.{CLIP[0]}", f"text_encoder_2.{T5[0]}"
    texts = {x: adapter(x, torch.nn.Linear(start[x].shape[1], start[x].shape[0]), 7) for x in (clip, t5)}
    files: dict[str, tuple[State, dict[str, str]]] = {
        "plain": (as_file(known, "lora_unet_", "original", PARTS[4], True), {}),
        "dora": (as_file(known, "transformer.", "diffusers", PARTS[0], False, "lora_magnitude_vector"), {}),
        "other": (as_file(known, "lora_transformer_", "diffusers", PARTS[4], True, "dora_scale"), {}),
        "stable": ({**as_file(known, "transformer.", "diffusers", PARTS[0], False), **texts[clip], **texts[t5]}, {}),
    }
    settings = {"r": RANK, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"^proj_out": 6}}
    said = {f"{part}.{k}": v for part in ("transformer", "text_encoder", "text_encoder_2") for k, v in settings.items()}
    files["stable"] = files["stable"][0], {"lora_adapter_metadata": json.dumps(said)}
    scales = {"plain": 0.7, "dora": 0.5, "other": 1.3, "stable": 0.9}
    for name, (state, header) in files.items():
        save_file(state, tmp_path / f"{name}.safetensors", metadata=header)

    changed = dict(start)
    each = {
        "plain": wanted(known, start, False, 0.7, ALPHA),
        "dora": wanted(known, start, True, 0.5),
        "other": wanted(known, start, True, 1.3, ALPHA),
    }
    for weights in each.values():
        changed |= {key: changed[key] + weight - start[key] for key, weight in weights.items()}
    for key, weight in wanted(known, start, False, 0.9, RANK).items():
        alpha = 6 if key == "transformer.proj_out" else 4
        changed[key] = changed[key] + (weight - start[key]) * alpha / RANK**0.5
    for key, state in texts.items():
        added = state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
        changed[key] = start[key] + 0.9 * 4 / RANK**0.5 * added

    for order, fuse in ((list(files), False), (list(files), True), (list(files)[::-1], True)):
        lora = [(tmp_path / f"{name}.safetensors", scales[name]) for name in order]
        pipe = student.load(student_folder, teacher, device="cpu", lora=lora, fuse=fuse)
        check(pipe, start, changed)
    assert not any(hasattr(x, "base_layer") for x in [*pipe.transformer.modules(), *pipe.text_encoder.modules()])  # pyright: ignore


def test_magnitudes_of_columns_are_a_dora_too(known, pipe, start, tmp_path) -> None:
    """LyCORIS and OneTrainer, unless configured to decompose the output."""
    names = ["transformer_blocks.0.ff.net.0.proj", "proj_out"]
    state, changed = {}, {}
    for seed, name in enumerate(names):
        module = pipe.transformer.get_submodule(name)
        flat = f"lora_transformer_{name.replace('.', '_')}"
        state |= adapter(flat, module, seed, PARTS[4])
        state[f"{flat}.dora_scale"] = random(seed + 9, 1, module.in_features).abs()
        added = state[f"{flat}.lora_up.weight"] @ state[f"{flat}.lora_down.weight"]
        changed[f"transformer.{name}"] = dora(start[f"transformer.{name}"], added, state[f"{flat}.dora_scale"])
    save_file(state, tmp_path / "lora.safetensors")
    apply_lora(pipe, tmp_path / "lora.safetensors")
    check(pipe, start, changed)


def test_a_dora_on_the_released_input_layer_acts_on_the_noisy_half_only(pipe, start, tmp_path) -> None:
    name = "transformer.x_embedder"
    a, b, m = random(1, RANK, 16), random(2, 32, RANK), random(3, 32).abs()
    state = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_magnitude_vector": m}
    save_file(state, tmp_path / "lora.safetensors")
    apply_lora(pipe, tmp_path / "lora.safetensors")
    half = dora(start[name][:, :16], b @ a, m[:, None])
    check(pipe, start, {name: torch.cat([half, start[name][:, 16:]], dim=1)})


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_what_peft_saves_is_what_peft_computes(student_folder, pipe, start, tmp_path, settings) -> None:
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model

    model = FluxTransformer2DModel.from_pretrained(student_folder / "transformer")
    patterns: Any = {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"proj_mlp": 7}}
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["to_q", "proj_mlp"], **patterns, **settings)
    theirs: Any = get_peft_model(model, config)  # pyright: ignore
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key or "magnitude" in key:
                parameter.copy_(torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    merged = theirs.merge_and_unload()
    apply_lora(pipe, tmp_path / "adapter")
    names = [key.removeprefix("transformer.") for key in start if key.startswith("transformer.")]
    changed = {f"transformer.{name}": merged.get_submodule(name).weight.detach() for name in names}
    assert any(not torch.equal(weight, start[key]) for key, weight in changed.items())
    check(pipe, start, changed)


@pytest.mark.parametrize(
    ("key", "code", "facts"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "lora_mismatch", ["1 keys"]),  # of SDXL
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "lora_mismatch", ["1 keys"]),
        ("transformer.proj_out.lora_A.weight.extra", "lora_mismatch", ["1 keys"]),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "lora_mismatch", ["1 keys"]),
        ("bundle_emb.cat.t5xxl", "lora_unsupported", ["OneTrainer", "embeddings"]),
        ("lora_transformer_proj_out.hada_w1_a", "lora_unsupported", ["LoHa", "merge"]),
        ("transformer.proj_out.lokr_w1", "lora_unsupported", ["LoKr", "merge"]),
        ("lora_unet_final_layer_linear.oft_blocks", "lora_unsupported", ["OFT", "merge"]),
        ("transformer.proj_out.lora_mid.weight", "lora_unsupported", ["Tucker"]),
        ("diffusion_model.final_layer.linear.diff", "lora_unsupported", ["whole weights"]),
        ("diffusion_model.proj_out.lora_A.weight", "lora_unsupported", ["twice"]),
        ("transformer.proj_out.lora_A.other.weight", "lora_unsupported", ["twice"]),
        ("final_layer.linear.lora_up.weight", "lora_unsupported", ["twice"]),
        ("transformer.proj_out.dora_scale", "weights_damaged", ["(5, 3)"]),
        ("transformer.proj_out.alpha", "weights_damaged", ["(5, 3)"]),
        ("transformer.proj_out.diff_b", "weights_damaged", ["(5, 3)"]),
        ("transformer.proj_out.lora_B.bias", "weights_damaged", ["(5, 3)"]),
    ],
)
def test_every_key_is_applied_or_refused_by_its_name(pipe, tmp_path, key, code, facts) -> None:
    state = adapter("transformer.proj_out", pipe.transformer.proj_out, 3)
    save_file({**state, key: torch.zeros(5, 3)}, tmp_path / "lora.safetensors")
    with raises(code, key, *facts):
        apply_lora(pipe, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("said", "code", "facts"),
    [
        ({"r": RANK, "lora_alpha": 2, "use_dora": True}, "weights_damaged", ["use_dora", "proj_out"]),
        ({"r": RANK, "lora_alpha": 2, "init_lora_weights": "pissa"}, "lora_unsupported", ["init_lora_weights=pissa"]),
        ({"r": RANK, "lora_alpha": 2, "peft_type": "LOHA"}, "lora_unsupported", ["peft_type=LOHA"]),
        ({"r": RANK, "lora_alpha": 9}, "file_damaged", ["2 in its tensors", "9 in its settings"]),
    ],
)
def test_settings_that_the_tensors_do_not_bear_out_are_refused(pipe, tmp_path, said, code, facts) -> None:
    state = {
        **adapter("transformer.proj_out", pipe.transformer.proj_out, 3),
        "transformer.proj_out.alpha": torch.tensor(2),
    }
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in said.items()})}
    save_file(state, tmp_path / "lora.safetensors", metadata=header)
    with raises(code, *facts):
        apply_lora(pipe, tmp_path / "lora.safetensors")


def test_a_lora_for_a_text_encoder_that_is_absent_is_refused(student_folder, teacher, tmp_path) -> None:
    pipe: Any = student.load(student_folder, teacher, device="cpu")
    save_file(
        adapter("lora_te1_text_model_encoder_layers_0_mlp_fc1", torch.nn.Linear(20, 32), 1), tmp_path / "l.safetensors"
    )
    pipe.text_encoder = None
    with raises("lora_mismatch", "text_encoder"):
        apply_lora(pipe, tmp_path / "l.safetensors")


def test_a_text_encoders_lora_must_be_fused_before_saving(pipe, tmp_path) -> None:
    name = f"text_encoder.{CLIP[0]}"
    save_file(adapter(name, pipe.text_encoder.get_submodule(CLIP[0]), 1), tmp_path / "lora.safetensors")
    apply_lora(pipe, tmp_path / "lora.safetensors")
    with raises("lora_unsupported"):
        student.save(pipe, tmp_path / "saved")
