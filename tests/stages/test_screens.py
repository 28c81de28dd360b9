"""Screens tell black, empty and blurred panels from good ones at any size; classifiers are asked by their labels."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from diptych import recipe as recipes
from diptych.data import verdicts
from diptych.data.engine import Failure
from diptych.data.images import image_cell
from diptych.errors import UsageError, UserError
from diptych.judges.vlm import Judgement
from diptych.recipe.schema import Classifier, Screens
from diptych.stages.curate import screens
from diptych.stages.curate.stage import CurateStage
from raising import raises


def photo(side: int, seed: int = 0) -> Image.Image:
    """Noise with the spectrum of photographs (amplitude 1 / frequency), the same picture at every size."""
    rng = np.random.default_rng(seed)
    waves = np.fft.fft2(rng.standard_normal((1024, 1024, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(1024)[:, None], np.fft.fftfreq(1024)[None])
    frequency[0, 0] = np.inf
    values = np.fft.ifft2(waves / frequency[..., None], axes=(0, 1)).real
    values = 0.5 + 0.18 * values / values.std()
    whole = Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))
    return whole.resize((side, side), Image.Resampling.BOX)


def blurred(image: Image.Image, share: float) -> Image.Image:
    """Out of focus by this share of its side."""
    return image.filter(ImageFilter.GaussianBlur(share * image.width))


# ---- numbers


def test_blur_lowers_sharpness_step_by_step() -> None:
    for side in (64, 512):
        steps = [screens.measure(blurred(photo(side), share))["blur"] for share in (0, 0.005, 0.01, 0.02, 0.04)]
        assert steps == sorted(steps, reverse=True) and steps[0] > 20 * steps[4], steps


def test_sharpness_is_that_of_the_picture_and_not_of_its_size_or_contrast() -> None:
    image = blurred(photo(1024), 0.01)
    found = [screens.measure(image.resize((side, side), Image.Resampling.BOX))["blur"] for side in (256, 512, 1024)]
    assert found == pytest.approx([found[0]] * 3, rel=0.1)
    pale = Image.blend(Image.new("RGB", image.size, (128, 128, 128)), image, 0.5)
    assert screens.measure(pale)["blur"] == pytest.approx(found[2], rel=0.15)


def test_white_noise_is_as_sharp_as_it_gets() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    assert screens.sharp(noise / 255) == pytest.approx(1, abs=0.05)


def test_a_night_with_a_lamp_is_not_black() -> None:
    night = ImageEnhance.Brightness(photo(64)).enhance(0.08)
    assert screens.measure(night)["dark"] < 0.1
    night.paste((255, 240, 180), (20, 20, 36, 36))
    assert screens.measure(night)["dark"] > 0.5


def test_an_empty_panel_is_flat_and_colours_of_one_brightness_are_not() -> None:
    empty = screens.measure(Image.new("RGB", (64, 64), (120, 130, 140)))
    assert (empty["flat"], empty["blur"]) == (0, 0) and empty["dark"] == pytest.approx(0.5, abs=0.02)
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (200, 0, 0), (0, 102, 0)  # equally bright in grey
    assert screens.measure(Image.fromarray(stripes))["flat"] > 0.2


def test_panels_of_any_size_and_mode_are_measured() -> None:
    for mode, size in (("L", (1, 1)), ("RGBA", (2, 700)), ("P", (16, 16)), ("RGB", (3, 3))):
        found = screens.measure(Image.new(mode, size))
        assert list(found) == ["dark", "flat", "blur"] and set(found.values()) == {0.0}


def test_scores_survive_the_evidence_unchanged() -> None:
    found = screens.scores([photo(64, seed) for seed in range(3)])
    assert json.loads(json.dumps(found)) == found


# ---- limits


def test_the_first_screen_that_either_panel_fails_is_named() -> None:
    settings = Screens.model_validate(
        {"dark": 0.1, "blur": 0.02, "classifiers": [{"name": "nsfw", "model": "m", "label": "yes", "most": 0.4}]}
    )
    good = {"dark": 0.5, "flat": 0.0, "blur": 0.03, "nsfw": 0.4}
    assert settings.limits() == {"dark": {"least": 0.1}, "blur": {"least": 0.02}, "nsfw": {"most": 0.4}}
    for bad, name in (
        ({}, ""),
        ({"nsfw": 0.41}, "nsfw"),
        ({"nsfw": 1.0, "blur": 0.01}, "blur"),
        ({"dark": 0.0}, "dark"),
    ):
        for pair in ((good, {**good, **bad}), ({**good, **bad}, good)):
            assert verdicts.failed_screen(pair, settings.limits()) == name
    assert verdicts.failed_screen(({**good, "nsfw": float("nan")}, good), settings.limits()) == "nsfw"
    assert verdicts.failed_screen(({"dark": 0.5}, good), settings.limits()) == "blur"


CLASSIFIERS = "curate.screens.classifiers"


@pytest.mark.parametrize(
    ("sets", "fact"),
    [
        (["curate.screens.blurr=1"], "'blur'"),
        (["curate.screens.dark=2"], "curate.screens.dark"),
        (["curate.duplicates.hash=9"], "curate.duplicates.hash"),
        ([CLASSIFIERS + "=[{name: a, model: m}]"], f"{CLASSIFIERS}.label"),
        ([CLASSIFIERS + "=[{name: a, model: m, lable: x}]"], "'label'"),
        ([CLASSIFIERS + "=[{name: A b, model: m, label: x}]"], f"{CLASSIFIERS}.name"),
        ([CLASSIFIERS + "=[{name: blur, model: m, label: x}]"], "'blur'"),
        ([CLASSIFIERS + "=[{name: a, model: m, label: x}, {name: a, model: m, label: y}]"], "'a'"),
    ],
)
def test_wrong_settings_are_named(sets: list[str], fact: str) -> None:
    with pytest.raises(UsageError, match=re.escape(fact)):
        recipes.load("pocket", sets)


def test_a_recipe_without_screens_or_duplicates_is_the_recipe_it_was() -> None:
    plain = recipes.load("pocket")
    old = plain.values()
    for key in ("screens", "duplicates", "vlm"):
        assert old["curate"].pop(key) is None
    assert recipes.check(old, "an older recipe.yaml") == plain
    asked = [["curate.screens.dark=0.1"], ["curate.duplicates.hash=4"], ["curate.duplicates={}"]]
    prints = [recipes.load("pocket", sets).fingerprint("curate") for sets in asked]
    assert len({plain.fingerprint("curate"), *prints}) == 3 and prints[1] == prints[2]


# ---- classifiers


def open_classifier(folder: Path, **more: Any) -> screens.PanelClassifier:
    settings = {"name": "seen", "model": str(folder), "label": "nsfw", **more}
    return screens.PanelClassifier.load(Classifier.model_validate(settings))


def test_a_classifier_gives_its_labels_probability_of_every_panel(classifier: Path) -> None:
    import torch

    panels = [photo(64, seed) for seed in range(35)]  # more than a batch of 32
    by_label = {label: open_classifier(classifier, label=label).scores(panels) for label in ("normal", "nsfw", "text")}
    assert np.sum(list(by_label.values()), axis=0) == pytest.approx(np.ones(35), abs=1e-5)
    own = open_classifier(classifier)
    pixels = own.vision.processor(images=panels[34:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = own.vision.model(pixel_values=pixels).logits.softmax(1)[0, 1].item()
    assert by_label["nsfw"][34] == pytest.approx(expected, abs=1e-5) and len(set(by_label["nsfw"])) > 5
    assert [s["seen"] for s in screens.scores(panels, [own])] == by_label["nsfw"]


def test_labels_that_stand_alone_have_probabilities_of_their_own(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "many")
    config = json.loads((tmp_path / "many/config.json").read_text())
    (tmp_path / "many/config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    panels = [photo(64, seed) for seed in range(3)]
    sums = np.sum([open_classifier(tmp_path / "many", label=one).scores(panels) for one in config["label2id"]], axis=0)
    assert np.abs(sums - 1).max() > 0.01


def test_a_label_that_is_not_there_and_a_model_that_is_not_whole_are_told(classifier: Path, judge: Path) -> None:
    with raises("name_unknown", "classifiers seen", "'nfsw'", "normal, nsfw, text", "'nsfw'", kind=UsageError):
        open_classifier(classifier, label="nfsw")
    with pytest.raises(UserError, match=r"lack classifier"):
        open_classifier(judge, label="LABEL_0")


# ---- calls saved


class Colours:
    """An embedding judge that needs no torch: the mean colour."""

    fingerprint = "c" * 64

    def embed(self, images: list[Any]) -> np.ndarray:
        found = np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(1)


class Asked:
    """A vision-language judge that says yes, and remembers what it was asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def decide(self, pictures: Any) -> dict[str, Judgement]:
        names = [name for name, *_ in pictures]
        self.names += names
        return {name: Judgement("same", 0.9, "", ()) for name in names}


def test_a_screened_pair_costs_no_call_and_keeps_its_scores() -> None:
    black = Image.fromarray(np.random.default_rng(0).integers(0, 6, (64, 64, 3), dtype=np.uint8))
    rows = []
    for number, panels in enumerate([(photo(64, 1), photo(64, 2)), (photo(64, 3), black)]):
        whole = Image.new("RGB", (128, 64))
        whole.paste(panels[0], (0, 0))
        whole.paste(panels[1], (64, 0))
        row = {"id": f"g-{number:06d}", "image": image_cell(whole), "prompt": "grid", "panels": ["a cat", "a cat"]}
        row |= {"subject": "cat", "task": "subject", "seed": 0, "rows": 1, "cols": 2, "panel_size": 64, "model": "m"}
        rows.append(row)
    settings = {"screens": {"dark": 0.1}, "thresholds": {"seam": -1}, "vlm": {"local": "none"}}
    recipe = recipes.check({"name": "t", "device": "cpu", "threads": 1, "curate": settings}, "test")
    vlm = Asked()
    found = CurateStage(recipe).work(Colours(), vlm)(rows)  # pyright: ignore[reportArgumentType]
    good, bad = (list(pairs) for pairs in found if not isinstance(pairs, Failure))
    assert vlm.names == ["c-000000-01"]
    assert [pair["reason"] for pair in (*good, *bad)] == ["kept", "kept", "screen: dark", "screen: dark"]
    assert json.loads(bad[0]["evidence"])["screens"]["target"]["dark"] < 0.1 and np.isnan(bad[0]["similarity"])
    free = verdicts.Bounds(screens={})
    assert verdicts.judged_again(bad[0], recipe.curate.thresholds, free) == (False, "unasked")
