"""What an evaluation is: suite, models, baselines, judge, metrics. `OUT/evaluation.yaml` holds it, so that a folder can
be drawn on one machine and scored on another.
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
    """Who gives CP and PF."""

    kind: Literal["auto", "pocket", "embedding", "vlm"] = "auto"
    """`pocket`: the pocket world's scorer and attribute reader, on a scale fixed by renders. `vlm`: a vision-language
    model and the 0 to 4 rubric. `embedding`: a vision model and CLIP. `auto`: `vlm` if one is named, else what fits."""
    endpoint: Endpoint | None = None
    """An OpenAI-compatible server; its keys are in docs/endpoints.md. As published: temperature 1."""
    local: str | None = Field(default=None, min_length=1)
    """Or a vision-language model on this machine: a folder, or a hub name."""
    vllm: Vllm | None = None
    """Or one that vLLM runs in this process; its keys are in docs/endpoints.md."""
    repeats: int = Field(default=3, ge=1, le=99)
    """Times each question is asked; a picture's score is their mean."""
    debiased: bool = True
    """Ask for CP a second time, with pasted references marked down (half as many questions again)."""
    scorer: str | None = Field(default=None, min_length=1)
    """`pocket` and `embedding`: the vision model that sees how alike two subjects are."""
    reader: str = Field(default=POCKET, min_length=1)
    """`pocket`: the attribute reader."""
    text: str = Field(default=METRICS["clip-t"], min_length=1)
    """`embedding`: the CLIP that says which prompt a picture fits."""

    @property
    def asked(self) -> Endpoint | Vllm | None:
        """What answers by settings, if it does."""
        return self.endpoint or self.vllm

    @property
    def model(self) -> str | None:
        """The vision-language model's name; None if there is none."""
        return self.local or (self.asked.model if self.asked else None)

    @model_validator(mode="after")
    def _one(self) -> Judge:
        if sum(one is not None for one in (self.endpoint, self.local, self.vllm)) > 1:
            raise ValueError("name one vision-language model: either endpoint or local or vllm")
        if self.kind == "vlm" and self.model is None:
            raise ValueError(
                "needs a vision-language model: --judge-endpoint URL and --judge-model NAME, or --judge-local"
            )
        if self.local is not None and self.repeats > 1:
            raise ValueError("a local model samples nothing, so that repeats are one and the same; set judge.repeats=1")
        if self.vllm is not None and self.vllm.temperature == 0 and self.repeats > 1:
            raise ValueError(
                "repeats at temperature 0 are one and the same; set judge.vllm.temperature, 1 as published, or "
                "judge.repeats=1"
            )
        return self


class Evaluation(Section):
    """An evaluation."""

    suite: str = Field(default=POCKET, min_length=1)
    """pocket, dreambench++, dreambench, folder, or a YAML file."""
    data: str | None = Field(default=None, min_length=1)
    """The suite's folder, for suites of pictures."""
    models: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], str] = Field(default={})
    """Name → student: `pocket`, a run's folder, a student's folder or file, or owner/name."""
    base: str | None = Field(default=None, min_length=1)
    """The teacher, for baselines and for students that need one; null takes the run's or the package's own."""
    baselines: list[str] = Field(default=[])
    """Methods to compare with, by name (evaluate/baselines.py)."""
    references: int | None = Field(default=None, ge=1)
    """So many references, spread over the categories; null is all (pocket: 40)."""
    prompts: int | None = Field(default=None, ge=1)
    """So many prompts for each, spread over the levels; null is all (pocket: 5)."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """One picture of each reference, prompt and seed."""
    size: int | None = Field(default=None, ge=8, le=4096)
    """Side of pictures and references in pixels, for suites of pictures; null is the suite's."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps; null is each model's own."""
    guidance: float | None = Field(default=None, ge=0)
    """Distilled guidance; null is each model's own."""
    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference, for students; null is each model's own."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the prompt, for students; null is each model's own."""
    true_guidance: float | None = Field(default=None, ge=1)
    """The teacher's classifier-free guidance, for baselines; null is 2 for the pocket teacher and off for others."""
    batch_size: int | None = Field(default=None, ge=1)
    """Pictures drawn at once; null is 16 for the pocket suite and 1 for others."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    """`auto` takes the best that is there."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null is torch's own choice."""
    tuning: Tuning = Tuning()
    adapter: Adapter = Adapter()
    pipeline: StockPipeline = StockPipeline()
    judge: Judge = Judge()
    metrics: list[str] | None = None
    """NAME or NAME=MODEL of clip-i, clip-t, dino, dinov2; null is what the suite says, an empty list none."""
    hour_price: float | None = Field(default=None, ge=0)
    """What an hour of this machine costs, for the cost of a picture."""
    bootstrap: int = Field(default=1000, ge=10)
    """Resamplings for the 95 % intervals, over references."""

    @classmethod
    def of_run(cls, recipe: Recipe, run_dir: Path) -> Evaluation:
        """What the last stage of a run evaluates: its students are the models, judged by the pocket world's judges."""
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
        """`auto`, decided."""
        if self.judge.kind != "auto":
            return self.judge.kind
        if self.judge.model is not None:
            return "vlm"
        return "pocket" if self.data is None else "embedding"

    def metric_models(self, default: Sequence[str]) -> dict[str, str]:
        """Metric → model, of what is asked. UsageError for a name that is none."""
        found = {}
        for text in default if self.metrics is None else self.metrics:
            name, _, model = text.partition("=")
            if name not in METRICS:
                raise UsageError(f"unknown metric '{name}'; known: {', '.join(METRICS)}{nearest(name, METRICS)}")
            found[name] = model or METRICS[name]
        return found

    def recipe(self) -> Recipe:
        """What the baselines are told, in the words of a recipe."""
        teacher = self.base or POCKET
        pocket = teacher == POCKET
        drawing = {
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
                "evaluate": {key: value for key, value in drawing.items() if value is not None},
            }
        )


def make(asked: dict[str, Any], out: Path, sets: Sequence[str] = ()) -> Evaluation:
    """`asked` over what `out/evaluation.yaml` says, under `KEY=VALUE`s. UsageError names a wrong key."""
    from diptych.recipe import parse_set

    values: dict[str, Any] = read(out)
    given = {key: value for key, value in asked.items() if value is not None and value != []}
    if given.get("suite", values.get("suite")) != values.get("suite"):
        values = {key: value for key, value in values.items() if key not in ("data", "size")}
    for layer in (given, *map(parse_set, sets)):
        values = overlay({key: value for key, value in values.items() if key != "models" or key not in layer}, layer)
    try:
        return Evaluation.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            parts = [str(part) for part in problem["loc"]]
            said = documents.explain(problem)
            if problem["type"] == "extra_forbidden":
                known = Judge if parts[0] == "judge" and len(parts) > 1 else Evaluation
                known = {"endpoint": Endpoint, "vllm": Vllm}.get(parts[-2] if len(parts) > 1 else "", known)
                said = f"no such key{nearest(parts[-1], known.model_fields)}; keys: {', '.join(known.model_fields)}"
            lines.append(f"{'.'.join(parts)}: {said}")
        raise UsageError("; ".join(lines)) from error


def read(out: Path) -> dict[str, Any]:
    """What an evaluation's folder says it is; nothing if it is new."""
    path = out / FILE
    values = parse_yaml(read_text(path), str(path)) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: is not a list of `key: value` lines; name another --out")
    return values


def dump(evaluation: Evaluation) -> bytes:
    """An evaluation as its file: what differs from the defaults."""
    import yaml

    values = evaluation.model_dump(mode="json", exclude_defaults=True) | {"suite": evaluation.suite}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def overlay(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys of several layers, the later over the earlier."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def named(given: Sequence[str]) -> dict[str, str]:
    """`PATH` or `NAME=PATH` as name → path; a name is made of the path's last parts. UsageError for two alike."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals:
            name, place = _name(text), text
        if not re.fullmatch(r"[\w.+-]+", name) or not place:
            raise UsageError(f"--model {text}: write a model, or NAME=MODEL; a name is letters, digits and . + - _")
        if name in found:
            raise UsageError(f"--model {text}: two models are called {name}; name them: --model NAME={place}")
        found[name] = place
    return found


def _name(place: str) -> str:
    """`runs/first/student` → first, `owner/name@v1` → name_v1."""
    parts = [part for part in place.rstrip("/").split("/") if part not in ("", ".", "..")]
    last = parts[-2] if len(parts) > 1 and parts[-1] == "student" else (parts[-1] if parts else "model")
    return re.sub(r"[^\w.+-]+", "_", last.removesuffix(".safetensors").removesuffix(".gguf"))
