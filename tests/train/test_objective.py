"""The loss is the paper's, and a widened teacher starts where the teacher is."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_run
import torch

from diptych.student.canvas import Canvas
from diptych.student.families.base import positions, unpack
from diptych.student.weights.fold import widen
from diptych.train.objective import Batch, panel_losses, shifted

CANVAS = Canvas(16, 24, 4)  # not square, so that a transposed panel split shows


def random_batch(count: int = 3, channels: int = 16, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    shape = (count, CANVAS.tokens, channels)
    clean, condition, noise = (torch.randn(shape, generator=g) for _ in range(3))
    sigma = torch.rand(count, generator=g)
    embeds, pooled = torch.randn(count, 5, 24, generator=g), torch.randn(count, 16, generator=g)
    return Batch(clean, condition, noise, sigma, embeds, pooled, canvas=CANVAS)


def trained_student(guidance: bool = False) -> Any:
    """A student whose condition columns are not zero."""
    student = widen(tiny_run.make_transformer(guidance))
    with torch.no_grad():
        student.x_embedder.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return student


@pytest.mark.parametrize("guidance", [None, 2.5])
@torch.no_grad()
def test_loss_equals_a_naive_one_written_in_pixels_of_latents(guidance: float | None) -> None:
    student = trained_student(guidance is not None)
    batch = random_batch()
    pooled = batch.text.pooled
    assert pooled is not None
    left, right = panel_losses(student, batch, guidance)
    for i in range(3):
        s = batch.sigma[i]
        x_t = batch.clean[i] * (1 - s) + batch.noise[i] * s
        ids = torch.tensor([[0.0, r, c] for r in range(CANVAS.rows) for c in range(CANVAS.columns)])
        velocity = student(
            hidden_states=torch.cat([x_t, batch.condition[i]], dim=1)[None],
            timestep=s[None],
            guidance=None if guidance is None else torch.tensor([guidance]),
            pooled_projections=pooled[i : i + 1],
            encoder_hidden_states=batch.prompt_embeds[i : i + 1],
            txt_ids=torch.zeros(5, 3),
            img_ids=ids,
        ).sample
        error = unpack(velocity - (batch.noise[i] - batch.clean[i]), CANVAS.size)[0] ** 2
        middle = error.shape[-1] // 2
        assert left[i].item() == pytest.approx(error[..., :middle].mean().item(), rel=1e-5)
        assert right[i].item() == pytest.approx(error[..., middle:].mean().item(), rel=1e-5)


@torch.no_grad()
def test_a_widened_teacher_starts_with_the_teachers_own_loss_whatever_the_condition() -> None:
    teacher = tiny_run.make_transformer()
    batch = random_batch()

    def plain(hidden_states: torch.Tensor, **rest: Any) -> Any:
        return teacher(hidden_states=hidden_states[..., :16], **rest)

    wanted = panel_losses(plain, batch)
    got = panel_losses(widen(teacher), batch)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_perfect_velocity_has_no_loss_and_each_panel_answers_for_itself() -> None:
    batch = random_batch()
    right = (torch.arange(CANVAS.tokens) % CANVAS.columns) >= CANVAS.panel_columns

    def model(**_: Any) -> tuple[torch.Tensor]:
        return (torch.where(right[:, None], batch.noise - batch.clean + 2, batch.noise - batch.clean),)

    left_loss, right_loss = panel_losses(model, batch)
    torch.testing.assert_close(left_loss, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(right_loss, torch.full((3,), 4.0))


def test_position_ids_are_the_pipelines_own() -> None:
    from diffusers import FluxControlPipeline

    theirs = FluxControlPipeline._prepare_latent_image_ids(
        1, CANVAS.rows, CANVAS.columns, torch.device("cpu"), torch.float32
    )
    assert torch.equal(positions(CANVAS.size), theirs)


def test_shift_keeps_the_ends_and_is_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigma = torch.linspace(0, 1, 11)
    assert torch.equal(shifted(sigma, 1.0), sigma)
    assert shifted(sigma, 3.0)[[0, -1]].tolist() == [0.0, 1.0]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=sigma.flip(0)[:-1].tolist())
    torch.testing.assert_close(torch.as_tensor(scheduler.sigmas)[:-1], shifted(sigma.flip(0)[:-1], 3.0))
