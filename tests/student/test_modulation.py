"""The modulation table gives what the AdaLN weights gave, for every step, branch and row; and everything is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diptych.student.runtime.modulation import Lookup, Modulation, adaln_layers, exact_timesteps, precomputed
from raising import raises
from student.conftest import tiny_transformer

TIMESTEPS = torch.tensor([1000.0, 751.3, 400.0, 33.3])
CLOSE: Any = {"rtol": 1e-6, "atol": 1e-6}  # outputs are of the order of 1


def small_flux(**changes: Any) -> Any:
    return tiny_transformer(num_layers=2, num_single_layers=2, guidance_embeds=True, **changes)


@pytest.fixture
def flux():
    return small_flux()


def texts(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, timestep: float, pooled: torch.Tensor, guidance: float = 3.5, dtype=torch.float32) -> torch.Tensor:
    """One forward as the pipeline makes it."""
    rows = len(pooled)
    generator = torch.Generator().manual_seed(7)
    t = torch.tensor(timestep)
    return model(
        hidden_states=torch.randn(rows, 8, 16, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(rows, 3, 24, generator=generator).to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=t.expand(rows).to(dtype) / 1000,
        guidance=torch.full([rows], guidance),
        img_ids=torch.zeros(8, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]


def test_every_step_branch_and_row_gets_its_own_modulation(flux):
    prompts, negative = texts(3), texts(1, seed=1).expand(3, -1)
    calls = [(float(t), pool) for t in TIMESTEPS for pool in (prompts, negative, torch.cat([prompts, negative]))]
    with exact_timesteps(flux):
        plain = [forward(flux, t, pool) for t, pool in calls]
    modulation = Modulation(flux).detach()
    with precomputed(flux, TIMESTEPS, [prompts, negative], guidance=3.5):
        assert modulation.lookup.table.shape[:2] == (4, 4)  # pyright: ignore (steps, distinct texts)
        tabled = [forward(flux, t, pool) for t, pool in calls]
    for a, b in zip(plain, tabled, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)
    assert (plain[0] - plain[3]).abs().max() > 1e-3  # steps do differ


def test_detached_weights_are_out_of_the_model_and_come_back(flux):
    before = {key: value.clone() for key, value in flux.state_dict().items()}
    plain = forward(flux, 751.3, texts(1))
    modulation = Modulation(flux).detach()
    left = sum(p.numel() for p in flux.parameters())
    out = sum(p.numel() for linear in modulation.linears.values() for p in linear.parameters())
    embed = sum(p.numel() for p in modulation.time_text_embed.parameters())
    assert left + out + embed == sum(value.numel() for value in before.values())
    assert not any("norm1.linear" in key or "time_text_embed" in key for key in flux.state_dict())
    with modulation.attached():
        assert flux.state_dict().keys() == before.keys()
    assert modulation.detached
    modulation.attach()
    assert all(torch.equal(before[key], value) for key, value in flux.state_dict().items())
    assert torch.equal(forward(flux, 751.3, texts(1)), plain)


def test_wanted_without_detaching_leaves_the_transformer_as_it_was(flux):
    stock = flux.time_text_embed
    with precomputed(flux, TIMESTEPS, [texts(1)], guidance=3.5, wanted=True):
        assert isinstance(flux.time_text_embed, Lookup)
    assert flux.time_text_embed is stock and all(type(n.linear) is torch.nn.Linear for n in adaln_layers(flux).values())
    with precomputed(flux, TIMESTEPS, [texts(1)], guidance=3.5):
        assert flux.time_text_embed is stock


def test_what_is_not_in_the_table_is_never_drawn_from_another_row(flux):
    Modulation(flux).detach()
    with precomputed(flux, TIMESTEPS, [texts(1)], guidance=3.5):
        assert forward(flux, 400.0, texts(1)).isfinite().all()
        assert forward(flux, 401.0, texts(1)).isnan().all()
        assert forward(flux, 400.0, texts(1, seed=9)).isnan().all()
    with raises("argument_type", "precomputed"):
        forward(flux, 400.0, texts(1))


def test_bfloat16_finds_its_rows_through_the_pipelines_roundings():
    flux = small_flux().to(torch.bfloat16)
    pooled = texts(2)
    with exact_timesteps(flux):
        plain = [forward(flux, float(t), pooled, dtype=torch.bfloat16) for t in TIMESTEPS]
    Modulation(flux).detach()
    with precomputed(flux, TIMESTEPS, [pooled.to(torch.bfloat16)], guidance=3.5):
        tabled = [forward(flux, float(t), pooled, dtype=torch.bfloat16) for t in TIMESTEPS]
    for a, b in zip(plain, tabled, strict=True):
        torch.testing.assert_close(b, a, rtol=0.02, atol=0.02)


def test_unfused_lora_on_a_norm_is_refused_and_one_elsewhere_is_not(flux):
    from peft import LoraConfig

    flux.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))
    Modulation(flux)
    flux.delete_adapters("default")
    flux = small_flux()
    flux.add_adapter(LoraConfig(r=2, target_modules=["norm1.linear"]))
    with raises("lora_unsupported", "norm1.linear"):
        Modulation(flux)


def test_guidance_is_needed_where_the_model_embeds_it(flux):
    Modulation(flux).detach()
    with raises("argument_type", "guidance"), precomputed(flux, TIMESTEPS, [texts(1)]):
        pass
