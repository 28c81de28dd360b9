"""Per-subject tuning: each subject its own LoRA, trained once, in a file that stock diffusers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
import torch
from safetensors.torch import load_file

from diptych.errors import UsageError
from diptych.evaluate.methods import baselines, common, tuning
from diptych.evaluate.methods.common import Context
from diptych.evaluate.methods.tuning import Tuned
from diptych.pocket.world import PANEL
from diptych.train.objective import Batch, velocity_error

TUNING = {"learning_rates": [0.01], "steps": [1, 3], "rank": 4, "batch_size": 4, "crops": 4}


def context(teacher: Path, judge_folders: Path, folder: Path, suite: Any, **tune: Any) -> Context:
    recipe = tiny.make_recipe(teacher, judge_folders, steps=2, methods=["tuned"], tuning={**TUNING, **tune})
    values = recipe.values()
    values["paint"]["dtype"] = values["distill"]["precision"] = "float32"
    return Context(type(recipe).model_validate(values), folder, suite)


@pytest.fixture
def samples(suite: Any) -> Any:
    """Two prompts for one subject, one for another."""
    found = suite.samples(2, 2)
    return [found[0], found[1], found[2]]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob(tuning.FILE))


def test_every_subject_is_trained_once_and_every_steps_of_the_sweep_on_the_way(
    teacher: Path, judge_folders: Path, tmp_path: Path, suite: Any, samples: Any
) -> None:
    here = context(teacher, judge_folders, tmp_path, suite)
    methods = tuning.sweep(here)
    assert list(methods) == ["tuned-0.01-1", "tuned-0.01-3"]
    references = [suite.reference_image(s) for s in samples]
    first = methods["tuned-0.01-1"]
    first.prepare(references, samples)
    made = {path: path.stat().st_mtime_ns for path in weights(tmp_path)}
    assert len(made) == 4  # two subjects, two numbers of steps
    methods["tuned-0.01-3"].prepare(references, samples)
    assert {path: path.stat().st_mtime_ns for path in weights(tmp_path)} == made
    spent = tuning.seconds_per_subject(tmp_path)
    assert list(spent) == list(methods) and 0 < spent["tuned-0.01-1"] <= spent["tuned-0.01-3"]

    alone = context(teacher, judge_folders, tmp_path / "alone", suite, steps=[1])
    tuning.sweep(alone)["tuned-0.01-1"].prepare(references[:1], samples[:1])
    a, b = weights(tmp_path / "alone")[0], next(p for p in made if "0.01-1" in str(p) and "identities-000" in str(p))
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


def test_stock_diffusers_opens_the_files_and_generates_the_same(
    teacher: Path, judge_folders: Path, tmp_path: Path, suite: Any, samples: Any
) -> None:
    here = context(teacher, judge_folders, tmp_path, suite)
    method = tuning.sweep(here)["tuned-0.01-3"]
    references = [suite.reference_image(s) for s in samples]
    method.prepare(references, samples)
    drawn = method.generate(references, samples, [3, 4, 5])
    pipe = common.teacher_of(here.recipe)
    own = next(p for p in weights(tmp_path) if "0.01-3" in str(p) and "identities-001" in str(p))
    pipe.load_lora_weights(own.parent)
    (again,) = common.sample_teacher(
        pipe, [samples[2].prompt], PANEL, PANEL, common.noise(pipe, [5], PANEL, PANEL), here.recipe
    )
    assert np.abs(np.asarray(again, float) - np.asarray(drawn[2], float)).max() <= 2
    # The third sample has another subject than the others, and the teacher alone generates another image.
    swapped = method.generate([references[0]], [samples[0]], [5])[0]
    assert swapped.tobytes() != drawn[2].tobytes()
    plain = baselines.TextOnly(here).generate(references, samples, [3, 4, 5])
    assert plain[2].tobytes() != drawn[2].tobytes()


def test_an_automatic_shift_is_that_of_the_stock_teacher(
    teacher: Path, judge_folders: Path, tmp_path: Path, suite: Any
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    tuner = tuning.Tuner(context(teacher, judge_folders, tmp_path, suite, steps=[1]))
    tuner.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert common.shift(tuner.pipe, common.canvas(tuner.pipe, PANEL, PANEL), "auto") == 3.0


def test_training_brings_the_model_nearer_to_its_image(
    teacher: Path, judge_folders: Path, tmp_path: Path, suite: Any, samples: Any
) -> None:
    tuner = tuning.Tuner(context(teacher, judge_folders, tmp_path, suite, steps=[30]))
    reference = suite.reference_image(samples[0])
    canvas = common.canvas(tuner.pipe, PANEL, PANEL)
    generator = torch.Generator().manual_seed(0)
    clean = common.encode_pixels(tuner.pipe, tuning.views(reference, 2, generator))
    noise = torch.randn(clean.shape, generator=generator)
    embeds, pooled = common.encode_text(tuner.pipe, ["a cat"])
    words = (embeds.expand(2, -1, -1), pooled.expand(2, -1))

    @torch.no_grad()
    def error() -> float:
        sigma = torch.tensor([0.5, 0.7])
        batch = Batch(clean, clean[:, :0], noise, sigma, *words, canvas=canvas)
        return velocity_error(tuner.transformer, batch).mean().item()

    tuner.trained.put(tuner.start)
    before = error()
    assert [steps for steps, _ in tuner.train(reference, "a cat", 0.01, seed=1)] == [30]
    assert error() < 0.9 * before


def test_prior_preservation_also_trains_on_images_of_the_teacher(
    teacher: Path, judge_folders: Path, tmp_path: Path, suite: Any, samples: Any
) -> None:
    states = []
    for prior in (0, 2):
        tuner = tuning.Tuner(context(teacher, judge_folders, tmp_path, suite, steps=[2], prior=prior))
        list(tuner.train(suite.reference_image(samples[0]), "a cat", 0.01, seed=1))
        states.append(tuner.trained.tensors())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_other_settings_are_another_method(teacher: Path, judge_folders: Path, tmp_path: Path, suite: Any) -> None:
    prints = set()
    for change in ({}, {"rank": 2}, {"crops": 5}, {"prior": 1}):
        methods = tuning.sweep(context(teacher, judge_folders, tmp_path, suite, **change))
        prints |= {method.fingerprint() for method in methods.values()}
    assert len(prints) == 8
    with pytest.raises(UsageError, match=r"evaluate\.tuning\.lora_targets.*'atention'.*attention"):
        tuning.Tuner(context(teacher, judge_folders, tmp_path, suite, lora_targets="atention"))


def test_a_subject_is_called_what_the_prompt_calls_it(suite: Any) -> None:
    known, unknown = suite.samples(2, 1)[0], suite.samples(2, 1)[-1]
    assert tuning.class_word(known) == known.kind and known.split == "identities"
    assert tuning.class_word(unknown) == "character" and unknown.split == "kinds"


def test_views_begin_with_the_image_and_its_mirror_image(suite: Any, samples: Any) -> None:
    reference = suite.reference_image(samples[0])
    made = tuning.views(reference, 5, torch.Generator().manual_seed(0))
    assert made.shape == (5, 3, PANEL, PANEL)
    assert torch.equal(made[1], made[0].flip(-1)) and not torch.equal(made[2], made[0])


def test_a_sweep_is_several_methods_of_an_evaluation(teacher: Path, judge_folders: Path, suite: Any) -> None:
    from diptych.evaluate.methods import build, method_names

    here = context(teacher, judge_folders, Path("nowhere"), suite)
    methods = {name: each for key in method_names(here.recipe.evaluate) for name, each in build(key, here).items()}
    assert list(methods) == ["tuned-0.01-1", "tuned-0.01-3", "truth", "other"]
    assert all(isinstance(methods[name], Tuned) for name in list(methods)[:2])
