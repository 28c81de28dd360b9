"""Training with the reference as clean tokens: the loss, dropped references, resuming, LoRA files, preference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych import Student
from diptych.data.images import open_image, read_provenance
from diptych.errors import UsageError
from diptych.student.attention import install
from diptych.student.canvas import Canvas
from diptych.student.references import TokenStyle, token_ids
from diptych.train import loop
from diptych.train.distill import distill
from diptych.train.objective import Batch, token_losses
from raising import raises

SIDE = tiny_run.PANEL
STYLES = [TokenStyle(p, a) for p in ("frame", "left") for a in ("joint", "self")]
LORA = {"mode": "lora", "rank": 4}
WIDE = Canvas(SIDE, 2 * SIDE, 4, 1)


def recipe(world: Any, **distill: Any) -> Any:
    return tiny_run.make_recipe(world.teacher, **{"conditioning": "tokens", "learning_rate": 1e-2, **distill})


@pytest.fixture(scope="module", params=STYLES, ids=lambda style: f"{style.positions}-{style.attention}")
def trained(request: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained student: `out` and `style`."""
    out, style = tmp_path_factory.mktemp("tokens") / "student", request.param
    distill(recipe(world, positions=style.positions, reference_attention=style.attention), world.pairs, out)
    return SimpleNamespace(out=out, style=style)


def batch(count: int = 4, references: int = 1, bare: list[bool] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens = WIDE.tokens
    return Batch(
        clean=random(count, tokens, 16),
        condition=random(count, references * tokens, 16),
        noise=random(count, tokens, 16),
        sigma=torch.linspace(0.2, 0.9, count),
        prompt_embeds=random(count, 8, 24),
        pooled=random(count, 16),
        bare=None if bare is None else torch.tensor(bare),
        canvas=WIDE,
    )


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("positions", ["frame", "left"])
def test_the_loss_is_that_of_the_target_s_tokens_alone(positions: str, references: int) -> None:
    transformer, given = tiny_run.make_transformer(), batch(references=references)
    ids = torch.cat(token_ids((2, 4), ((2, 4),) * references, positions))
    level = given.sigma[:, None, None]
    x_t = (1 - level) * given.clean + level * given.noise
    output = transformer(
        hidden_states=torch.cat([x_t, given.condition], dim=1),
        timestep=given.sigma,
        pooled_projections=given.pooled,
        encoder_hidden_states=given.prompt_embeds,
        txt_ids=torch.zeros(8, 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    error = (output[:, : WIDE.tokens] - (given.noise - given.clean)).square().mean((1, 2))
    torch.testing.assert_close(token_losses(transformer, given, TokenStyle(positions)), error)


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_samples_without_a_reference_are_as_if_alone(style: TokenStyle) -> None:
    transformer, bare = tiny_run.make_transformer(), [False, True, False, True]
    install(transformer)
    mixed = batch(bare=bare)
    together = token_losses(transformer, mixed, style)
    for row, part in enumerate(mixed.split(1)):
        torch.testing.assert_close(token_losses(transformer, part, style)[0], together[row])
    other = token_losses(transformer, replace(mixed, condition=mixed.condition.flip(0)), style)
    changed = [not torch.equal(x, y) for x, y in zip(together, other, strict=True)]
    assert changed == [not each for each in bare]  # a dropped reference is no input at all


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("bare", [[False] * 4, [True] * 4, [False, True, False, False]])
def test_processes_that_share_weights_run_the_same_passes(style: TokenStyle, bare: list[bool]) -> None:
    transformer = tiny_run.make_transformer()
    install(transformer)
    passes: list[int] = []
    transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    alone = token_losses(transformer, batch(bare=bare), style)
    passes.clear()
    together = token_losses(transformer, batch(bare=bare), style, together=True)
    assert len(passes) == (3 if style.attention == "self" else 2)
    torch.testing.assert_close(together, alone)
    together.sum().backward()
    assert all(p.grad is not None for p in transformer.parameters())


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_gradients_go_through_both_passes_and_checkpointing_keeps_them(style: TokenStyle) -> None:
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny_run.make_transformer().train()
        install(transformer)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        given = batch(bare=[False, True, False, False])
        given.condition.requires_grad_(True)
        token_losses(transformer, given, style).mean().backward()
        assert given.condition.grad is not None and given.condition.grad[1].abs().sum() == 0
        assert all(given.condition.grad[row].abs().sum() > 0 for row in (0, 2, 3))
        gradients.append({name: p.grad for name, p in transformer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# Training ------------------------------------------------------------------------------------------------------------


def test_it_trains_the_teacher_s_own_layers_and_learns(trained: Any) -> None:
    lines, _ = kills.result(trained.out)
    assert {line["left"] for line in lines} == {0.0} and all(line["loss"] == line["right"] > 0 for line in lines)
    checks = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert checks[-1] < checks[0]
    config = json.loads((trained.out / "transformer" / "config.json").read_text())
    assert config["in_channels"] == 16 and config["_diptych"]["positions"] == trained.style.positions
    assert config["_diptych"]["reference_attention"] == trained.style.attention
    card = (trained.out / "README.md").read_text()
    assert "clean tokens" in card and f"{trained.style.positions}, {trained.style.attention}" in card


def test_the_sample_sheet_is_what_a_saved_one_draws(world: Any, trained: Any) -> None:
    from PIL import Image

    student = Student.load(trained.out, device="cpu", progress_bar=False)
    path = trained.out / "training" / "samples" / "step-000012.png"
    sheet, made_by = Image.open(path).convert("RGB"), read_provenance(path)
    assert made_by is not None
    captions = {row["id"]: row["caption"] for row in world.pairs}
    for line, name in enumerate(made_by["pairs"]):
        reference = sheet.crop((0, line * SIDE, SIDE, (line + 1) * SIDE))
        given = {"steps": 20, "image_guidance": 1.0, "text_guidance": 1.0}
        drawn = student.generate(reference, captions[name], seed=line, **given)
        assert drawn.tobytes() == sheet.crop((2 * SIDE, line * SIDE, 3 * SIDE, (line + 1) * SIDE)).tobytes()
    with raises("option_unsuited", "tokens", "return_reference", kind=UsageError):
        student.pipeline("a cat", reference=reference, return_reference=True)


@pytest.mark.parametrize("options", [{}, {"positions": "left", "reference_attention": "self", **LORA}])
def test_a_stopped_training_goes_on_to_the_same_bits(world: Any, tmp_path: Path, options: Any) -> None:
    given = {**options, "reference_dropout": 0.3, "both_dropout": 0.2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distill(recipe(world, **given), world.pairs, whole)

    def stop(step: int, total: int, text: str) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(recipe(world, **given), world.pairs, cut, stop)
    distill(recipe(world, **given), world.pairs, cut)
    mode = options.get("mode", "full")
    assert kills.result(cut, mode) == kills.result(whole, mode)


def test_micro_batches_are_the_batch(world: Any, tmp_path: Path) -> None:
    given = {"reference_dropout": 0.3, "both_dropout": 0.2, "reference_attention": "self", "steps": 3, "ema": 0}
    for size in (1, 4):
        distill(recipe(world, micro_batch=size, **given), world.pairs, tmp_path / str(size))
    one, all_ = (kills.result(tmp_path / str(size))[0] for size in (1, 4))
    for a, b in zip(one, all_, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_pairs_of_another_shape_are_trained_at_theirs(world: Any, tmp_path: Path) -> None:
    buckets = [[SIDE, SIDE], [2 * SIDE, SIDE]]
    summary = distill(recipe(world, buckets=buckets, steps=2), world.pairs, tmp_path / "out")
    assert summary["steps"] == 2
    student = Student.load(tmp_path / "out", device="cpu", progress_bar=False)
    reference = open_image(next(iter(world.pairs))["image"])
    assert student.generate(reference, "a cat", size=(48, 24), steps=2).size == (48, 24)


# LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "lora"
    distill(recipe(world, mode="lora", rank=4, steps=3, ema=0), world.pairs, out)
    return out


def latents(pipe: Any, reference: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
    given = {"height": SIDE, "width": SIDE, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    return pipe(prompt="a cat in the snow", **given, **options, **reference).images


def test_its_lora_loads_in_stock_kontext(world: Any, lora: Path) -> None:
    from diffusers import FluxKontextPipeline

    from diptych import student as students
    from diptych.student.weights.lora_file import read_lora

    layers = read_lora(lora / "pytorch_lora_weights.safetensors")
    assert layers and not any("x_embedder" in layer for layer in layers)
    image = open_image(next(iter(world.pairs))["conditioning"])
    pipe = students.load(lora, world.teacher, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.settings.conditioning == "tokens"
    noise = pipe.noise([0], pipe.canvas())
    ours = latents(pipe, {"reference": image}, noise)
    stock: Any = FluxKontextPipeline.from_pretrained(world.teacher)
    stock.set_progress_bar_config(disable=True)
    kontext = {"max_area": SIDE**2, "_auto_resize": False, "max_sequence_length": 8}
    plain = latents(stock, {"image": image}, noise, **kontext)
    stock.load_lora_weights(lora)
    theirs = latents(stock, {"image": image}, noise, **kontext)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 1e-3


@pytest.mark.parametrize("style", ["lora-comfyui", "lora-kohya", "lora-diffusers"])
def test_its_lora_in_other_keys_is_the_same_student(world: Any, lora: Path, style: str, tmp_path: Path) -> None:
    from diptych import student as students
    from diptych.student.weights.convert import convert

    convert(lora, tmp_path / "other.safetensors", style, base=world.teacher)
    image = open_image(next(iter(world.pairs))["conditioning"])
    drawn = []
    for place in (lora, tmp_path / "other.safetensors"):
        pipe = students.load(place, world.teacher, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        drawn.append(latents(pipe, {"reference": image}, pipe.noise([0], pipe.canvas())))
        assert pipe.settings.conditioning == "tokens"
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


def test_a_fused_one_converts_back_to_a_lora(world: Any, lora: Path, tmp_path: Path) -> None:
    from diptych import student as students
    from diptych.student.weights.convert import convert

    convert(lora, tmp_path / "folder", "folded", base=world.teacher, fuse_lora=True)
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
    convert(tmp_path / "folder", tmp_path / "again", "control-lora", base=world.teacher)
    image = open_image(next(iter(world.pairs))["conditioning"])
    drawn = []
    for place in (lora, tmp_path / "folder", tmp_path / "again"):
        pipe = students.load(place, world.teacher, device="cpu", fuse=True)
        pipe.set_progress_bar_config(disable=True)
        drawn.append(latents(pipe, {"reference": image}, pipe.noise([0], pipe.canvas())))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=1e-4, atol=1e-4)


def test_a_lora_is_trained_further(world: Any, lora: Path, tmp_path: Path) -> None:
    again = recipe(world, mode="lora", rank=4, steps=2, init=str(lora))
    job = tiny_run.prepare(again, world.pairs, tmp_path / "out")
    trainer = loop.Trainer(job)
    start = [p.detach().clone() for p in trainer.trained.parameters if p.abs().sum() > 0]
    assert len(start) == len(trainer.trained.parameters)  # B is not zero: it goes on
    for wrong, key in (({"positions": "left"}, "positions"), ({"conditioning": "diptych"}, "conditioning")):
        with raises("model_mismatch", f"distill.{key}", kind=UsageError):
            distill(recipe(world, mode="lora", rank=4, init=str(lora), **wrong), world.pairs, tmp_path / key)


# Other trainings and the recipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["joint", "self"])
def test_preference_training_goes_on_from_one(world: Any, lora: Path, tmp_path: Path, attention: str) -> None:
    options: dict[str, Any] = {"mode": "lora", "rank": 4, "reference_attention": attention}
    init = lora
    if attention == "self":
        init = tmp_path / "first"
        distill(recipe(world, steps=2, **options), world.pairs, init)
    options |= {"steps": 2, "init": str(init), "preference": {"pairs": 8}, "reference_dropout": 0.3, "sample_steps": 2}
    distill(recipe(world, **options), world.pairs, tmp_path / "out")
    lines, _ = kills.result(tmp_path / "out", "lora")
    assert all(line["left"] == 0 and line["preference"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"left_weight": 0.5}, "left_weight"),
        ({"condition_init": "teacher"}, "condition_init"),
        ({"right_weight": 0}, "right_weight"),
        ({"conditioning": "diptych", "positions": "left"}, "positions"),
        ({"conditioning": "channel", "reference_attention": "self"}, "reference_attention"),
        ({"positions": "right"}, "positions"),
        ({"reference_attention": "self", "sharding": "full"}, "sharding"),
    ],
)
def test_keys_that_make_no_sense_for_tokens_are_refused(world: Any, wrong: Any, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        recipe(world, **wrong)


def test_other_students_say_nothing_of_tokens(straight: Any) -> None:
    settings = json.loads((straight.out / "transformer" / "config.json").read_text())["_diptych"]
    assert not {"positions", "reference_attention"} & settings.keys()


def test_the_pocket_teacher_becomes_one(world: Any, tmp_path: Path) -> None:
    """The shipped teacher, with as many words and as large a panel as it has."""
    given = {"steps": 2, "batch_size": 2, "validation_pairs": 2, "sample_steps": 2, "positions": "left"}
    made = recipe(world, **given, reference_attention="self").model_copy(update={"teacher": "pocket"})
    distill(made, world.pairs, tmp_path / "out")
    student = Student.load(tmp_path / "out", device="cpu", progress_bar=False)
    assert student.pipeline.settings.sizes == ((64, 64),) and student.words
    reference = open_image(next(iter(world.pairs))["image"])
    given = {"steps": 3, "image_guidance": 2.0, "text_guidance": 1.5}
    both = student.generate([reference, None], "a cat on the beach", batch_size=2, **given)
    assert [image.size for image in both] == [(64, 64)] * 2 and both[0].tobytes() != both[1].tobytes()
    relit = student.relight(reference, "soft golden light from the left", steps=2, mask=mask(tmp_path))
    assert relit.size == (64, 64)


def mask(folder: Path) -> Path:
    """A mask that keeps the left half of a tiny pair's image."""
    from PIL import Image

    drawn = Image.new("L", (SIDE, SIDE), 0)
    drawn.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    drawn.save(folder / "mask.png")
    return folder / "mask.png"
