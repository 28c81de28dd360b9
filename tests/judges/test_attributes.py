"""The attribute reader: a softmax within each group, and an identity that is no class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.judges.attributes import AttributeReader
from raising import raises

LABELS = ["place:beach", "light:left", "identity:1", "place:moon", "identity:0", "light:right", "light:above"]


def make_reader(folder: Path, labels: list[str]) -> Any:
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", id2label=names)
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return model


def test_each_group_is_read_on_its_own(tmp_path: Path) -> None:
    model = make_reader(tmp_path, LABELS)
    reader = AttributeReader.load(str(tmp_path))
    assert reader.groups == {"place": ("beach", "moon"), "light": ("left", "right", "above")}
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(40)]
    readings = reader.read(pictures)
    assert len(readings) == 40
    with torch.no_grad():
        logits = model(**reader.vision.processor(images=pictures[:3], return_tensors="pt")).logits.double().numpy()
    for row, reading in zip(logits, readings, strict=False):
        light = row[[1, 5, 6]]
        chances = np.exp(light) / np.exp(light).sum()
        assert reading.values["light"] == ("left", "right", "above")[int(light.argmax())]
        assert reading.probabilities["light"] == pytest.approx(chances.max(), abs=1e-5)
        assert reading.values["place"] == ("beach" if row[0] > row[3] else "moon")
        wanted = row[[4, 2]] / np.linalg.norm(row[[4, 2]])
        assert np.allclose(reading.identity, wanted, atol=1e-4) and reading.identity.dtype == np.float32
        assert set(reading.values) == set(reading.probabilities) == {"place", "light"}
    assert reader.read([]) == [] and len(reader.fingerprint) == 64


@pytest.mark.parametrize(("labels", "fact"), [(["cat", "dog"], "'cat'"), (["identity:a", "x:y"], "not numbers")])
def test_a_classifier_that_is_not_a_reader_is_rejected(labels: list[str], fact: str, tmp_path: Path) -> None:
    make_reader(tmp_path, labels)
    with raises("judge_invalid", fact, tmp_path):
        AttributeReader.load(str(tmp_path))
