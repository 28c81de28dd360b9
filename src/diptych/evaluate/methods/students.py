"""The students as methods: a run's own, the one in the package, any other; and who curated what they learnt from.

`--model` takes what `diptych generate` takes, and a run's folder besides. The judge that chose a model's training data
has seen to it that its own taste is met; so it may not score that model.
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
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.io import sha256_file, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample
    from diptych.recipe.schema import Recipe

PARTS = ("transformer", "pytorch_lora_weights.safetensors")  # what is a student's own in its folder
CURATORS = "curators.json"


class RunStudent(Base):
    """The student this run has trained."""

    name: ClassVar[str] = "student"

    def place(self) -> Path:
        folder = bring(self.context.run_dir, "student")
        # The summary is what distill writes last.
        if not any((folder / name).exists() for name in ("training/summary.json", *PARTS)):
            run = self.context.run_dir
            raise UserError(f"{folder} holds no student yet; first: diptych distill {run}/recipe.yaml --out {run}")
        return folder

    def base(self) -> str:
        return self.recipe.teacher

    def fingerprint(self) -> str:
        folder = self.place()
        own = "+".join(models.fingerprint(folder / part) for part in PARTS if (folder / part).exists())
        base, settings = models.resolve(self.base(), "teacher"), self.recipe.evaluate
        if None in (settings.steps, settings.image_guidance, settings.text_guidance, settings.null_panel):
            from diptych.student.weights.sources import read_settings

            own += f" sampled {read_settings(folder, base).values()}"
        return f"{own} on {models.fingerprint(base)}"

    def open(self) -> Any:
        return open_student(self.place(), self.base(), self.recipe)

    def opened(self) -> Any:
        """Its pipeline, which stays open."""
        return self.context.opened(self.name, self.open)

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return self.drawn(references, samples, seeds, {})

    def drawn(
        self,
        references: Sequence[Image],
        samples: Sequence[Sample],
        seeds: Sequence[int],
        otherwise: Mapping[str, Any],
    ) -> Sequence[Image]:
        """Pictures as the recipe evaluates, but for the keys of guidance in `otherwise`; what neither sets is the
        student's own setting."""
        pipe = self.opened()
        settings = self.recipe.evaluate.model_copy(update=dict(otherwise))
        return answer(
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


class StudentShipped(RunStudent):
    """The student in the package, on the package's own teacher."""

    name: ClassVar[str] = "student_shipped"

    def place(self) -> Path:
        return models.resolve("pocket", "student")

    def base(self) -> str:
        return "pocket"


@dataclass(frozen=True)
class OtherStudent(Method):
    """A student somewhere, as a method. What the evaluation does not say of sampling, the model's own settings do."""

    name: str
    place: Path | str
    base: str | None
    context: Context
    evaluation: Evaluation

    def fingerprint(self) -> str:
        """sha256 of its weights and of its base's, and its sampling. UserError if they are not there."""
        from diptych.apps.batch import identify
        from diptych.student.settings import SAMPLING_FILE

        path = models.resolve(str(self.place), "student")
        parts = [path / part for part in PARTS if (path / part).exists()] or [path]
        own = [identify({"model": str(part)})["model"] for part in parts]
        base = POCKET if str(self.place) == POCKET else self.base
        beneath = identify({"base": base})["base"] if base else None
        sampling = (path if path.is_dir() else path.parent) / SAMPLING_FILE  # of folders of earlier versions
        said = sha256_file(sampling) if sampling.is_file() else None
        return f"{'+'.join(own)} on {beneath} sampled {said} {self.asked()}"

    def asked(self) -> dict[str, float]:
        """What the evaluation says of sampling."""
        names = ("steps", "guidance", "image_guidance", "text_guidance")
        return {name: value for name in names if (value := getattr(self.evaluation, name)) is not None}

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        """One picture for each sample, of the reference's size."""
        pipe = self.context.opened(self.name, lambda: open_student(self.place, self.base, self.context.recipe))
        sampling = pipe.settings.sampling | self.asked()
        return answer(
            pipe,
            references,
            samples,
            seeds,
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance"],
            image_guidance_scale=sampling["image_guidance"],
            text_guidance_scale=sampling["text_guidance"],
        )


def answer(
    pipe: Any, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int], **sampling: Any
) -> Sequence[Image]:
    """One image for each sample, of the reference's size."""
    height, width = size_of(references)
    given = {"prompt": [sample.prompt for sample in samples], "reference": list(references), "generator": list(seeds)}
    return pipe(**given, height=height, width=width, **sampling).images


def open_student(folder: Path | str, base: str | None, recipe: Recipe) -> Any:
    """A student's pipeline: a folder with a transformer, or a control-LoRA on its widened base."""
    from diptych import student

    with quiet_bars():
        pipe = student.load(folder, base=base, device=recipe.device, fuse=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def locate(place: str) -> tuple[str, Path | None]:
    """Where a model's weights are, and the run they came from if its folder is there."""
    path, run = Path(place).expanduser(), models.run_of(place)
    if run is not None:
        return str(models.resolve(place, "student")), run
    return str(path) if path.exists() else place, None


# ---- who curated


@dataclass(frozen=True)
class Curator:
    """A judge that chose training data: its name, and the sha256 of its weights where there are any."""

    name: str
    weights: frozenset[str]


def curators(place: str) -> list[Curator] | None:
    """Who chose what a model learnt from; None where nobody can tell."""
    where, run = locate(place)
    if where == POCKET:
        return [_embedding(POCKET)]
    if run is None:
        return None
    found = []
    for recipe in _recipes(run):
        found.append(_embedding(recipe.curate.judge))
        if recipe.curate.vlm is not None:
            found.append(Curator(recipe.curate.vlm.model, frozenset()))
    return found


def _recipes(run: Path) -> Iterable[Any]:
    """The recipes of a run and of the runs whose pairs it trained on."""
    recipe = recipes.load(run / "recipe.yaml")
    if recipe.draws_pairs():
        yield recipe
    for data in recipe.distill.data or ():
        folder = Path(data.path).expanduser()
        for place in (folder, folder.parent):
            if (place / "recipe.yaml").is_file():
                yield recipes.load(place / "recipe.yaml")
                break


def _embedding(name: str) -> Curator:
    try:
        return Curator(name, models.weights(models.resolve(name, "curator")))
    except UserError:
        return Curator(name, frozenset())  # gone from this machine: its name is what is left of it


def curators_of(evaluation: Evaluation, out: Path) -> dict[str, list[Curator] | None]:
    """Who curated what each model learnt from. Where a model is not on this machine, what drawing wrote down holds."""
    path = out / CURATORS
    try:
        kept = json.loads(path.read_text("utf8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); remove it, and draw again where the models are") from error
    found: dict[str, list[Curator] | None] = {}
    for name, place in evaluation.models.items():
        found[name] = curators(place)
        if found[name] is None and kept.get(name, {}).get("model") == place and kept[name]["curators"] is not None:
            found[name] = [Curator(c["name"], frozenset(c["weights"])) for c in kept[name]["curators"]]
    return found


def remember(known: Mapping[str, list[Curator] | None], evaluation: Evaluation, out: Path) -> None:
    """Writes down who curated, for a machine that has the pictures alone."""
    told = {
        name: {
            "model": evaluation.models[name],
            "curators": None if by is None else [{"name": c.name, "weights": sorted(c.weights)} for c in by],
        }
        for name, by in known.items()
    }
    write_atomic(out / CURATORS, (json.dumps(told, indent=2) + "\n").encode())


def refuse_own_judge(known: Mapping[str, list[Curator] | None], judge: str, own: frozenset[str], force: bool) -> bool:
    """UsageError if the judge (by its weights `own`, else by its name) is among a model's curators; with `force`
    whether it is."""
    for name, found in known.items():
        for curator in found or ():
            if bool(curator.weights & own) if own and curator.weights else curator.name == judge:
                if force:
                    return True
                raise UsageError(
                    f"the judge {judge} curated what {name} learnt from ({curator.name}): a model is not scored by the "
                    "judge that chose its data; name another judge, or --force it, which the result will say"
                )
    return False
