"""The settings of an evaluation: suite, models, baselines, judge, metrics.

They are stored in `OUT/evaluation.yaml`, so that one machine can generate the images and another can score them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from diptych.errors import UsageError, nearest
from diptych.llm.endpoint import Endpoint
from diptych.llm.vllm import Vllm
from diptych.recipe.schema import Adapter, Recipe, Section, StockPipeline, Tuning
from diptych.utils import documents
from diptych.utils.documents import parse_yaml, read_text

FILE = "evaluation.yaml"
POCKET = "pocket"
METRICS = {
    "clip-i": "openai/clip-vit-base-patch32",
    "clip-t": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vits8",
    "dinov2": "facebook/dinov2-small",
}
"""Similarity metrics and the models that the published numbers were taken with."""


class Judge(Section):
    """The judge that gives CP and PF."""

    kind: Literal["auto", "pocket", "embedding", "vlm"] = "auto"
    """Kind of judge. `pocket`: the pocket world's scorer and attribute reader, on a scale fixed by renders. `vlm`: a
    vision-language model and the 0 to 4 rubric. `embedding`: a vision model and CLIP. `auto`: `vlm` if a
    vision-language model is named, else `pocket` for the pocket suite and `embedding` for suites of images."""
    endpoint: Endpoint | None = None
    """OpenAI-compatible server of a vision-language model; its keys are in docs/endpoints.md. The published rubric uses
    temperature 1."""
    local: str | None = Field(default=None, min_length=1)
    """Vision-language model on this machine: a folder or a hub name."""
    vllm: Vllm | None = None
    """Vision-language model that vLLM runs in this process; its keys are in docs/endpoints.md."""
    repeats: int = Field(default=3, ge=1, le=99)
    """Answers to each question; an image's score is their mean."""
    debiased: bool = True
    """Score CP a second time with pasted references marked down. This adds half as many questions."""
    scorer: str | None = Field(default=None, min_length=1)
    """Vision model that compares two subjects, for the judges `pocket` and `embedding`."""
    reader: str = Field(default=POCKET, min_length=1)
    """Attribute reader of the judge `pocket`."""
    text: str = Field(default=METRICS["clip-t"], min_length=1)
    """CLIP model of the judge `embedding`, which compares an image with prompts."""

    @property
    def served(self) -> Endpoint | Vllm | None:
        """The settings of the endpoint or of vLLM, if one of them answers."""
        return self.endpoint or self.vllm

    @property
    def model(self) -> str | None:
        """Name of the vision-language model; None if there is none."""
        return self.local or (self.served.model if self.served else None)

    @model_validator(mode="after")
    def _one(self) -> Judge:
        if sum(one is not None for one in (self.endpoint, self.local, self.vllm)) > 1:
            raise ValueError("set one vision-language model: either endpoint, local or vllm")
        if self.kind == "vlm" and self.model is None:
            raise ValueError(
                "needs a vision-language model: --judge-endpoint URL and --judge-model NAME, or --judge-local"
            )
        if self.local is not None and self.repeats > 1:
            raise ValueError("a local model does not sample, so all repeats are equal; set judge.repeats=1")
        if self.vllm is not None and self.vllm.temperature == 0 and self.repeats > 1:
            raise ValueError(
                "all repeats at temperature 0 are equal; set judge.vllm.temperature (published: 1), or judge.repeats=1"
            )
        return self


class Evaluation(Section):
    """The settings of an evaluation."""

    suite: str = Field(default=POCKET, min_length=1)
    """Suite of references and prompts: pocket, dreambench++, dreambench, folder, or a YAML file."""
    data: str | None = Field(default=None, min_length=1)
    """Data folder of the suite, for suites of images."""
    models: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], str] = Field(default={})
    """Students by name: `pocket`, a run's folder, a student's folder or file, or owner/name."""
    base: str | None = Field(default=None, min_length=1)
    """Teacher of the baselines, and base model of students that lack parts. null uses the run's teacher, or the
    packaged one."""
    baselines: list[str] = Field(default=[])
    """Methods to compare with, by name (`diptych.evaluate.methods`)."""
    references: int | None = Field(default=None, ge=1)
    """Use only N references, evenly spaced over the categories; null uses all (pocket: 40)."""
    prompts: int | None = Field(default=None, ge=1)
    """Use only N prompts for each reference, evenly spaced over the levels; null uses all (pocket: 5)."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds; each gives one image for every reference and prompt."""
    size: int | None = Field(default=None, ge=8, le=4096)
    """Side of references and generated images in pixels, for suites of images; null uses the suite's size."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps; null uses each model's setting."""
    guidance: float | None = Field(default=None, ge=0)
    """Distilled guidance; null uses each model's setting."""
    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference, for students; null uses each model's setting."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the prompt, for students; null uses each model's setting."""
    true_guidance: float | None = Field(default=None, ge=1)
    """Classifier-free guidance of the teacher, for baselines; null is 2 for the pocket teacher and off for others."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images generated at once; null is 16 for the pocket suite and 1 for others."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    """Device; `auto` uses the best one available."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null leaves the choice to torch."""
    tuning: Tuning = Tuning()
    adapter: Adapter = Adapter()
    pipeline: StockPipeline = StockPipeline()
    judge: Judge = Judge()
    metrics: list[str] | None = None
    """Similarity metrics, NAME or NAME=MODEL: clip-i, clip-t, dino, dinov2. null uses the suite's list; an empty list
    measures none."""
    hour_price: float | None = Field(default=None, ge=0)
    """Price of an hour of this machine, to report the cost of an image."""
    bootstrap: int = Field(default=1000, ge=10)
    """Bootstrap resamplings over references, for the 95 % intervals."""

    @classmethod
    def of_run(cls, recipe: Recipe, run_dir: Path) -> Evaluation:
        """The evaluation of a run's last stage: its students are the models, scored by the pocket world's judges."""
        settings = recipe.evaluate
        students = {"student": str(run_dir), "student_shipped": POCKET}
        return cls(
            suite=settings.suite,
            models={name: model for name, model in students.items() if name in settings.methods},
            base=recipe.teacher,
            baselines=[name for name in settings.methods if name not in students],
            references=settings.samples,
            prompts=settings.prompts,
            seeds=settings.seeds,
            batch_size=settings.batch_size,
            device=recipe.device,
            threads=recipe.threads,
            judge=Judge(kind="pocket", scorer=settings.scorer, reader=settings.reader),
            metrics=[],
            bootstrap=settings.bootstrap,
        )

    def judge_kind(self) -> str:
        """The kind of judge, with `auto` resolved."""
        if self.judge.kind != "auto":
            return self.judge.kind
        if self.judge.model is not None:
            return "vlm"
        return "pocket" if self.data is None else "embedding"

    def metric_models(self, default: Sequence[str]) -> dict[str, str]:
        """Models of the metrics to measure, by metric. UsageError for an unknown metric."""
        chosen = {}
        for text in default if self.metrics is None else self.metrics:
            name, _, model = text.partition("=")
            if name not in METRICS:
                hint = nearest(name, METRICS)
                raise UsageError("name_unknown", f"Unknown metric '{name}'. Known metrics: {', '.join(METRICS)}{hint}")
            chosen[name] = model or METRICS[name]
        return chosen

    def recipe(self) -> Recipe:
        """The recipe that gives the baselines their settings."""
        teacher = self.base or POCKET
        pocket = teacher == POCKET
        settings = {
            "steps": self.steps or (20 if pocket else 28),
            "true_guidance": self.true_guidance or (2.0 if pocket else 1.0),
            "image_guidance": self.image_guidance,
            "text_guidance": self.text_guidance,
            "batch_size": self.batch_size or (16 if self.data is None else 1),
            "seeds": self.seeds,
            "tuning": self.tuning,
            "adapter": self.adapter,
            "pipeline": self.pipeline,
        }
        return Recipe.model_validate(
            {
                "name": "evaluation",
                "teacher": teacher,
                "device": self.device,
                "threads": self.threads,
                "paint": {} if self.guidance is None else {"guidance": self.guidance},
                "evaluate": {key: value for key, value in settings.items() if value is not None},
            }
        )


def make(options: dict[str, Any], out: Path, sets: Sequence[str] = ()) -> Evaluation:
    """An evaluation from `out/evaluation.yaml`, overridden by `options` and then by the `KEY=VALUE`s of `sets`.

    UsageError names a wrong key.
    """
    from diptych.recipe import parse_set

    values: dict[str, Any] = read(out)
    given = {key: value for key, value in options.items() if value is not None and value != []}
    if given.get("suite", values.get("suite")) != values.get("suite"):
        values = {key: value for key, value in values.items() if key not in ("data", "size")}
    for layer in (given, *map(parse_set, sets)):
        values = overlay({key: value for key, value in values.items() if key != "models" or key not in layer}, layer)
    try:
        return Evaluation.model_validate(values)
    except ValidationError as error:
        known = [key for section in (Evaluation, Judge, Endpoint, Vllm) for key in section.model_fields]
        raise UsageError("option_invalid", documents.first(error, known)) from error


def read(out: Path) -> dict[str, Any]:
    """The settings stored in an evaluation's folder; empty for a new one."""
    path = out / FILE
    values = parse_yaml(read_text(path), str(path)) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UsageError("yaml_invalid", f"{path} is not a list of `key: value` lines. Pass another --out.")
    return values


def dump(evaluation: Evaluation) -> bytes:
    """The content of an evaluation's file: the settings that differ from the defaults."""
    import yaml

    values = evaluation.model_dump(mode="json", exclude_defaults=True) | {"suite": evaluation.suite}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def overlay(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings; later layers override earlier ones."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_models(options: Sequence[str]) -> dict[str, str]:
    """Models by name, from `MODEL` or `NAME=MODEL`. Without a name, the last parts of the path give one.

    UsageError for an invalid name, or for two models of one name.
    """
    models: dict[str, str] = {}
    for text in options:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = _name(text), text
        if not re.fullmatch(r"[\w.+-]+", name) or not path:
            raise UsageError(
                "option_invalid", f"--model {text}: pass MODEL or NAME=MODEL. A name has letters, digits and . + - _"
            )
        if name in models:
            raise UsageError(
                "output_collision", f"--model {text}: two models have the name {name}. Pass --model NAME={path}."
            )
        models[name] = path
    return models


def _name(path: str) -> str:
    """`runs/first/student` → first, `owner/name@v1` → name_v1."""
    parts = [part for part in path.rstrip("/").split("/") if part not in ("", ".", "..")]
    last = parts[-2] if len(parts) > 1 and parts[-1] == "student" else (parts[-1] if parts else "model")
    return re.sub(r"[^\w.+-]+", "_", last.removesuffix(".safetensors").removesuffix(".gguf"))
