"""Painting with the student's memory and speed presets: four families really paint, and what cannot work is told."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_paint import grids, pixels, prompts, with_paint

from diptych.errors import UsageError
from diptych.recipe import load
from diptych.stages import paint
from diptych.student.runtime import memory, quantize, speed, stock
from raising import raises

FAMILIES = ("flux", "flux2", "sd3", "qwen")
BRANCHES = {"flux": 2, "flux2": 2, "sd3": 1, "qwen": 2}  # forwards of a step with true guidance: SD 3.5's are one batch


@pytest.fixture(scope="session")
def folders(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import tiny

    root = tmp_path_factory.mktemp("families")
    made = {name: getattr(tiny, f"{name}_teacher")(root / name) for name in FAMILIES if name != "flux"}
    return {"flux": teacher, **made}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def of(recipe: Any, folders: dict[str, Path], family: str) -> Any:
    """The recipe of a family's teacher, with enough steps to skip some."""
    small = with_paint(recipe, steps=8, panel_size=32)
    return small.model_copy(update={"teacher": str(folders[family])})


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Mean distance of two grids, 0 to 255."""
    return float(np.abs(pixels(one) - pixels(other)).mean())


def same(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether grids are equal but for rounding: products of other shapes may round differently, by CPU."""
    return all(
        np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1 and far(one, other) < 0.001
        for one, other in zip(some, others, strict=True)
    )


def test_presets_that_only_move_give_the_same_bytes_and_those_that_fuse_the_same_pixels(of: Any) -> None:
    plain = grids(of, prompts(2))
    assert grids(with_paint(of, memory="48"), prompts(2)) == plain
    for changes in ({"speed": "exact"}, {"memory": "24"}, {"memory": "24", "speed": "exact"}):
        assert same(grids(with_paint(of, **changes), prompts(2)), plain), changes


def test_quantized_and_offloaded_teachers_draw_nearly_the_same_picture(of: Any) -> None:
    (plain,) = grids(of, prompts(1))
    for name in ("8", "12"):
        assert 0 < far(grids(with_paint(of, memory=name), prompts(1))[0], plain) < 3, name


@pytest.mark.parametrize("name", ["fast", "fastest"])
def test_lossy_speeds_run_the_steps_of_their_schedule_and_no_others(of: Any, family: str, name: str) -> None:
    pipe = paint.open_teacher(Path(of.teacher), torch.float32)
    wanted = stock.resolve_speed(Path(of.teacher), name)
    drawing = stock.apply(pipe, None, wanted, torch.device("cpu"))
    calls: list[int] = []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: calls.append(1))
    canvas = {"height": 32, "width": 64, **paint.call_options(pipe, of.paint, 1)}
    with drawing.call():
        paint.generate(pipe, ["a red cat"], [5], **canvas)
    runner = sum(wanted.runs(step, 8) for step in range(8))
    assert len(calls) == runner * BRANCHES[family] and runner == {"fast": 6, "fastest": 5}[name]


def test_skipping_no_step_changes_no_byte_so_branches_are_kept_apart(of: Any) -> None:
    pipes = [paint.open_teacher(Path(of.teacher), torch.float32) for _ in range(2)]
    every = speed.Speed(cache="skip", cache_interval=1)
    canvas = {"height": 32, "width": 64, **paint.call_options(pipes[0], of.paint, 1)}
    drawn = []
    for pipe, wanted in zip(pipes, (speed.PLAIN, every), strict=True):
        with stock.apply(pipe, None, wanted, torch.device("cpu")).call():
            drawn.append(paint.generate(pipe, ["a red cat"], [5], **canvas))
    assert torch.equal(*drawn)


def test_nothing_of_one_batch_is_seen_in_the_next(of: Any) -> None:
    work = paint.PaintStage(with_paint(of, memory="24", speed="fast")).load()
    rows = prompts(3)
    first, second = work(rows[:2]), work(rows[2:])
    assert work(rows[:2]) == first and work(rows[2:]) == second
    assert 0 < far(first[0][0], grids(of, rows[:2])[0]) < 8  # pyright: ignore[reportIndexIssue]


def test_a_plan_counts_every_byte_of_the_teacher(folders: dict[str, Path], family: str) -> None:
    pipe = paint.open_teacher(folders[family], torch.float32)
    counted = memory.plan(stock.shapes(folders[family]), memory.Preset(), device="cpu", dtype_bytes=4)

    def numbers(*parts: str) -> int:
        models = [model for part in parts if (model := getattr(pipe, part, None)) is not None]
        return 4 * sum(p.numel() for model in models for p in model.parameters())

    assert counted.blocks + counted.modulation + counted.other == numbers("transformer")
    assert counted.text == numbers("text_encoder", "text_encoder_2", "text_encoder_3")
    assert counted.vae == numbers("vae") and (counted.modulation > 0) == (family == "flux")


def test_modulation_and_what_lies_outside_the_blocks_is_never_quantized(folders: dict[str, Path], family: str) -> None:
    transformer = paint.open_teacher(folders[family], torch.float32).transformer
    taken = set(quantize.quantizable(transformer))
    assert {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"} <= taken
    own = {"qwen": "transformer_blocks.0.img_mod.1", "flux2": "double_stream_modulation_img.linear"}
    modulation = own.get(family, "transformer_blocks.0.norm1.linear")
    assert isinstance(transformer.get_submodule(modulation), torch.nn.Linear)
    assert {modulation, "proj_out", "norm_out.linear"}.isdisjoint(taken)


def test_what_a_family_cannot_have_is_left_out_and_said(of: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diptych.student"):
        paint.PaintStage(with_paint(of, memory="24", speed="fast")).load()
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("paint.memory 24: ") and "text encoders staged" in line for line in said)
    assert any(line.startswith("left out: guidance_until: ") for line in said)
    tabled = any("modulation precomputed" in line for line in said)
    assert tabled == (family == "flux") == (not any("only FLUX.1's" in line for line in said))
    assert any(line.startswith("left out: fused_qkv: ") for line in said)  # staged, or not FLUX


def test_fused_projections_of_flux_share_the_bytes_of_the_single_ones(folders: dict[str, Path]) -> None:
    pipe = paint.open_teacher(folders["flux"], torch.float32)
    numbers = sum(p.numel() for p in pipe.transformer.parameters())
    fused = replace(stock.resolve_speed(folders["flux"], "exact"), packed=False)
    stock.apply(pipe, None, fused, torch.device("cpu"))
    attention = pipe.transformer.transformer_blocks[0].attn
    assert attention.fused_projections and attention.to_q.weight.data_ptr() == attention.to_qkv.weight.data_ptr()
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in pipe.transformer.parameters()}
    assert sum(held.values()) == 4 * numbers
    pipe = paint.open_teacher(folders["flux"], torch.float32)
    staged = stock.resolve_memory(folders["flux"], "24", "cpu", torch.float32, {})
    stock.apply(pipe, staged, fused, torch.device("cpu"))
    assert not hasattr(pipe.transformer.transformer_blocks[0].attn, "to_qkv")


def test_the_modulation_of_a_guidance_distilled_teacher_is_precomputed_for_its_guidance(
    recipe: Any, teacher: Path, tmp_path: Path
) -> None:
    from diffusers import FluxTransformer2DModel

    folder = tmp_path / "dev"
    shutil.copytree(teacher, folder)
    config: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text())
    torch.manual_seed(1)
    distilled: Any = FluxTransformer2DModel.from_config(config | {"guidance_embeds": True})
    distilled.save_pretrained(folder / "transformer")
    dev = with_paint(recipe.model_copy(update={"teacher": str(folder)}), true_guidance=1.0, guidance=3.5)
    plain = grids(dev, prompts(2))
    assert same(grids(with_paint(dev, memory="24"), prompts(2)), plain)
    assert grids(with_paint(dev, memory="24", guidance=30.0), prompts(2)) != plain
    pipe = paint.open_teacher(folder, torch.float32)
    stock.apply(pipe, stock.resolve_memory(folder, "24", "cpu", torch.float32, {}), speed.PLAIN, torch.device("cpu"))
    assert not any("norm1.linear" in name for name, _ in pipe.transformer.named_parameters())


def test_the_pocket_teacher_paints_the_same_to_rounding_at_exact_speed_and_in_24_gib() -> None:
    pocket = load("pocket", ["paint.steps=4", "device=cpu", "threads=1", "paint.dtype=float32"])
    plain = grids(pocket, prompts(2))
    for changes in ({"speed": "exact"}, {"memory": "24", "speed": "exact"}):
        assert same(grids(with_paint(pocket, **changes), prompts(2)), plain)


def test_steps_are_skipped_along_straight_lines_of_velocity_only(folders: dict[str, Path]) -> None:
    found = stock.shapes(folders["sd3"])
    kept, _ = stock.suited_speed(speed.PRESETS["fast"], found, stock.SCHEDULER)
    none, reasons = stock.suited_speed(speed.PRESETS["fast"], found, "DPMSolverMultistepScheduler")
    assert (kept.cache, none.cache) == ("skip", "none")
    assert any("DPMSolverMultistepScheduler" in reason for reason in reasons)
    _, reasons = stock.suited_speed(speed.Speed(cache="magnitude"), found, stock.SCHEDULER)
    assert [reason.split()[:2] for reason in reasons] == [["cache:", "magnitude"]]


def test_a_teacher_without_a_transformer_is_refused_before_it_is_opened(tmp_path: Path, recipe: Any) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    there = recipe.model_copy(update={"teacher": str(tmp_path)})
    for changes in ({"memory": "24"}, {"speed": "exact"}):
        with raises("option_unsuited", "StableDiffusionXLPipeline", "paint.memory", kind=UsageError):
            paint.PaintStage(with_paint(there, **changes)).load()


def test_a_preset_that_cannot_work_on_the_device_is_refused_by_the_key(folders: dict[str, Path]) -> None:
    with raises("device_unavailable", "paint.memory 12", "fp8", "mps", kind=UsageError):
        stock.resolve_memory(folders["sd3"], "12", "mps", torch.float32, {})


def test_auto_is_settled_when_a_run_is_frozen_and_agrees_with_what_was(recipe: Any, tmp_path: Path) -> None:
    from diptych.run import resolve

    asked = with_paint(recipe, memory="auto", dtype="auto")
    frozen = resolve.freeze(asked, tmp_path)
    assert frozen.paint.memory in memory.PRESETS and frozen.paint.dtype != "auto"
    assert load(tmp_path / "recipe.yaml").paint.memory == frozen.paint.memory
    assert resolve.freeze(asked, tmp_path) == frozen
    with pytest.raises(UsageError, match=r"paint\.memory"):
        resolve.freeze(with_paint(recipe, memory="12"), tmp_path)


def test_grids_painted_before_there_were_presets_are_not_painted_anew(recipe: Any) -> None:
    assert recipe.paint.memory is None and recipe.paint.speed is None
    other = [with_paint(recipe, memory="24"), with_paint(recipe, speed="exact")]
    assert len({one.fingerprint("paint") for one in (recipe, *other)}) == 3
    section = {k: v for k, v in recipe.values()["paint"].items() if k not in ("memory", "speed", "format", "images")}
    assert (
        recipe.fingerprint("paint")
        == hashlib.sha256(json.dumps({"paint": section}, sort_keys=True).encode()).hexdigest()
    )


def test_a_preset_is_a_name_though_yaml_reads_a_number() -> None:
    assert load("pocket", ["paint.memory=24"]).paint.memory == "24"
    with pytest.raises(UsageError, match=r"paint\.memory"):
        load("pocket", ["paint.memory=20"])
