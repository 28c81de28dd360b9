"""Suites of images in a folder: DreamBench++ and DreamBench in their published layouts, and custom folders.

    suite = images.open_suite("dreambench++", "data/dreambench_plus", size=512)
    samples = suite.samples(20, None)

A suite's YAML has the `layout` of the folder and the parts to leave out. The data is neither copied nor changed.
Sources: DreamBench++ (Peng et al., arXiv 2406.16855), DreamBooth (Ruiz et al., arXiv 2208.12242).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field, field_validator

from diptych.data.formats import pictures_in
from diptych.errors import UsageError
from diptych.evaluate import suites
from diptych.evaluate.suites import MAIN, Part, Sample, Suite
from diptych.recipe.tasks import check_fields
from diptych.utils.documents import read_lines
from diptych.utils.io import sha256_file, sha256_json

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTIONS = (".txt",)  # files allowed beside images
PROMPTS_AND_CLASSES = "prompts_and_classes.txt"
_T = TypeVar("_T")


class PromptLevel(Part):
    """A difficulty: the numbers of its prompts."""

    name: str = Field(min_length=1)
    prompts: tuple[int, ...] = Field(min_length=1)


class Spec(Part):
    """The YAML file of a suite of images."""

    name: str = Field(min_length=1)
    version: int = Field(ge=1)
    layout: Literal["dreambench++", "dreambench", "folder"]
    leave_out: tuple[str, ...] = ()  # folders whose images are not subjects
    levels: tuple[PromptLevel, ...] = ()
    live: tuple[str, ...] = ()
    size: int = Field(ge=8)
    fit: Literal["crop", "pad", "contain"]
    grid: str
    copy_distance: float = Field(gt=0, lt=1)
    metrics: tuple[str, ...] = ()

    @field_validator("grid")
    @classmethod
    def _plain_fields(cls, template: str) -> str:
        check_fields(template, frozenset({"subject", "prompt"}))
        return template


@dataclass(frozen=True)
class Subject:
    """A reference and its prompts. `id` is its name in files; `more` are further images of the subject."""

    id: str
    name: str
    category: str
    image: Path
    prompts: tuple[str, ...]
    more: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ImageSuite:
    """A suite with its folder. Like `suites.Suite` it gives samples and their references, but not the truth."""

    spec: Spec
    data: Path
    subjects: tuple[Subject, ...]
    size: int  # side of references and generated images, in pixels

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def version(self) -> int:
        return self.spec.version

    @cached_property
    def _by_id(self) -> dict[str, tuple[int, Subject]]:
        return {subject.id: (number, subject) for number, subject in enumerate(self.subjects)}

    def fingerprint(self) -> str:
        """sha256 over the suite's file and the bytes of its references; it does not depend on the folder's path."""
        subjects = [
            {"id": s.id, "name": s.name, "category": s.category, "picture": sha256_file(s.image)}
            | {"prompts": s.prompts, "more": [sha256_file(path) for path in s.more]}
            for s in self.subjects
        ]
        return sha256_json([self.spec.model_dump(mode="json"), self.size, *subjects])

    def samples(self, identities: int | None = None, prompts: int | None = None) -> list[Sample]:
        """References × prompts: all, or N of each, evenly spaced over the categories and the levels."""
        return [
            self._sample(subject, n)
            for subject in spaced(self.subjects, identities)
            for n in spaced(range(len(subject.prompts)), prompts)
        ]

    def _sample(self, subject: Subject, number: int) -> Sample:
        prompt = subject.prompts[number]
        level = next((level.name for level in self.spec.levels if number in level.prompts), "all")
        return Sample(
            id=f"{subject.id}-{number}",
            split=MAIN,
            identity=self._by_id[subject.id][0],
            kind=subject.category,
            level=level,
            prompt=prompt,
            grid_prompt=self.spec.grid.format(subject=subject.name, prompt=prompt),
            asked={},
            subject=subject.name,
        )

    def of(self, sample: Sample) -> Subject:
        """The subject of a sample."""
        return self.subjects[sample.identity]

    def reference_image(self, sample: Sample) -> Image:
        """The reference of a sample as a square. UserError if its file cannot be read."""
        return square(self.of(sample).image, self.size, self.spec.fit)

    def rivals(self, identity: int, count: int) -> list[int]:
        """Numbers of `count` other subjects, or of all if there are fewer: those of the category come first."""
        after = [*range(identity + 1, len(self.subjects)), *range(identity)]
        category = self.subjects[identity].category
        return sorted(after, key=lambda number: self.subjects[number].category != category)[:count]


@lru_cache(maxsize=64)
def square(path: Path, size: int, fit: str) -> Image:
    """An image file as a square. The prompts of one reference follow each other, so a few images are cached."""
    from diptych.data.images import open_image
    from diptych.student.canvas import fit_image

    return fit_image(open_image(path), size, size, fit)


def spaced(items: Sequence[_T], count: int | None) -> list[_T]:
    """`count` items, evenly spaced; all of them if `count` is None or not below their number."""
    if count is None or count >= len(items):
        return list(items)
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def open_suite(name: str, data: str | Path | None, size: int | None = None) -> Suite | ImageSuite:
    """A suite by name or YAML file, with its folder. UsageError if the folder is missing or has another layout."""
    values = suites.read(name)
    if "layout" not in values:
        if data is not None:
            raise UsageError("option_unsuited", f"The suite {name} renders its references. Leave --data out.")
        return suites.check(Suite, values, name)
    spec = suites.check(Spec, values, name)
    if data is None:
        raise UsageError("option_missing", f"The suite {name} needs a folder of images. Pass it with --data.")
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError("path_not_found", f"Folder not found: --data {data}. Check the path.")
    subjects = LAYOUTS[spec.layout](spec, folder)
    if not subjects:
        message = f"{data} has no images in the layout {spec.layout}, which docs/evaluate.md describes."
        raise UsageError("suite_invalid", message)
    ids = [subject.id for subject in subjects]
    if twice := next((id for id in ids if ids.count(id) > 1), None):
        raise UsageError("suite_invalid", f"{data}: two references have the name {twice}. Rename one of them.")
    return ImageSuite(spec, folder, tuple(subjects), size or spec.size)


# ---- layouts


def dreambench_plus(spec: Spec, data: Path) -> list[Subject]:
    """images/**/CATEGORY/NN.jpg with captions/**/CATEGORY/NN.txt, in DATA or in DATA/data."""
    root = _within(data, ("", "data"), "images", "images/ and captions/")
    subjects = []
    for path in pictures_in(root / "images", deep=True):
        place = path.relative_to(root / "images")
        if set(place.parts) & set(spec.leave_out):
            continue
        caption = (root / "captions" / place).with_suffix(".txt")
        lines = _lines(caption)
        if not lines:
            message = f"{caption} is missing or empty. It must have the subject of {place} and its prompts."
            raise UsageError("suite_invalid", message)
        name, prompts = lines[0], tuple(lines[1:])
        expected = sum(len(level.prompts) for level in spec.levels)
        if len(prompts) != expected:
            message = f"{caption} has {len(prompts)} prompts after the subject, but this suite needs {expected}."
            raise UsageError("suite_invalid", message)
        category = place.parent.as_posix()
        subjects.append(Subject(_id(*place.parent.parts, place.stem, name), name, category, path, prompts))
    return subjects


def dreambench(spec: Spec, data: Path) -> list[Subject]:
    """SUBJECT/NN.jpg beside prompts_and_classes.txt, in DATA or in DATA/dataset."""
    root = _within(data, ("", "dataset"), PROMPTS_AND_CLASSES, PROMPTS_AND_CLASSES)
    classes, objects, live = _prompts_and_classes(root / PROMPTS_AND_CLASSES)
    subjects = []
    for name, kind in classes.items():
        files = pictures_in(root / name) if (root / name).is_dir() else []
        if not files:
            continue  # a part of the dataset is a valid suite
        alive = kind in spec.live
        prompts = tuple(" ".join(text.format("", kind).split()) for text in (live if alive else objects))
        category = "live subject" if alive else "object"
        subjects.append(Subject(_id(name), kind, category, files[0], prompts, tuple(files[1:])))
    return subjects


def custom_folder(spec: Spec, data: Path) -> list[Subject]:
    """references/[CATEGORY/]NAME.jpg and prompts.txt; NAME.txt may have the subject and prompts of that reference."""
    root = data / "references"
    if not root.is_dir():
        message = f"{data} has no folder references/. Put the images of your subjects there, and prompts.txt beside it."
        raise UsageError("suite_invalid", message)
    shared = [line for line in _lines(data / "prompts.txt") if not line.startswith("#")]
    subjects = []
    for path in pictures_in(root, beside=CAPTIONS, deep=True):
        place = path.relative_to(root)
        lines = _lines(path.with_suffix(".txt"))
        name = lines[0] if lines else re.sub(r"[-_\s]+", " ", place.stem).strip()
        prompts = tuple(text.replace("{}", name) for text in (lines[1:] or shared))
        if not prompts:
            raise UsageError("suite_invalid", f"{data / 'prompts.txt'} is missing or empty. Write one prompt a line.")
        category = place.parent.as_posix() if place.parent.parts else "references"
        subjects.append(Subject(_id(*place.parent.parts, place.stem), name, category, path, prompts))
    return subjects


LAYOUTS: dict[str, Callable[[Spec, Path], list[Subject]]] = {
    "dreambench++": dreambench_plus,
    "dreambench": dreambench,
    "folder": custom_folder,
}


def _within(data: Path, places: Sequence[str], marker: str, expected: str) -> Path:
    """The folder that has `marker`: `data`, or one of `places` in it. UsageError if none does."""
    for place in places:
        if (data / place / marker).exists():
            return data / place
    raise UsageError("suite_invalid", f"{data} does not have {expected}. Pass the folder of the published dataset.")


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank; none if the file does not exist."""
    return [line.strip() for line in read_lines(path) if line.strip()] if path.exists() else []


def _prompts_and_classes(path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Reads (subject → class, object prompts, live prompts): a table, then two lists of Python format strings."""
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"object": [], "live": []}
    part = ""
    for line in _lines(path):
        if line.lower() in ("object prompts", "live subject prompts"):
            part = line.split()[0].lower()
        elif quoted := re.match(r"'(.*)'\.format\(", line):
            prompts.get(part, []).append(quoted[1])
        elif "," in line and not part and line != "subject_name,class":
            name, _, kind = line.partition(",")
            classes[name.strip()] = kind.strip()
    if not classes or not all(prompts.values()):
        message = f"{path} lacks the table of classes or a list of prompts. Use the published file."
        raise UsageError("suite_invalid", message)
    return classes, prompts["object"], prompts["live"]


def _id(*parts: str) -> str:
    """Joins parts to a name that is safe in file names: `live_subject_animal_00_cotton-top_tamarin`."""
    return re.sub(r"[^\w.+-]+", "_", "_".join(parts).lower())
