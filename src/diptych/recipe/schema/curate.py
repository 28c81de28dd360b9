"""Section `curate` of a recipe: stage 3, which pairs are accepted, and by which model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import Vllm
from diptych.recipe.schema.base import Section


class Thresholds(Section):
    """Limits that a pair must pass. Changing one needs no new judge call, because candidates store their scores."""

    same: float = 0.5
    """Minimum similarity of the two subjects, as the judge scores it."""
    near_copy: float = Field(default=0.045, ge=0)
    """Minimum distance of the two panels in pixel values after alignment. Below it, the target is a copy of the
    reference."""
    seam: float = Field(default=0.0, ge=-1, le=1)
    """Minimum strength of the seam between the panels, -1 to 1. Below it, the image is not a grid; -1 accepts all."""


class Vlm(Section):
    """A vision-language model that decides in stage 3, by the task's questions. `thresholds.same` is then a limit on
    its score: above 0.5 most votes are "same", and 1 means all of them, with full confidence."""

    endpoint: Endpoint | None = None
    """OpenAI-compatible server with the model that judges. `docs/endpoints.md` explains its keys."""
    local: str | None = Field(default=None, min_length=1)
    """Transformers model on this machine that judges: a folder, or a hub name."""
    vllm: Vllm | None = None
    """Model that judges and that vLLM runs inside the stage. `docs/endpoints.md` explains its keys."""
    votes: int = Field(default=1, ge=1, le=99)
    """Votes for each pair. The majority of the valid replies decides. More than one needs a temperature above 0."""
    prefilter: float = Field(default=-1.0, ge=-1, le=1)
    """Minimum similarity, by the embedding model `curate.judge`, of the pairs that the model sees; -1 is all pairs."""
    captions: bool = False
    """Also let the model write the captions and instructions of the accepted pairs."""
    cache: str | None = Field(default=None, min_length=1)
    """SQLite file for the model's replies. Several runs may share it. null is `answers.sqlite` in the run's folder."""

    @property
    def model(self) -> str:
        """The model that decides, by name."""
        served = self.endpoint or self.vllm
        return self.local or (served.model if served else "")

    @model_validator(mode="after")
    def _one_that_can_vote(self) -> Vlm:
        named = {key: getattr(self, key) for key in ("endpoint", "local", "vllm") if getattr(self, key) is not None}
        if len(named) != 1:
            raise ValueError("set exactly one of endpoint (base_url and model), local, and vllm (model)")
        (key,) = named
        if self.votes > 1 and getattr(named[key], "temperature", 0) == 0:
            fix = "" if key == "local" else f"set {key}.temperature, for instance to 0.7, or "
            raise ValueError(f"{self.votes} votes at temperature 0 are all the same; {fix}set votes: 1")
        return self


class Classifier(Section):
    """An image classifier that inspects every panel, for instance for text or for content that is not safe for work."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the screen. A pair that it rejects has the reason `screen: NAME`."""
    model: str = Field(min_length=1)
    """Transformers image-classification model: a folder, or a hub name. Two detectors need no download: `rapidocr` with
    the label `writing`, and `nudenet` with the label `nudity`. `pip install 'diptych[screens]'` installs them."""
    label: str = Field(min_length=1)
    """Label of the model that a panel must not have."""
    most: float = Field(default=0.5, ge=0, le=1)
    """Maximum probability of the label that a panel may have."""


class Screens(Section):
    """Tests of single panels, before two are compared. A test that is null rejects nothing; its score is stored."""

    dark: float | None = Field(default=None, ge=0, le=1)
    """Minimum brightness, 0 to 1, of the brightest twentieth of a panel. A night scene with a lamp in it passes 0.1."""
    flat: float | None = Field(default=None, ge=0, le=1)
    """Minimum contrast: standard deviation of the pixels from the panel's mean color, where white is 1."""
    blur: float | None = Field(default=None, ge=0, le=1)
    """Minimum sharpness, measured at no more than 256 pixels a side. 0 is a soft gradient, 1 is white noise."""
    classifiers: list[Classifier] = Field(default=[])
    """Image classifiers that also inspect each panel, in this order."""

    def values(self) -> dict[str, float | None]:
        """Returns the limit of every screen by its name, in the order of the tests; None where it rejects nothing."""
        measured = {name: getattr(self, name) for name in type(self).model_fields if name != "classifiers"}
        return measured | {classifier.name: classifier.most for classifier in self.classifiers}

    def limits(self) -> dict[str, dict[str, float]]:
        """Returns the limits that can reject: `{"dark": {"least": 0.1}, "nsfw": {"most": 0.5}}`, in the order of the
        tests."""
        classified = {classifier.name for classifier in self.classifiers}
        return {
            name: {"most" if name in classified else "least": value}
            for name, value in self.values().items()
            if value is not None
        }

    @model_validator(mode="after")
    def _one_of_each_name(self) -> Screens:
        taken = set(type(self).model_fields)
        for classifier in self.classifiers:
            if classifier.name in taken:
                raise ValueError(
                    f"the name '{classifier.name}' is taken; give each classifier a name that no screen has"
                )
            taken.add(classifier.name)
        return self


class Copies(Section):
    """Tests for a target that is a copy of its reference although the pixels differ: another brightness or tint, a
    mirror image, the same image generated again. Not for aligned tasks, whose panels are meant to be alike."""

    hash: int | None = Field(default=6, ge=0, le=20)
    """Maximum number of bits, of the 64 of a perceptual hash, in which a copy differs from the reference or from its
    mirror image. Higher values reject more pairs. null measures and rejects nothing."""
    embedding: float | None = Field(default=None, gt=0, le=1)
    """Cosine similarity of the two panels' embeddings, by `curate.judge`, from which the target is a copy. null rejects
    nothing."""

    def limits(self) -> dict[str, float]:
        """Returns the limits that can reject: `{"hash": 4, "embedding": 0.98}`."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Duplicates(Section):
    """Tests for pairs that repeat an earlier pair of the run. The first is accepted, the others are rejected."""

    hash: int | None = Field(default=4, ge=0, le=8)
    """Maximum number of bits, of the 64 of a perceptual hash, in which each panel of a repeat differs from the earlier
    pair's. Higher values reject more pairs. null stores the hashes and rejects nothing."""
    embedding: float | None = Field(default=None, gt=0, le=1)
    """Cosine similarity, by the embeddings of `curate.judge`, from which each panel repeats the earlier pair's. It
    finds the same content that was generated again. null stores the embeddings and rejects nothing."""


class Curate(Section):
    """Stage 3: cut panels, screen them, compare them, and caption the accepted pairs."""

    judge: str = Field(default="pocket", min_length=1)
    """Embedding model that compares panels: `pocket`, a folder, or a hub name."""
    batch_size: int = Field(default=32, ge=1)
    """Grids to judge at once."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """File format of stored panels. `png` and `webp` are lossless; `jpeg` (quality 95) is the fastest to write."""
    screens: Screens | None = None
    """Tests of single panels. null runs none and measures nothing."""
    copies: Copies | None = None
    """Tests for copies, in addition to `thresholds.near_copy`. null runs none and measures nothing."""
    duplicates: Duplicates | None = None
    """Tests for repeats among the run's pairs. null runs none and stores neither hashes nor embeddings."""
    thresholds: Thresholds = Thresholds()
    """Limits that a pair must pass."""
    vlm: Vlm | None = None
    """Vision-language model that decides in place of `curate.judge`. null lets `curate.judge` decide."""

    def further(self) -> dict[str, float | None]:
        """Returns the limits of the optional tests that are on: `{"screens.dark": 0.1, "copies.hash": 6}`. None rejects
        nothing."""
        limits: dict[str, float | None] = {}
        if self.screens is not None:
            limits |= {f"screens.{name}": value for name, value in self.screens.values().items()}
        for name, tests in (("copies", self.copies), ("duplicates", self.duplicates)):
            if tests is not None:
                limits |= {f"{name}.{key}": value for key, value in tests.model_dump().items()}
        return limits
