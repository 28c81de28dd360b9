"""The recipe's section `curate`: stage 3, which pairs are kept, and who decides."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import Vllm
from diptych.recipe.schema.base import Section


class Thresholds(Section):
    """What keeps a pair. Changing one costs no new judge call: candidates keep their numbers."""

    same: float = 0.5
    """Least similarity of the two subjects, by the judge."""
    near_copy: float = Field(default=0.045, ge=0)
    """Least distance of the panels in pixels after alignment: below it the target is a copy."""
    seam: float = Field(default=0.0, ge=-1, le=1)
    """Least strength of the seam between the panels, -1 to 1: below it the image is no grid; -1 takes everything."""


class Vlm(Section):
    """A vision-language model that decides in stage 3, by the task's questions. `thresholds.same` is then on its scale:
    above 0.5 most votes say same, 1 is all of them and certain."""

    endpoint: Endpoint | None = None
    """An OpenAI-compatible server; its keys are in `llm/endpoint.py` and docs/endpoints.md."""
    local: str | None = Field(default=None, min_length=1)
    """Or a transformers model on this machine: a folder, or a hub name."""
    vllm: Vllm | None = None
    """Or a model that vLLM runs inside the stage; its keys are in `llm/vllm.py` and docs/endpoints.md."""
    votes: int = Field(default=1, ge=1, le=99)
    """Times each pair is asked about; the majority of valid answers decides. Several need a temperature above 0."""
    prefilter: float = Field(default=-1.0, ge=-1, le=1)
    """Least similarity, by the embedding model `judge`, of pairs it is asked about at all; -1 asks about every pair."""
    captions: bool = False
    """It also writes the captions and instructions of the pairs that are kept."""
    cache: str | None = Field(default=None, min_length=1)
    """SQLite file of its answers, which runs may share; null is answers.sqlite in the run's folder."""

    @property
    def model(self) -> str:
        """Who decides, by name."""
        asked = self.endpoint or self.vllm
        return self.local or (asked.model if asked else "")

    @model_validator(mode="after")
    def _one_that_can_vote(self) -> Vlm:
        named = {key: getattr(self, key) for key in ("endpoint", "local", "vllm") if getattr(self, key) is not None}
        if len(named) != 1:
            raise ValueError("name one model: either endpoint (base_url and model) or local or vllm (model)")
        (key,) = named
        if self.votes > 1 and getattr(named[key], "temperature", 0) == 0:
            fix = "a local model samples nothing" if key == "local" else f"set {key}.temperature, for instance to 0.7"
            raise ValueError(f"{self.votes} votes at temperature 0 are one and the same; {fix}, or ask for one vote")
        return self


class Classifier(Section):
    """An image classifier that looks at every panel: for writing in it, for what is not safe for work, …"""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Of the screen; a pair that it refuses has the reason `screen: NAME`."""
    model: str = Field(min_length=1)
    """A transformers image-classification model: a folder, or a hub name."""
    label: str = Field(min_length=1)
    """Which of the model's labels is meant."""
    most: float = Field(default=0.5, ge=0, le=1)
    """Largest probability of it that a panel may have."""


class Screens(Section):
    """Tests of single panels, before two are compared. A test that is null refuses nothing; its number is kept."""

    dark: float | None = Field(default=None, ge=0, le=1)
    """Least brightness, 0 to 1, of a panel's brightest twentieth; a night with a lamp in it passes 0.1."""
    flat: float | None = Field(default=None, ge=0, le=1)
    """Least contrast: standard deviation of the pixels around the panel's mean colour, white being 1."""
    blur: float | None = Field(default=None, ge=0, le=1)
    """Least sharpness, at no more than 256 pixels a side: 0 is one soft gradient, 1 is white noise."""
    classifiers: list[Classifier] = Field(default=[])
    """Models that look as well, in this order."""

    def values(self) -> dict[str, float | None]:
        """Every screen's threshold by its name, in the order of the tests; null where it refuses nothing."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "classifiers"}
        return own | {classifier.name: classifier.most for classifier in self.classifiers}

    def limits(self) -> dict[str, dict[str, float]]:
        """What refuses: `{"dark": {"least": 0.1}, "nsfw": {"most": 0.5}}`, in the order of the tests."""
        looked = {classifier.name for classifier in self.classifiers}
        return {
            name: {"most" if name in looked else "least": value}
            for name, value in self.values().items()
            if value is not None
        }

    @model_validator(mode="after")
    def _one_of_each_name(self) -> Screens:
        taken = set(type(self).model_fields)
        for classifier in self.classifiers:
            if classifier.name in taken:
                raise ValueError(f"the name '{classifier.name}' is taken; give each classifier one of its own")
            taken.add(classifier.name)
        return self


class Copies(Section):
    """Panels of one pair that show one picture though their pixels differ: another brightness or tint, mirrored, drawn
    anew. Not for aligned tasks, whose panels are meant to be alike."""

    hash: int | None = Field(default=6, ge=0, le=20)
    """Bits, of the 64 of a perceptual hash, by which the target may differ from the reference, or from its mirror
    image, and still be a copy. null measures and refuses nothing."""
    embedding: float | None = Field(default=None, gt=0, le=1)
    """Cosine of the two panels' embeddings, by `judge`, from which the target is a copy. null refuses nothing."""

    def limits(self) -> dict[str, float]:
        """What refuses: `{"hash": 4, "embedding": 0.98}`."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Duplicates(Section):
    """Pairs that show again what an earlier pair of the run shows: the first stays, the others are refused."""

    hash: int | None = Field(default=4, ge=0, le=8)
    """Bits, of the 64 of a perceptual hash, by which each panel may differ from the earlier pair's and still repeat it.
    null keeps the hashes and refuses nothing."""
    embedding: float | None = Field(default=None, gt=0, le=1)
    """Cosine from which each panel repeats the earlier pair's, by the embeddings of `judge`: what shows the same though
    it was generated again. null keeps the embeddings and rejects nothing."""


class Curate(Section):
    """Stage 3: panels are cut, screened, compared and captioned."""

    judge: str = Field(default="pocket", min_length=1)
    """An embedding model: `pocket`, a folder, or a hub name."""
    batch_size: int = Field(default=32, ge=1)
    """Grids judged at once."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """What panels are kept as: `png` and `webp` lose nothing, `jpeg` (quality 95) is the quickest."""
    screens: Screens | None = None
    """Tests of single panels; null: none, and nothing is measured."""
    copies: Copies | None = None
    """Tests of a pair's two panels beside `thresholds.near_copy`; null: none, and nothing is measured."""
    duplicates: Duplicates | None = None
    """Repeats among the run's pairs; null: none are looked for, and neither hashes nor embeddings kept."""
    thresholds: Thresholds = Thresholds()
    vlm: Vlm | None = None
    """A vision-language model that decides in the place of `judge`; null: `judge` decides."""

    def further(self) -> dict[str, float | None]:
        """The limits of the tests that are there only if asked for: `{"screens.dark": 0.1, "copies.hash": 6}`; None is
        off."""
        found: dict[str, float | None] = {}
        if self.screens is not None:
            found |= {f"screens.{name}": value for name, value in self.screens.values().items()}
        for name, tests in (("copies", self.copies), ("duplicates", self.duplicates)):
            if tests is not None:
                found |= {f"{name}.{key}": value for key, value in tests.model_dump().items()}
        return found
