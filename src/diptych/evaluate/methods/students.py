"""Students as methods: a run's student, the packaged one, or any other; and the judges that curated their data.

`--model` takes what `diptych generate` takes, or a run's folder. A judge that chose a model's training data must not
score that model, because the data already meets its preferences.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diptych import recipe as recipes
from diptych.data.places import bring
from diptych.errors import UsageError, UserError
from diptych.evaluate.evaluation import POCKET, Evaluation
from diptych.evaluate.methods.common import Base, Context, Method, size_of
from diptych.evaluate.results import write_result
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.io import sha256_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample
    from diptych.recipe.schema import Recipe

PARTS = ("transformer", "pytorch_lora_weights.safetensors")  # the trained weights in a student's folder
CURATORS = "curators.json"


class RunStudent(Base):
    """The student of a run."""

    name: ClassVar[str] = "student"

    def folder(self) -> Path:
        """The folder of its weights. UserError if the run has no student."""
        folder = bring(self.context.run_dir, "student")
        # `distill` writes the summary last.
        if not any((folder / name).exists() for name in ("training/summary.json", *PARTS)):
            run = self.context.run_dir
            message = f"{folder} has no student yet. Run `diptych distill {run}/recipe.yaml --out {run}`."
            raise UserError("run_incomplete", message)
        return folder

    def base(self) -> str:
        """The folder or name of its base model."""
        return self.recipe.teacher

    def fingerprint(self) -> str:
        folder = self.folder()
        weights = "+".join(models.fingerprint(folder / part) for part in PARTS if (folder / part).exists())
        base, settings = models.resolve(self.base(), "teacher"), self.recipe.evaluate
        if None in (settings.steps, settings.image_guidance, settings.text_guidance, settings.null_panel):
            from diptych.student.weights.sources import read_settings

            weights += f" sampled {read_settings(folder, base).values()}"
        return f"{weights} on {models.fingerprint(base)}"

    def open(self) -> Any:
        """Opens its pipeline."""
        return open_student(self.folder(), self.base(), self.recipe)

    def pipeline(self) -> Any:
        """Its pipeline, which stays open."""
        return self.context.opened(self.name, self.open)

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return self.sample(references, samples, seeds, {})

    def sample(
        self,
        references: Sequence[Image],
        samples: Sequence[Sample],
        seeds: Sequence[int],
        overrides: Mapping[str, Any],
    ) -> Sequence[Image]:
        """Images with the recipe's settings of `evaluate`, except for the guidance in `overrides`. Keys that neither
        sets have the student's defaults."""
        pipe = self.pipeline()
        settings = self.recipe.evaluate.model_copy(update=dict(overrides))
        return sample_student(
            pipe,
            references,
            samples,
            seeds,
            num_inference_steps=settings.steps,
            guidance_scale=self.recipe.paint.guidance,
            image_guidance_scale=settings.image_guidance,
            text_guidance_scale=settings.text_guidance,
            null_panel=pipe.runtime.speed.null_panel or settings.null_panel,
        )


class PackagedStudent(RunStudent):
    """The packaged student, on the packaged teacher."""

    name: ClassVar[str] = "student_shipped"

    def folder(self) -> Path:
        return models.resolve("pocket", "student")

    def base(self) -> str:
        return "pocket"


@dataclass(frozen=True)
class OtherStudent(Method):
    """Any student. Sampling settings that the evaluation leaves open are the model's."""

    name: str
    weights: Path | str
    base: str | None
    context: Context
    evaluation: Evaluation

    def fingerprint(self) -> str:
        """sha256 of the weights of student and base, and the sampling settings. UserError if weights are missing."""
        from diptych.apps.batch import identify
        from diptych.student.settings import SAMPLING_FILE

        path = models.resolve(str(self.weights), "student")
        parts = [path / part for part in PARTS if (path / part).exists()] or [path]
        hashes = [identify({"model": str(part)})["model"] for part in parts]
        base = POCKET if str(self.weights) == POCKET else self.base
        base_hash = identify({"base": base})["base"] if base else None
        sampling = (path if path.is_dir() else path.parent) / SAMPLING_FILE  # in folders of earlier versions
        sampling_hash = sha256_file(sampling) if sampling.is_file() else None
        return f"{'+'.join(hashes)} on {base_hash} sampled {sampling_hash} {self.sampling()}"

    def sampling(self) -> dict[str, float]:
        """The sampling settings that the evaluation sets."""
        names = ("steps", "guidance", "image_guidance", "text_guidance")
        return {name: value for name in names if (value := getattr(self.evaluation, name)) is not None}

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        """One image for each sample, of the reference's size."""
        pipe = self.context.opened(self.name, lambda: open_student(self.weights, self.base, self.context.recipe))
        sampling = pipe.settings.sampling | self.sampling()
        return sample_student(
            pipe,
            references,
            samples,
            seeds,
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance"],
            image_guidance_scale=sampling["image_guidance"],
            text_guidance_scale=sampling["text_guidance"],
        )


def sample_student(
    pipe: Any, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int], **sampling: Any
) -> Sequence[Image]:
    """One image for each sample, of the reference's size."""
    height, width = size_of(references)
    given = {"prompt": [sample.prompt for sample in samples], "reference": list(references), "generator": list(seeds)}
    return pipe(**given, height=height, width=width, **sampling).images


def open_student(folder: Path | str, base: str | None, recipe: Recipe) -> Any:
    """Opens a student's pipeline: a folder with a transformer, or a control-LoRA on its widened base."""
    from diptych import student

    with quiet_bars():
        pipe = student.load(folder, base=base, device=recipe.device, fuse=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def locate(model: str) -> tuple[str, Path | None]:
    """The path of a model's weights, and its run if the weights are in a run's folder."""
    path, run = Path(model).expanduser(), models.run_of(model)
    if run is not None:
        return str(models.resolve(model, "student")), run
    return str(path) if path.exists() else model, None


# ---- curators


@dataclass(frozen=True)
class Curator:
    """A judge that chose training data: its name, and the sha256 of its weights if it has weights here."""

    name: str
    weights: frozenset[str]


def curators(model: str) -> list[Curator] | None:
    """The judges that chose a model's training data; None if unknown."""
    weights, run = locate(model)
    if weights == POCKET:
        return [_embedding(POCKET)]
    if run is None:
        return None
    judges = []
    for recipe in _recipes(run):
        judges.append(_embedding(recipe.curate.judge))
        if recipe.curate.vlm is not None:
            judges.append(Curator(recipe.curate.vlm.model, frozenset()))
    return judges


def _recipes(run: Path) -> Iterable[Recipe]:
    """The recipes of a run and of the runs whose pairs it trained on."""
    recipe = recipes.load(run / "recipe.yaml")
    if recipe.draws_pairs():
        yield recipe
    for data in recipe.distill.data or ():
        folder = Path(data.path).expanduser()
        for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
            if path.is_file():
                yield recipes.load(path)
                break


def _embedding(name: str) -> Curator:
    try:
        return Curator(name, models.weights(models.resolve(name, "curator")))
    except UserError:
        return Curator(name, frozenset())  # not on this machine; the name can still be compared


def curators_of(evaluation: Evaluation, out: Path) -> dict[str, list[Curator] | None]:
    """The judges that curated each model's data. For a model that is not on this machine, `curators.json` is used."""
    path = out / CURATORS
    try:
        stored = json.loads(path.read_text("utf8")) if path.is_file() else {}
    except ValueError as error:
        message = f"{path} is not valid JSON ({error}). Remove it and generate again on the machine with the models."
        raise UserError("json_invalid", message) from error
    judges: dict[str, list[Curator] | None] = {}
    for name, model in evaluation.models.items():
        judges[name] = curators(model)
        if judges[name] is None and stored.get(name, {}).get("model") == model and stored[name]["curators"] is not None:
            judges[name] = [Curator(c["name"], frozenset(c["weights"])) for c in stored[name]["curators"]]
    return judges


def write_curators(judges: Mapping[str, list[Curator] | None], evaluation: Evaluation, out: Path) -> None:
    """Writes `curators.json`, for machines that have only the images."""
    stored = {
        name: {
            "model": evaluation.models[name],
            "curators": None if by is None else [{"name": c.name, "weights": sorted(c.weights)} for c in by],
        }
        for name, by in judges.items()
    }
    write_result(out / CURATORS, stored)


def refuse_curator(
    judges: Mapping[str, list[Curator] | None], judge: str, weights: frozenset[str], force: bool
) -> bool:
    """Whether the judge curated a model's data, compared by its weights, or by its name if there are none.

    UsageError if it did, unless `force`.
    """
    for name, by in judges.items():
        for curator in by or ():
            if bool(curator.weights & weights) if weights and curator.weights else curator.name == judge:
                if force:
                    return True
                raise UsageError(
                    "judge_conflict",
                    f"The judge {judge} curated the training data of {name} ({curator.name}) and must not score it. "
                    "Choose another judge, or pass --force, which is recorded in the result.",
                )
    return False
