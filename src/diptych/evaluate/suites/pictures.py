"""Suites of pictures in a folder: DreamBench++ and DreamBench in their published layouts, and one's own.

    suite = pictures.open_suite("dreambench++", "data/dreambench_plus", size=512)
    samples = suite.samples(20, None)

A suite's YAML says how the folder is read (`layout`) and what is left out; nothing of a data set is copied or changed.
Sources: DreamBench++ (Peng et al., arXiv 2406.16855), DreamBooth (Ruiz et al., arXiv 2208.12242).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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

CAPTIONS = (".txt",)  # what may lie beside pictures
PROMPTS_AND_CLASSES = "prompts_and_classes.txt"
_T = TypeVar("_T")


class PromptLevel(Part):
    """A difficulty: the numbers of its prompts."""

    name: str = Field(min_length=1)
    prompts: tuple[int, ...] = Field(min_length=1)


class Spec(Part):
    """What the YAML of a suite of pictures says."""

    name: str = Field(min_length=1)
    version: int = Field(ge=1)
    layout: Literal["dreambench++", "dreambench", "folder"]
    leave_out: tuple[str, ...] = ()  # folders whose pictures are no subjects
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
    """A reference and what it is asked into. `id` names it in files; `more` are further pictures of it."""

    id: str
    name: str
    category: str
    picture: Path
    prompts: tuple[str, ...]
    more: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """A suite with its folder. Like `suites.Suite` it gives samples and their references; nobody knows the truth."""

    spec: Spec
    data: Path
    subjects: tuple[Subject, ...]
    size: int  # side of references and pictures, in pixels

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
        """sha256 over what the suite says and the bytes of its references; the folder may move."""
        said = [self.spec.model_dump(mode="json"), self.size]
        for s in self.subjects:
            told = asdict(s) | {"picture": sha256_file(s.picture), "more": [sha256_file(path) for path in s.more]}
            said.append(told)
        return sha256_json(said)

    def samples(self, identities: int | None = None, prompts: int | None = None) -> list[Sample]:
        """References × prompts: all, or so many of each, spread evenly over the categories and the levels."""
        return [
            self._sample(subject, n)
            for subject in spread(self.subjects, identities)
            for n in self._asked(subject, prompts)
        ]

    def _asked(self, subject: Subject, prompts: int | None) -> list[int]:
        return spread(range(len(subject.prompts)), prompts)

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

    def picture(self, sample: Sample) -> Image:
        """The reference of a sample, square. UserError if its file cannot be read."""
        return square(self.of(sample).picture, self.size, self.spec.fit)


@lru_cache(maxsize=64)
def square(path: Path, size: int, fit: str) -> Image:
    """A picture file as a square; the prompts of one reference follow each other, so a few are kept."""
    from diptych.data.images import open_image
    from diptych.student.canvas import fit_image

    return fit_image(open_image(path), size, size, fit)


def spread(items: Sequence[_T], count: int | None) -> list[_T]:
    """`count` of the items, evenly spread over them; all of them if None or there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def open_suite(name: str, data: str | Path | None, size: int | None = None) -> Suite | Pictures:
    """A suite by name or YAML file, with its folder. UsageError if the folder is missing or not laid out as it says."""
    values = suites.read(name)
    if "layout" not in values:
        if data is not None:
            raise UsageError(f"the suite {name} draws its own references; leave --data out")
        return suites.check(Suite, values, name)
    spec = suites.check(Spec, values, name)
    if data is None:
        raise UsageError(f"the suite {name} asks about pictures of yours; name their folder with --data")
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--data {data}: there is no such folder")
    found = LAYOUTS[spec.layout](spec, folder)
    if not found:
        raise UsageError(f"{data}: no pictures of the layout {spec.layout} (docs/evaluate.md shows it)")
    ids = [subject.id for subject in found]
    if twice := next((id for id in ids if ids.count(id) > 1), None):
        raise UsageError(f"{data}: two references are called {twice}; rename one")
    return Pictures(spec, folder, tuple(found), size or spec.size)


# ---- layouts


def dreambench_plus(spec: Spec, data: Path) -> list[Subject]:
    """images/**/CATEGORY/NN.jpg with captions/**/CATEGORY/NN.txt, in DATA or in DATA/data."""
    root = _within(data, ("", "data"), "images", "dreambench++ holds images/ and captions/")
    found = []
    for path in pictures_in(root / "images", deep=True):
        place = path.relative_to(root / "images")
        if set(place.parts) & set(spec.leave_out):
            continue
        caption = (root / "captions" / place).with_suffix(".txt")
        lines = _lines(caption)
        if not lines:
            raise UsageError(f"{caption}: is missing or empty; it holds the subject of {place} and its prompts")
        name, prompts = lines[0], tuple(lines[1:])
        asked = sum(len(level.prompts) for level in spec.levels)
        if len(prompts) != asked:
            raise UsageError(f"{caption}: {len(prompts)} prompts after the subject, and this suite asks {asked}")
        category = place.parent.as_posix()
        found.append(Subject(_id(*place.parent.parts, place.stem, name), name, category, path, prompts))
    return found


def dreambench(spec: Spec, data: Path) -> list[Subject]:
    """SUBJECT/NN.jpg beside prompts_and_classes.txt, in DATA or in DATA/dataset."""
    root = _within(data, ("", "dataset"), PROMPTS_AND_CLASSES, f"dreambench holds {PROMPTS_AND_CLASSES}")
    classes, objects, live = _prompts_and_classes(root / PROMPTS_AND_CLASSES)
    found = []
    for name, kind in classes.items():
        pictures = pictures_in(root / name) if (root / name).is_dir() else []
        if not pictures:
            continue  # a part of the data set is a suite as well
        alive = kind in spec.live
        prompts = tuple(" ".join(text.format("", kind).split()) for text in (live if alive else objects))
        category = "live subject" if alive else "object"
        found.append(Subject(_id(name), kind, category, pictures[0], prompts, tuple(pictures[1:])))
    return found


def own_folder(spec: Spec, data: Path) -> list[Subject]:
    """references/[CATEGORY/]NAME.jpg and prompts.txt; NAME.txt may hold the subject and its own prompts."""
    root = data / "references"
    if not root.is_dir():
        raise UsageError(
            f"{data}: the suite folder needs references/, with the pictures of your subjects, and prompts.txt"
        )
    shared = [line for line in _lines(data / "prompts.txt") if not line.startswith("#")]
    found = []
    for path in pictures_in(root, beside=CAPTIONS, deep=True):
        place = path.relative_to(root)
        lines = _lines(path.with_suffix(".txt"))
        name = lines[0] if lines else re.sub(r"[-_\s]+", " ", place.stem).strip()
        prompts = tuple(text.replace("{}", name) for text in (lines[1:] or shared))
        if not prompts:
            raise UsageError(f"{data / 'prompts.txt'}: is missing or empty; write one prompt a line")
        category = place.parent.as_posix() if place.parent.parts else "references"
        found.append(Subject(_id(*place.parent.parts, place.stem), name, category, path, prompts))
    return found


LAYOUTS: dict[str, Callable[[Spec, Path], list[Subject]]] = {
    "dreambench++": dreambench_plus,
    "dreambench": dreambench,
    "folder": own_folder,
}


def _within(data: Path, places: Sequence[str], marker: str, what: str) -> Path:
    for place in places:
        if (data / place / marker).exists():
            return data / place
    raise UsageError(f"{data}: {what}, and this folder does not")


def _lines(path: Path) -> list[str]:
    """The lines of a text file that say something; none if there is no such file."""
    return [line.strip() for line in read_lines(path) if line.strip()] if path.exists() else []


def _prompts_and_classes(path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """(subject → class, object prompts, live prompts): a table, then two lists of Python format strings."""
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
        raise UsageError(f"{path}: holds no table of classes or lacks a list of prompts; is it the published file?")
    return classes, prompts["object"], prompts["live"]


def _id(*parts: str) -> str:
    """Parts as one name that is safe in files: `live_subject_animal_00_cotton-top_tamarin`."""
    return re.sub(r"[^\w.+-]+", "_", "_".join(parts).lower())
