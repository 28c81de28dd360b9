"""Screens from PyPI: RapidOCR sees words that are written on a panel, and NudeNet none of what is not there."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from diptych.errors import UsageError
from diptych.judges import detectors
from diptych.pocket import world
from diptych.pocket.render import render
from diptych.recipe.schema import Classifier
from diptych.stages.curate import screens
from raising import raises


def panel(seed: int, size: int = 256) -> Image.Image:
    rng = np.random.default_rng(seed)
    identity = world.sample_identity(rng)
    return Image.fromarray(render(identity, world.sample_scene(rng), size))


def written(image: Image.Image, text: str) -> Image.Image:
    image = image.copy()
    font = ImageFont.load_default(image.height // 8)
    ImageDraw.Draw(image).text((image.width // 10, image.height // 3), text, "white", font, stroke_width=2)
    return image


def settings(model: str, label: str) -> Classifier:
    return Classifier.model_validate({"name": "seen", "model": model, "label": label})


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_words_on_a_panel_are_found_at_any_size_and_a_clean_one_passes(offline: None) -> None:
    pytest.importorskip("rapidocr")
    screen = screens.load(settings("rapidocr", "writing"))
    for size in (256, 1024):
        clean = panel(3, size)
        low, high = screen.scores([clean, written(clean, "Bakery")])
        assert low < 0.5 and high > 0.9
    # Round shapes alone are not writing: they are eyes, wheels and buttons.
    face = Image.new("RGB", (256, 256), "white")
    assert screen.scores([written(face, "O8 00")]) == [0.0]
    (both,) = screens.scores([written(panel(3), "Bakery")], [screen])
    assert list(both) == ["dark", "flat", "blur", "seen"] and both["seen"] > 0.9


def test_nudenet_sees_nothing_on_panels_of_the_pocket_world(offline: None) -> None:
    pytest.importorskip("nudenet")
    screen = screens.load(settings("nudenet", "nudity"))
    assert max(screen.scores([panel(seed) for seed in range(6)])) < 0.5


def test_nudenets_labels_are_the_packages(offline: None) -> None:
    nudenet = pytest.importorskip("nudenet.nudenet")
    ours = detectors.NUDENET.labels
    assert sorted(ours) == sorted(["nudity", *nudenet.__dict__["__labels"]])
    with raises("name_unknown", "classifiers seen", "'nude'", "'nudity'", kind=UsageError):
        screens.check(settings("nudenet", "nude"))


@pytest.mark.parametrize("package", detectors.DETECTORS)
def test_the_weights_are_the_fingerprint(package: str) -> None:
    pytest.importorskip(package)
    detector = detectors.DETECTORS[package]
    weights = [*detector.folder().rglob("*.onnx")]
    assert weights and sum(path.stat().st_size for path in weights) > 2**20
    assert screens.fingerprint(package) == detector.fingerprint()


@pytest.mark.parametrize("package", detectors.DETECTORS)
def test_a_detector_that_is_not_installed_is_an_error_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(detectors, "find_spec", lambda name: None)
    label = detectors.DETECTORS[package].labels[0]
    for act in (screens.check, screens.load):
        with raises("dependency_missing", package, "pip install 'diptych[screens]'", kind=UsageError):
            act(settings(package, label))
