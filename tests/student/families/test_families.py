"""Each family agrees with its stock pipeline: the same latents in, the same out, with h ≠ w and prompts of unequal
lengths; a reference enters where the stock pipeline has it; a batch is its rows alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tiny
from diptych.errors import UsageError
from diptych.student.families import families, family_of
from diptych.student.families.base import Family, Reference, Size, Text, pack, unpack
from raising import raises

STEPS, LENGTH = 4, 32
PROMPTS = ["a cat", "a much longer text about a dog"]


def flux1() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, clip_tokenizer = tiny.clips()
    t5, t5_tokenizer = tiny.t5()
    transformer = FluxTransformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=t5.config.d_model, pooled_projection_dim=clip.config.hidden_size,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    scheduler = tiny.scheduler(**tiny.SHIFTED)
    return FluxPipeline(scheduler, tiny.image_vae(), clip, clip_tokenizer, t5, t5_tokenizer, transformer)


def opened(make: Callable[[Path], Path], name: str) -> Callable[[Path], Any]:
    def made(folder: Path) -> Any:
        import diffusers

        return getattr(diffusers, name).from_pretrained(make(folder / name))

    return made


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "flux1": lambda _: flux1(),
    "flux2": opened(tiny.flux2_teacher, "Flux2KleinPipeline"),
    "qwen_image": opened(tiny.qwen_teacher, "QwenImagePipeline"),
    "sd3": opened(tiny.sd3_teacher, "StableDiffusion3Pipeline"),
    "z_image": lambda _: tiny.zimage(),
}


@pytest.fixture(scope="module", params=list(PIPELINES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Any]:
    torch.manual_seed(0)
    pipe = PIPELINES[request.param](tmp_path_factory.mktemp("teacher"))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    with torch.no_grad():  # away from the initial values, among which are zeros that would hide an input
        for parameter in pipe.transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if hasattr(pipe.vae, "bn"):
            pipe.vae.bn.running_mean.normal_()
            pipe.vae.bn.running_var.uniform_(0.5, 2)
        if "latents_mean" in pipe.vae.config:
            pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 1.5, 2.0, 0.7])
    return family_of(type(pipe.transformer).__name__), pipe


def noise(family: Family, pipe: Any, size: Size, rows: int = 2) -> torch.Tensor:
    pixels = torch.zeros(1, 3, *(side * family.unit(pipe.vae) for side in size))
    width = family.encode(pipe.vae, pixels).shape[-1]
    return torch.randn(rows, size.tokens, width, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def sample(family: Family, pipe: Any, text: Text, x: torch.Tensor, size: Size, **options: Any) -> torch.Tensor:
    timesteps = family.schedule(pipe.scheduler, size.tokens, STEPS, torch.device("cpu"))
    for t in timesteps:
        sigma = t.expand(len(x)).to(x.dtype) / 1000
        v = family.velocity(pipe.transformer, x, sigma, text, size, guidance=3.5, **options)
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
    return x


def stock_latents(family: Family, x: torch.Tensor, size: Size) -> torch.Tensor:
    """Noise as the stock pipeline is given it."""
    if family.name == "flux2":
        return x.transpose(1, 2).unflatten(2, size)
    return unpack(x, size) if family.name in ("sd3", "z_image") else x


def test_a_sampling_run_without_a_reference_is_the_stock_pipelines(case: tuple[Family, Any]) -> None:
    family, pipe = case
    size = Size(3, 5)
    x, unit = noise(family, pipe, size), family.unit(pipe.vae)
    options: dict[str, Any] = {"guidance_scale": 3.5} if pipe.transformer.config.get("guidance_embeds") else {}
    if family.name in ("flux2", "sd3"):
        options = {"guidance_scale": 1.0}
    if family.name == "z_image":
        options = {"guidance_scale": 0.0}
    stock = pipe(
        prompt=list(PROMPTS), height=size.rows * unit, width=size.columns * unit, num_inference_steps=STEPS,
        latents=stock_latents(family, x, size), output_type="pt", max_sequence_length=LENGTH, **options,
    ).images  # fmt: skip
    text = family.embed(pipe, PROMPTS, LENGTH)
    pixels = family.decode(pipe.vae, sample(family, pipe, text, x, size), size)
    assert stock.shape == pixels.shape == (2, 3, size.rows * unit, size.columns * unit)
    ours = (pixels.detach() / 2 + 0.5).clamp(0, 1)
    assert (ours - stock).abs().max() <= 1e-5
    assert stock.std() > 0.01  # it is no blank image that agrees


def test_a_batch_is_its_rows_alone(case: tuple[Family, Any]) -> None:
    family, pipe = case
    size = Size(2, 4)
    x = noise(family, pipe, size)
    references = []
    if "tokens" in family.conditionings:
        references = [Reference(noise(family, pipe, size) * 0.5, size)]
    both = sample(family, pipe, family.embed(pipe, PROMPTS, LENGTH), x, size, references=references)
    for row, prompt in enumerate(PROMPTS):
        own = [Reference(r.tokens[row : row + 1], r.size) for r in references if r.tokens is not None]
        text = family.embed(pipe, [prompt], LENGTH)
        alone = sample(family, pipe, text, x[row : row + 1], size, references=own)
        assert (both[row : row + 1] - alone).abs().max() <= 1e-4, row


@given(rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_packing_keeps_rows_and_columns(rows: int, columns: int) -> None:
    latents = torch.arange(2 * 3 * 4 * rows * columns, dtype=torch.float32).reshape(2, 3, 2 * rows, 2 * columns)
    tokens = pack(latents)
    assert tokens.shape == (2, rows * columns, 12) and torch.equal(unpack(tokens, Size(rows, columns)), latents)
    last = tokens[0, -1].reshape(3, 2, 2)
    assert torch.equal(last, latents[0, :, -2:, -2:])


@pytest.mark.parametrize("size", [Size(1, 3), Size(3, 1), Size(2, 2)])
def test_encoding_and_decoding_is_the_vaes_own_way_there_and_back(case: tuple[Family, Any], size: Size) -> None:
    family, pipe = case
    unit = family.unit(pipe.vae)
    pixels = torch.rand(2, 3, size.rows * unit, size.columns * unit, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        tokens = family.encode(pipe.vae, pixels)
        back = family.decode(pipe.vae, tokens, size)
        frames = pixels[:, :, None] if family.name == "qwen_image" else pixels
        direct = pipe.vae.decode(pipe.vae.encode(frames).latent_dist.mode(), return_dict=False)[0]
    assert tokens.shape[:2] == (2, size.tokens) and family.size(pipe.vae, *pixels.shape[-2:]) == size
    assert (back - direct.reshape(back.shape)).abs().max() <= 1e-5


def test_a_size_that_is_no_multiple_of_the_unit_is_refused(case: tuple[Family, Any]) -> None:
    family, pipe = case
    unit = family.unit(pipe.vae)
    with raises("size_invalid", str(unit)):
        family.size(pipe.vae, unit + 1, unit)


def test_references_of_any_number_and_size_change_the_image(case: tuple[Family, Any]) -> None:
    family, pipe = case
    size, other = Size(2, 4), Size(3, 2)
    x, text = noise(family, pipe, size), family.embed(pipe, PROMPTS, LENGTH)
    near = Reference(noise(family, pipe, size) * 0.5, size)
    if "tokens" not in family.conditionings:
        with raises("method_unsuited", "diptych", "channel"):
            sample(family, pipe, text, x, size, references=[near])
        return
    none, one = sample(family, pipe, text, x, size), sample(family, pipe, text, x, size, references=[near])
    assert one.shape == x.shape and (one - none).abs().max() > 1e-3
    far = Reference(noise(family, pipe, other), other)
    if family.name == "z_image":
        with raises("size_invalid", "(3, 2)"):
            sample(family, pipe, text, x, size, references=[far])
        far = Reference(noise(family, pipe, size), size)
    first, second = (sample(family, pipe, text, x, size, references=r) for r in ([near, far], [far, near]))
    assert (first - one).abs().max() > 1e-4  # the second one counts
    assert (first - second).abs().max() > 1e-4  # and each has positions of its own


def test_a_widened_transformer_with_zero_columns_is_the_teacher(case: tuple[Family, Any]) -> None:
    family, pipe = case
    size = Size(2, 3)
    x, text = noise(family, pipe, size), family.embed(pipe, PROMPTS, LENGTH)
    condition = noise(family, pipe, size)
    config = family.widened(dict(pipe.transformer.config))
    if config is None:
        assert family.conditionings == ("tokens",)
        with raises("method_unsuited", "tokens"):
            sample(family, pipe, text, x, size, condition=condition)
        return
    wide = type(pipe.transformer).from_config(config)
    state, key = dict(pipe.transformer.state_dict()), f"{family.input_layer}.weight"
    state[key] = torch.cat([state[key], torch.zeros_like(state[key])], dim=1)
    wide.load_state_dict(state)
    sigma = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        plain = family.velocity(pipe.transformer, x, sigma, text, size, guidance=3.5)
        zero = family.velocity(wide, x, sigma, text, size, condition=condition, guidance=3.5)
        weight = wide.get_submodule(family.input_layer).weight
        weight[:, weight.shape[1] // 2 :].normal_()
        changed = family.velocity(wide, x, sigma, text, size, condition=condition, guidance=3.5)
    assert (plain - zero).abs().max() <= 1e-5 and (changed - zero).abs().max() > 1e-3


def test_the_paths_and_lora_targets_name_layers(case: tuple[Family, Any]) -> None:
    family, pipe = case
    names = dict(pipe.transformer.named_modules())
    assert isinstance(names[family.input_layer], (torch.nn.Linear, torch.nn.Conv2d))
    blocks = [name for path in family.blocks for name in names if name.startswith(f"{path}.")]
    linears = [name for name, module in names.items() if isinstance(module, torch.nn.Linear)]
    for kind, targets in family.lora_targets.items():
        reached = [name for name in linears if any(name == t or name.endswith(f".{t}") for t in targets)]
        assert reached and set(reached) <= set(blocks)
        for target in targets:
            assert any(name.endswith(f".{target}") for name in linears), (kind, target)
        in_blocks = [n for n in linears if n in blocks and not any(w in n for w in ("norm", "_mod", "modulation"))]
        if kind == "attention+mlp" and family.name != "flux1":
            assert set(in_blocks) - set(reached) <= {n for n in in_blocks if "adaLN" in n}, family.name


def reference_image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def test_references_enter_flux2_as_in_the_stock_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe, family = PIPELINES["flux2"](tmp_path), families()["flux2"]
    pipe.set_progress_bar_config(disable=True)
    unit, size = family.unit(pipe.vae), Size(9, 8)
    images = [reference_image(8 * unit, 10 * unit), reference_image(11 * unit, 8 * unit)]
    x = noise(family, pipe, size, rows=1)
    stock = pipe(
        image=images, prompt=PROMPTS[:1], height=size.rows * unit, width=size.columns * unit,
        num_inference_steps=STEPS, guidance_scale=1.0, latents=stock_latents(family, x, size), output_type="pt",
        max_sequence_length=LENGTH,
    ).images  # fmt: skip
    with torch.no_grad():
        references = [
            Reference(family.encode(pipe.vae, pixels_of(image)), Size(image.height // unit, image.width // unit))
            for image in images
        ]
    ours = sample(family, pipe, family.embed(pipe, PROMPTS[:1], LENGTH), x, size, references=references)
    pixels = family.decode(pipe.vae, ours, size).detach() / 2 + 0.5
    assert (pixels.clamp(0, 1) - stock).abs().max() <= 1e-5


def test_a_reference_enters_flux1_as_in_kontext(tmp_path: Path) -> None:
    from diffusers import FluxKontextPipeline

    torch.manual_seed(0)
    teacher, family = flux1(), families()["flux1"]
    pipe: Any = FluxKontextPipeline(**teacher.components)
    pipe.set_progress_bar_config(disable=True)
    unit, size = family.unit(pipe.vae), Size(4, 6)
    image, x = reference_image(5 * unit, 3 * unit), noise(family, pipe, size, rows=1)
    generator = torch.Generator().manual_seed(0)
    stock = pipe(
        image=image, prompt=PROMPTS[:1], height=size.rows * unit, width=size.columns * unit, guidance_scale=3.5,
        num_inference_steps=STEPS, latents=x, output_type="pt", max_sequence_length=LENGTH, generator=generator,
        _auto_resize=False, max_area=size.tokens * unit * unit,
    ).images  # fmt: skip
    with torch.no_grad():
        references = [Reference(family.encode(pipe.vae, pixels_of(image)), Size(3, 5))]
    ours = sample(family, pipe, family.embed(pipe, PROMPTS[:1], LENGTH), x, size, references=references)
    pixels = family.decode(pipe.vae, ours, size).detach() / 2 + 0.5
    assert stock.shape == pixels.shape and (pixels.clamp(0, 1) - stock).abs().max() <= 1e-5


def test_a_class_without_a_family_is_refused_by_name() -> None:
    assert family_of("Flux2KleinPipeline").name == "flux2"
    with pytest.raises(UsageError) as refused:
        family_of("UNet2DConditionModel")
    assert refused.value.code == "model_unsupported" and "UNet2DConditionModel" in str(refused.value)
