"""The image-embedding adapter: trained on a run's pairs by the ordinary loop, saved as stock diffusers opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
import torch
from safetensors.torch import load_file

from diptych.evaluate.methods import adapter, common
from diptych.evaluate.methods.common import Context
from diptych.pocket.world import PANEL
from raising import raises

DISTILL = {"steps": 4, "batch_size": 4, "learning_rate": 0.02, "warmup": 1, "checkpoint_every": 1, "ema": 0.5}
DISTILL |= {"validation_pairs": 2, "validate_every": 4, "sample_every": 0, "precision": "float32"}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_judges(tmp_path_factory.mktemp("adapter-judges"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision model with its processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 12, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=8)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_recipe(teacher: Path, judges: Path, encoder: Path, **distill: Any) -> Any:
    settings = {"encoder": str(encoder)}
    recipe = tiny.make_recipe(teacher, judges, steps=2, methods=["adapter"], adapter=settings)
    values = recipe.values()
    values["distill"] |= {**DISTILL, **distill}
    values["paint"]["dtype"] = "float32"
    return type(recipe).model_validate(values)


@pytest.fixture(scope="module")
def trained(teacher: Path, judges: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A recipe and the run whose adapter it trained."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    tiny.make_data(folder)
    recipe = make_recipe(teacher, judges, clip)
    adapter.fit(recipe, folder)
    return recipe, folder


def test_a_new_adapter_changes_nothing(teacher: Path, judges: Path, clip: Path, suite: Any) -> None:
    recipe = make_recipe(teacher, judges, clip)
    pipe = common.teacher_of(recipe)
    sample = suite.samples(2, 1)[0]
    noise = common.noise(pipe, [3], PANEL, PANEL)
    (before,) = common.sample_teacher(pipe, [sample.prompt], PANEL, PANEL, noise, recipe)
    adapter.attach(pipe, adapter.start(pipe, 12, 0))
    seen = [torch.randn(1, 1, 12)]
    more = {"ip_adapter_image_embeds": seen, "negative_ip_adapter_image_embeds": seen}
    (after,) = common.sample_teacher(pipe, [sample.prompt], PANEL, PANEL, noise, recipe, **more)
    assert np.abs(np.asarray(before, float) - np.asarray(after, float)).max() <= 1


def test_what_is_trained_is_the_adapter_alone(trained: tuple[Any, Path], teacher: Path) -> None:
    recipe, folder = trained
    path = adapter.run_folder(folder) / adapter.FILE
    file = load_file(path)
    assert {key.split(".")[0] for key in file} == {"image_proj", "ip_adapter"}
    assert file["image_proj.proj.weight"].shape == (adapter.TOKENS * 128, 12)
    assert file["ip_adapter.0.to_v_ip.weight"].abs().max() > 0  # zero before training
    about = json.loads((adapter.run_folder(folder) / adapter.ABOUT).read_text())
    assert about["steps"] == 4 and about["parameters"] == sum(tensor.numel() for tensor in file.values())
    lines = (adapter.run_folder(folder) / "training" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[-1])["left"] == 0 and "validation" in json.loads(lines[-1])
    assert recipe.teacher == str(teacher)


def test_stock_diffusers_opens_the_folder_and_generates_the_same(
    trained: tuple[Any, Path], clip: Path, suite: Any
) -> None:
    recipe, folder = trained
    samples = suite.samples(2, 1)[:2]
    references = [suite.reference_image(s) for s in samples]
    drawn = adapter.ImageAdapter(Context(recipe, folder, suite)).generate(references, samples, [3, 4])
    pipe = common.teacher_of(recipe)
    pipe.load_ip_adapter(
        str(adapter.run_folder(folder)),
        weight_name=adapter.FILE,
        image_encoder_pretrained_model_name_or_path=str(clip),
        image_encoder_dtype=torch.float32,
        local_files_only=True,
    )
    (again,) = common.sample_teacher(
        pipe,
        [samples[1].prompt],
        PANEL,
        PANEL,
        common.noise(pipe, [4], PANEL, PANEL),
        recipe,
        ip_adapter_image=references[1],
        negative_ip_adapter_image_embeds=[torch.zeros(1, 1, 12)],
    )
    assert np.abs(np.asarray(again, float) - np.asarray(drawn[1], float)).max() <= 2
    other = adapter.ImageAdapter(Context(recipe, folder, suite)).generate(references[:1], samples[1:], [4])[0]
    assert other.tobytes() != drawn[1].tobytes()  # it uses the reference


def test_a_killed_training_resumes_to_equal_weights(
    trained: tuple[Any, Path], teacher: Path, judges: Path, clip: Path, tmp_path: Path
) -> None:
    recipe, straight = trained
    tiny.make_data(tmp_path / "run")

    def stop(step: int, total: int, text: str) -> None:
        if step == 3 and "loss" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapter.fit(recipe, tmp_path / "run", stop)
    assert not (adapter.run_folder(tmp_path / "run") / adapter.FILE).exists()
    adapter.fit(recipe, tmp_path / "run")
    a, b = (load_file(adapter.run_folder(folder) / adapter.FILE) for folder in (straight, tmp_path / "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_one_is_not_trained_again_and_other_settings_are_another(
    trained: tuple[Any, Path], teacher: Path, judges: Path, clip: Path, suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = trained
    monkeypatch.setattr(adapter, "train", lambda *_: pytest.fail("trained again"))
    adapter.ImageAdapter(Context(recipe, folder, suite)).prepare([], [])
    assert adapter.made_by(make_recipe(teacher, judges, clip, steps=5), folder) != adapter.made_by(recipe, folder)
    assert adapter.made_by(make_recipe(teacher, judges, clip, seed=1), folder) != adapter.made_by(recipe, folder)
    assert adapter.made_by(make_recipe(teacher, judges, clip, rank=1), folder) == adapter.made_by(recipe, folder)


def test_any_embedding_model_is_an_encoder_but_the_one_that_scores(
    teacher: Path, judges: Path, suite: Any, tmp_path: Path
) -> None:
    encoder = adapter.Encoder.load(str(judges / "curator"), "cpu")
    picture = suite.reference_image(suite.samples(2, 1)[0])
    seen = encoder.embed([picture, picture])
    assert seen.shape == (2, 16) and torch.equal(seen[0], seen[1])
    tiny.make_data(tmp_path / "run")
    recipe = make_recipe(teacher, judges, judges / "scorer")
    with raises("judge_conflict", judges / "scorer"):
        adapter.ImageAdapter(Context(recipe, tmp_path / "run", suite)).fingerprint()


def test_what_is_missing_or_does_not_fit_is_one_line(
    trained: tuple[Any, Path], teacher: Path, judges: Path, clip: Path, suite: Any, tmp_path: Path
) -> None:
    recipe, folder = trained
    with raises("run_incomplete", tmp_path, "diptych curate", "evaluate.adapter.path"):
        adapter.ImageAdapter(Context(recipe, tmp_path, suite)).fingerprint()
    values = recipe.values()
    values["evaluate"]["adapter"]["path"] = str(tmp_path)
    named = type(recipe).model_validate(values)
    with raises("path_not_found", tmp_path, "ip_adapter.safetensors"):
        adapter.ImageAdapter(Context(named, tmp_path, suite)).fingerprint()
    pipe = common.teacher_of(recipe)
    state = adapter.read(adapter.run_folder(folder) / adapter.FILE)
    del state["ip_adapter"]["0.to_k_ip.bias"]
    with raises("model_mismatch"):
        adapter.attach(pipe, state)
