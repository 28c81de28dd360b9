"""Embedding judges and the field's metrics, on tiny CLIP and DINO models of the real classes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_images as toy
from PIL import Image

from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.evaluate import harness
from diptych.evaluate.evaluation import Evaluation, Judge
from diptych.evaluate.methods import METHODS
from diptych.evaluate.scoring import judging
from diptych.judges.embedding import Clip, EmbeddingJudge
from raising import raises


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a CLIP, a DINO (ViT without a pooler) and a DINOv2, random and small."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    from diptych.pocket.pretrain import tokenizers

    root = tmp_path_factory.mktemp("metrics")
    torch.manual_seed(0)
    tokenizer, _ = tokenizers.make_tokenizers()
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    clip = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(clip).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        root / "clip"
    )
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(root / "dino")
    Dinov2Model(Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(root / "dinov2")
    for name in ("dino", "dinov2"):
        processor.save_pretrained(root / name)
    return {name: str(root / name) for name in ("clip", "dino", "dinov2")}


@pytest.fixture
def job(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setitem(METHODS, "ignores", toy.Ignores)
    monkeypatch.setitem(METHODS, "good", toy.Good)
    metrics = [
        f"clip-i={models['clip']}",
        f"clip-t={models['clip']}",
        f"dino={models['dino']}",
        f"dinov2={models['dinov2']}",
    ]
    return Evaluation(
        suite="dreambench++",
        data=str(toy.make_folder(tmp_path / "data")),
        baselines=["copy", "ignores", "good"],
        prompts=9,
        size=32,
        device="cpu",
        batch_size=27,
        judge=Judge(scorer=models["dino"], text=models["clip"]),
        metrics=metrics,
        bootstrap=50,
    )


def eye(images: Sequence[Image.Image]) -> np.ndarray:
    """An embedding that sees the subject of the toy world, and nothing around it."""
    rows = np.array([image.getpixel((image.width // 2, image.height // 2)) for image in images], float) - 128
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_copying_and_ignoring_the_reference_score_nothing_with_an_embedding_judge(
    job: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging.VisionModels, "embed", lambda *_: eye)
    found = harness.evaluate(job.model_copy(update={"references": 3, "metrics": []}), tmp_path / "out")
    copy, ignores, good = (found["methods"][name] for name in ("copy", "ignores", "good"))
    assert good["cp"] > 0.95 and copy["cp"] > 0.95 and copy["copy_rate"] == 1
    # Even for a random CLIP, one image fits each of nine prompts equally well on average.
    assert copy["pf"] == pytest.approx(0, abs=1e-6) and copy["cp_pf"] == pytest.approx(0, abs=1e-6)
    assert ignores["cp"] < 0.3 and ignores["cp_pf"] < 0.3


def test_metrics_are_the_plain_cosines_of_the_models(job: Evaluation, models: dict[str, str], tmp_path: Path) -> None:
    few = job.model_copy(update={"references": 2, "prompts": 1, "seeds": [0, 1], "baselines": ["good"]})
    found = harness.evaluate(few, tmp_path / "out")
    from diptych.data.images import open_image
    from diptych.evaluate.results import read_scores

    rows = list(Dataset(tmp_path / "out" / "samples" / "good"))
    lines = {line["id"]: line for line in read_scores(tmp_path / "out")}
    dino, clip = EmbeddingJudge.load(models["dino"]), Clip.load(models["clip"])
    for row in rows:
        image, reference = open_image(row["image"]), open_image(row["reference"])
        a, b = dino.embed([image])[0], dino.embed([reference])[0]
        text = clip.texts([row["prompt"]])[0]
        assert lines[row["id"]]["dino"] == pytest.approx(float(a @ b), abs=2e-5)
        assert lines[row["id"]]["clip_t"] == pytest.approx(float(clip.images([image])[0] @ text), abs=2e-5)
    good = found["methods"]["good"]
    assert good["diversity"] == pytest.approx(0, abs=1e-5), "both seeds gave the same picture"
    for name in ("clip_i", "clip_t", "dino", "dinov2"):
        assert good["ci95"][name][0] <= good[name] <= good["ci95"][name][1]
        about = found["judges"][name]
        assert len(about["fingerprint"]) == 64 and about["preprocessing"]["image_processor_type"]


def test_diversity_is_the_distance_between_the_seeds_images(models: dict[str, str]) -> None:
    from diptych.data.images import image_cell
    from diptych.evaluate.scoring.judging import Diversity, VisionModels

    images = [Image.new("RGB", (32, 32), c) for c in ("red", "blue", "red", "red", "green")]
    rows = [{"sample": "ab"[i > 1], "image": image_cell(image)} for i, image in enumerate(images)]
    rows[-1]["sample"] = "c"
    found = [values["diversity"] for values in Diversity(models["dino"], VisionModels("cpu")).score(rows) if values]
    assert found[0] == found[1] > 0.001 and found[2] == pytest.approx(found[3], abs=1e-6) == pytest.approx(0, abs=1e-6)
    assert found[4] is None


def test_a_text_is_embedded_alone_or_among_others_alike(models: dict[str, str]) -> None:
    clip = Clip.load(models["clip"])
    texts = ["a cat", "a cat on a beach in blue light holding a ball"]
    assert np.array_equal(clip.texts(texts)[0], clip.texts(texts[:1])[0])
    assert not np.allclose(clip.texts(texts)[0], clip.texts(texts)[1])
    with pytest.raises(UserError, match="embed texts"):
        Clip.load(models["dino"])


def test_another_model_of_a_metric_gives_another_number_and_is_scored_again(
    job: Evaluation, models: dict[str, str], tmp_path: Path
) -> None:
    few = job.model_copy(update={"references": 2, "prompts": 2, "baselines": ["good"]})
    first = harness.evaluate(few, tmp_path / "out")
    other = few.model_copy(update={"metrics": [f"dino={models['dinov2']}"]})
    second = harness.evaluate(other, tmp_path / "out", "score")
    assert second["methods"]["good"]["dino"] == first["methods"]["good"]["dinov2"] != first["methods"]["good"]["dino"]
    assert "clip_i" not in second["methods"]["good"]


def test_what_cannot_be_scored_is_reported_before_generation(job: Evaluation, tmp_path: Path) -> None:
    for change, fact in (
        ({"metrics": ["dine"]}, "'dino'"),
        ({"metrics": ["dino=/nowhere"]}, "/nowhere"),
        ({"judge": Judge(kind="pocket")}, "--judge embedding"),
        ({"baselines": ["text_onli"]}, "'text_only'"),
        ({"baselines": ["text_only"]}, "--base"),
        ({"baselines": []}, "--baseline"),
    ):
        with pytest.raises(UserError, match=fact):
            harness.evaluate(job.model_copy(update=change), tmp_path / "out")
    assert not (tmp_path / "out" / "samples").exists()


def test_changed_references_are_not_mixed_with_images_of_the_old_ones(job: Evaluation, tmp_path: Path) -> None:
    few = job.model_copy(update={"references": 2, "prompts": 2, "baselines": ["good"], "metrics": []})
    harness.evaluate(few, tmp_path / "out", "generate")
    shutil.copy(*(Path(str(job.data)) / "data" / "images" / "object" / name for name in ("00.jpg", "01.jpg")))
    with raises("run_incomplete", tmp_path / "out" / "samples"):
        harness.evaluate(few, tmp_path / "out", "score")


def test_one_reference_alone_needs_another_judge(job: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "own" / "references").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "own" / "references" / "a.png")
    (tmp_path / "own" / "prompts.txt").write_text("a {} in snow\n")
    alone: dict[str, Any] = {"suite": "folder", "data": str(tmp_path / "own"), "baselines": ["copy"]}
    with raises("judge_invalid", "--judge vlm"):
        harness.evaluate(job.model_copy(update=alone), tmp_path / "out")
