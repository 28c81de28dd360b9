"""Baselines do what their names say, on stock pipelines, with the same noise for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
import torch
from PIL import Image

from diptych.evaluate.methods import baselines, build, common, students
from diptych.evaluate.methods.common import Context
from diptych.pocket.world import PANEL
from diptych.student.canvas import Canvas, split_tokens
from raising import raises


@pytest.fixture
def context(teacher: Path, judge_folders: Path, run_dir: Path, suite: Any) -> Context:
    return Context(tiny.make_recipe(teacher, judge_folders), run_dir, suite)


@pytest.fixture
def samples(suite: Any) -> Any:
    return suite.samples(2, 1)[:2]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def test_text_only_does_not_use_the_reference(context: Context, samples: Any, suite: Any) -> None:
    method = baselines.TextOnly(context)
    seen = [suite.reference_image(s) for s in samples]
    with_it = method.generate(seen, samples, [3, 4])
    without = method.generate([Image.new("RGB", (PANEL, PANEL))] * 2, samples, [3, 4])
    assert [i.tobytes() for i in with_it] == [i.tobytes() for i in without]
    assert with_it[0].size == (PANEL, PANEL) and with_it[0].tobytes() != with_it[1].tobytes()


def test_inpaint_sets_the_left_panel_to_the_reference_and_generates_the_right_one(
    context: Context, samples: Any, suite: Any
) -> None:
    method = baselines.Inpaint(context)
    references = [suite.reference_image(s) for s in samples]
    prompts = [s.grid_prompt for s in samples]
    latents = method.grids(references, prompts, [3, 4], output_type="latent")
    left, right = split_tokens(torch.stack(latents), Canvas(PANEL, PANEL, 4))
    z = common.encode(context.teacher(), references)
    assert torch.equal(left, z) and (right - z).abs().mean() > 0.1
    grids = method.grids(references, prompts, [3, 4])
    assert grids[0].size == (2 * PANEL, PANEL)
    drawn = method.generate(references, samples, [3, 4])
    assert [d.tobytes() for d in drawn] == [g.crop((PANEL, 0, 2 * PANEL, PANEL)).tobytes() for g in grids]


def test_inpaint_depends_on_the_reference(context: Context, samples: Any, suite: Any) -> None:
    method = baselines.Inpaint(context)
    one, other = (suite.reference_image(s) for s in samples)
    first, second = (method.generate([r], samples[:1], [3])[0] for r in (one, other))
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize("name", ["text_only", "inpaint", "student"])
def test_an_image_does_not_depend_on_its_batch(name: str, context: Context, samples: Any, suite: Any) -> None:
    method = build(name, context)[name]
    references = [suite.reference_image(s) for s in samples]
    together = method.generate(references, samples, [3, 4])
    alone = [method.generate([r], [s], [n])[0] for r, s, n in zip(references, samples, (3, 4), strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 2


def test_the_student_is_what_generate_would_draw(context: Context, samples: Any, suite: Any, teacher: Path) -> None:
    from diptych.apps.student import Student

    references = [suite.reference_image(s) for s in samples]
    drawn = students.RunStudent(context).generate(references, samples, [3, 4])
    student = Student.load(context.run_dir / "student", base=teacher, device="cpu")
    settings = context.recipe.evaluate
    again = student.generate(
        references[1],
        samples[1].prompt,
        seed=4,
        size=PANEL,
        steps=settings.steps,
        image_guidance=settings.image_guidance,
        text_guidance=settings.text_guidance,
    )
    assert np.abs(pixels(drawn[1]) - pixels(again)).max() <= 2


def test_a_control_lora_is_evaluated_too(context: Context, samples: Any, suite: Any, teacher: Path) -> None:
    from diptych.recipe.schema import Distill
    from diptych.train import parts
    from diptych.train.export import save_lora
    from diptych.train.prepare import start

    cpu = torch.device("cpu")
    pipe = start(context.recipe, cpu)
    options = Distill(mode="lora", rank=2)
    trained = parts.select(pipe.transformer, options, "float32", cpu)
    folder = context.run_dir / "lora"
    folder.mkdir()
    save_lora(pipe.transformer, trained, 2, folder, {})
    opened = students.open_student(folder, str(teacher), context.recipe)
    assert opened.transformer.config.in_channels == 64
    assert not getattr(opened.transformer, "peft_config", None)


def test_copy_and_anchors_need_no_model(context: Context, samples: Any, suite: Any) -> None:
    references = [suite.reference_image(s) for s in samples]
    assert baselines.Copy(context).generate(references, samples, [0, 0]) == references
    assert baselines.Truth(context).generate(references, samples, [0, 0])[0] == suite.truth(samples[0])
    assert baselines.Other(context).generate(references, samples, [0, 0])[0] != suite.truth(samples[0])


def test_a_run_without_a_student_says_how_to_get_one(context: Context, tmp_path: Path) -> None:
    empty = Context(context.recipe, tmp_path / "empty", context.suite)
    with raises("run_incomplete", tmp_path / "empty", "diptych distill"):
        students.RunStudent(empty).fingerprint()
