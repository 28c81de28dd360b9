"""The embedding judge: any stock vision model, unit vectors, the same bits again; nothing random goes unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.errors import UsageError
from diptych.judges.embedding import EmbeddingJudge
from diptych.utils import models
from raising import raises

SIZE = {"shortest_edge": 32}


def save(folder: Path, model: Any, processor: Any = None) -> Path:
    from transformers import ViTImageProcessorPil

    model.save_pretrained(folder)
    (processor or ViTImageProcessorPil(size={"height": 32, "width": 32})).save_pretrained(folder)
    return folder


def vit(**more: Any) -> Any:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    return ViTModel(config, **more)


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    text = {**tower, "vocab_size": 20, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 20], depths=[1, 1], layer_type="basic"))


def regnet() -> Any:
    from transformers import RegNetConfig, RegNetModel

    torch.manual_seed(0)
    return RegNetModel(RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8))


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    )


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (s, s, 3), dtype=np.uint8)) for s in (32, 40, 64, 32, 50)]


def expected(model: Any, judge: EmbeddingJudge, pictures: list[Image.Image]) -> np.ndarray:
    """The embedding by hand, from the model's own outputs."""
    pixels = judge.vision.processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if hasattr(model, "visual_projection"):
            out = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        else:
            out = model(pixel_values=pixels).pooler_output.flatten(1)
    return torch.nn.functional.normalize(out, dim=1).numpy()


@pytest.mark.parametrize(("make", "width"), [(resnet, 20), (regnet, 16), (vit, 16), (dinov2, 16), (clip, 12)])
def test_any_stock_model_gives_unit_vectors(make: Any, width: int, tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = make()
    judge = EmbeddingJudge.load(str(save(tmp_path / "m", model)))
    embeddings = judge.embed(pictures)
    assert embeddings.shape == (5, width) and embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert np.allclose(embeddings, expected(model.eval(), judge, pictures), atol=1e-5)
    assert np.array_equal(embeddings, judge.embed(pictures))
    assert np.allclose(judge.similarity(embeddings, embeddings), 1, atol=1e-6)
    assert judge.similarity(embeddings[:1], embeddings[1:2]) < 0.9999
    assert judge.fingerprint == models.fingerprint(tmp_path / "m")


def test_a_pooler_that_the_files_lack_is_passed_over(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = vit(add_pooling_layer=False)  # as DINO's checkpoints are: AutoModel would add a random one
    judge = EmbeddingJudge.load(str(save(tmp_path / "m", model)))
    pixels = judge.vision.processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = model.eval()(pixel_values=pixels).last_hidden_state[:, 0]
    assert np.allclose(judge.embed(pictures), torch.nn.functional.normalize(token, dim=1).numpy(), atol=1e-5)


def test_more_images_than_a_batch_come_in_order(tmp_path: Path) -> None:
    judge = EmbeddingJudge.load(str(save(tmp_path / "m", resnet())))
    rng = np.random.default_rng(1)
    many = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(70)]
    embeddings = judge.embed(many)
    assert len(embeddings) == 70
    assert np.allclose(embeddings[[0, 31, 32, 69]], judge.embed([many[i] for i in (0, 31, 32, 69)]), atol=1e-5)


def test_the_processor_runs_on_pillow(tmp_path: Path) -> None:
    judge = EmbeddingJudge.load(str(save(tmp_path / "m", resnet())))
    assert type(judge.vision.processor).__name__.endswith("Pil")


def test_grayscale_and_alpha_are_accepted(tmp_path: Path, pictures: list[Image.Image]) -> None:
    judge = EmbeddingJudge.load(str(save(tmp_path / "m", resnet())))
    assert judge.embed([pictures[0].convert("L"), pictures[0].convert("RGBA")]).shape == (2, 20)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path / "m", resnet())
    state = load_file(folder / "model.safetensors")
    gone = next(key for key in state if "embedder" in key and key.endswith("weight"))
    save_file({k: v for k, v in state.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with raises("model_incomplete", gone):
        EmbeddingJudge.load(str(folder))


def test_a_folder_that_is_not_a_vision_model_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with raises("judge_invalid", "curator", tmp_path / "empty"):
        EmbeddingJudge.load(str(tmp_path / "empty"))
    with raises("model_not_found", "no such model", kind=UsageError):
        EmbeddingJudge.load("no such model", role="scorer")
