"""Scores and saturation of a pocket student with several settings of guidance.

    python benchmarks/guidance.py --samples 40 --prompts 3 --out benchmarks/results/guidance.json
    python benchmarks/guidance.py --namespace 9000001 --setting image=2.5,text=1.5 --setting image=3,text=2,parallel=0

All settings generate from the same references, prompts and noise. `--namespace` takes other subjects than the suite's,
so that settings are not chosen on the subjects that scores are published for. The scoring judge did not curate
(docs/evaluate.md). `saturation` is the mean of HSV's S, 0 to 1, of the images; `truth` is that of renders.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, versions

KEYS = {"image": "image_guidance_scale", "text": "text_guidance_scale"}
KEYS |= {name: f"guidance_{name}" for name in ("rescale", "parallel", "norm")}
STRONG = "image=4,text=6"  # where saturation appears
SETTINGS = (
    "image=2.5,text=1.5",
    "image=2.5,text=1.5,parallel=0",
    STRONG,
    f"{STRONG},rescale=0.7",
    f"{STRONG},rescale=1",
    f"{STRONG},parallel=0",
    f"{STRONG},parallel=0,norm=0.2",
)


def parsed(setting: str) -> dict[str, float]:
    """`image=2.5,text=1.5` as options of a student's call."""
    parts = dict(part.split("=") for part in setting.split(","))
    return {KEYS[name]: float(value) for name, value in parts.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """CP·PF, its parts and the saturation of each setting."""
    from diptych import Student
    from diptych import recipe as recipes
    from diptych.data.images import open_image
    from diptych.data.store import Dataset
    from diptych.evaluate import generation, harness, suites
    from diptych.evaluate.evaluation import Evaluation
    from diptych.evaluate.methods.common import Context
    from diptych.evaluate.methods.students import PackagedStudent, sample_student
    from diptych.evaluate.scoring import judging, quality

    sizes = [f"evaluate.samples={arguments.samples}", f"evaluate.prompts={arguments.prompts}", "evaluate.seeds=[0]"]
    recipe = recipes.load("pocket", [*sizes, f"evaluate.steps={arguments.steps}", "evaluate.batch_size=40"])
    opened: Any = None if arguments.model == "pocket" else Student.load(arguments.model).pipeline

    class Corrected(PackagedStudent):
        """The student with a setting of guidance."""

        def __init__(self, context: Any, place: str, options: dict[str, float]) -> None:
            super().__init__(context)
            self.name, self.options = place, options  # pyright: ignore[reportAttributeAccessIssue]

        def fingerprint(self) -> str:
            return f"{super().fingerprint()} {self.options}"

        def pipeline(self) -> Any:
            return opened or super().pipeline()

        def generate(self, references: Any, samples: Any, seeds: Any) -> Any:
            steps = {"num_inference_steps": arguments.steps, "guidance_scale": recipe.paint.guidance}
            return sample_student(self.pipeline(), references, samples, seeds, **steps, **self.options)

    def saturated(image: Any) -> float:
        return float(np.asarray(image.convert("HSV"))[..., 1].mean() / 255)

    def saturation(name: str) -> float:
        return float(np.mean([saturated(open_image(row["image"])) for row in Dataset(folder / "samples" / name)]))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        suite = suites.load(recipe.evaluate.suite)
        if arguments.namespace:
            suite = suite.model_copy(update={"namespace": arguments.namespace})
        context = Context(recipe, folder, suite)
        samples = suite.samples(recipe.evaluate.samples, recipe.evaluate.prompts)
        names = arguments.setting or list(SETTINGS)
        places = {name: name.replace("=", "_").replace(",", "-") for name in names}
        methods: Any = {places[name]: Corrected(context, places[name], parsed(name)) for name in names}
        prints = {place: generation.fingerprint(recipe, suite, samples, m) for place, m in methods.items()}
        plan = harness.EvaluationPlan(Evaluation.of_run(recipe, folder), context, samples, methods, prints)
        plan.generate(None, lambda done, total, note: print(f"{done}/{total} {note}", file=sys.stderr))
        judge = judging.pocket(plan.evaluation, suite, judging.VisionModels(recipe.device))
        result = plan.summarize(harness.score_images(plan, [judge]))
        quality.add_kernel_distances(result, folder, judge.features, judge.like)
        found = {}
        for name, place in places.items():
            scores = result["methods"][place]
            found[name] = {**scores, "saturation": round(saturation(place), 4), "options": parsed(name)}
    return {
        "benchmark": "guidance",
        "model": arguments.model,
        "size": {"samples": arguments.samples, "prompts": arguments.prompts, "seeds": 1, "steps": arguments.steps},
        "namespace": suite.namespace,
        "truth": {"saturation": round(float(np.mean([saturated(suite.truth(sample)) for sample in samples])), 4)},
        "settings": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="held-out subjects")
    parser.add_argument("--prompts", type=int, default=3, help="prompts for each subject")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--model", default="pocket", help="the packaged student, or a student's folder")
    parser.add_argument("--setting", action="append", help=f"KEY=VALUE,… of {', '.join(KEYS)}; repeatable")
    parser.add_argument("--namespace", type=int, help="seeds of other subjects than the suite's")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    result = measure(arguments) | {"about": {"machine": machine(), "versions": versions()}}
    text = json.dumps(result, indent=1, default=str) + "\n"
    if arguments.out:
        arguments.out.write_text(text, "utf8")
    print(text)


if __name__ == "__main__":
    main()
