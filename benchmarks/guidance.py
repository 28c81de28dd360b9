"""CP·PF and saturation of the packaged student with corrections of guidance, on the pocket suite.

    python benchmarks/guidance.py --samples 8 --prompts 2 --out benchmarks/results/guidance.json

All settings generate from the same references, prompts and noise, at stronger guidance than the student's default,
where saturation appears. The scoring judge did not curate (docs/evaluate.md). `saturation` is the mean of HSV's S, 0 to
1, of the images.
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

SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "rescale=0.7": {"guidance_rescale": 0.7},
    "rescale=1": {"guidance_rescale": 1.0},
    "parallel=0": {"guidance_parallel": 0.0},
    "parallel=0 norm=0.2": {"guidance_parallel": 0.0, "guidance_norm": 0.2},
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """CP·PF, its parts and the saturation of each setting."""
    from diptych import recipe as recipes
    from diptych.data.images import open_image
    from diptych.data.store import Dataset
    from diptych.evaluate import generation, harness, suites
    from diptych.evaluate.evaluation import Evaluation
    from diptych.evaluate.methods.common import Context
    from diptych.evaluate.methods.students import PackagedStudent, sample_student
    from diptych.evaluate.scoring import judging, metrics, summary

    sizes = [f"evaluate.samples={arguments.samples}", f"evaluate.prompts={arguments.prompts}", "evaluate.seeds=[0]"]
    recipe = recipes.load("pocket", [*sizes, f"evaluate.steps={arguments.steps}", "evaluate.batch_size=8"])

    class Corrected(PackagedStudent):
        """The packaged student with strong guidance and corrections."""

        def __init__(self, context: Any, place: str, options: dict[str, float]) -> None:
            super().__init__(context)
            self.name, self.options = place, options  # pyright: ignore[reportAttributeAccessIssue]

        def fingerprint(self) -> str:
            return f"{super().fingerprint()} {arguments.image} {arguments.text} {self.options}"

        def generate(self, references: Any, samples: Any, seeds: Any) -> Any:
            scales = {"image_guidance_scale": arguments.image, "text_guidance_scale": arguments.text}
            steps = {"num_inference_steps": arguments.steps, "guidance_scale": recipe.paint.guidance}
            return sample_student(self.pipeline(), references, samples, seeds, **steps, **scales, **self.options)

    def saturation(name: str) -> float:
        data = Dataset(folder / "samples" / name)
        rows = [row for shard in data.shards() for row in data.read_shard(shard)]
        return float(np.mean([np.asarray(open_image(row["image"]).convert("HSV"))[..., 1] / 255 for row in rows]))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        suite = suites.load(recipe.evaluate.suite)
        context = Context(recipe, folder, suite)
        samples = suite.samples(recipe.evaluate.samples, recipe.evaluate.prompts)
        places = {name: name.replace("=", "_").replace(" ", "_") for name in SETTINGS}
        methods: Any = {places[name]: Corrected(context, places[name], SETTINGS[name]) for name in SETTINGS}
        prints = {place: generation.fingerprint(recipe, suite, samples, m) for place, m in methods.items()}
        plan = harness.EvaluationPlan(Evaluation.of_run(recipe, folder), context, samples, methods, prints)
        plan.generate(None, lambda done, total, note: print(f"{done}/{total} {note}", file=sys.stderr))
        judge = judging.pocket(plan.evaluation, suite, judging.VisionModels(recipe.device))
        lines = harness.score_images(plan, [judge])
        found = {}
        for name, place in places.items():
            scores = metrics.summary(summary.outcome(lines, place, suites.MAIN), arguments.bootstrap)
            found[name] = {**scores, "saturation": round(saturation(place), 4), "options": SETTINGS[name]}
    return {
        "benchmark": "guidance",
        "guidance": {"image": arguments.image, "text": arguments.text, "steps": arguments.steps},
        "size": {"samples": arguments.samples, "prompts": arguments.prompts, "seeds": 1},
        "settings": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="held-out subjects")
    parser.add_argument("--prompts", type=int, default=3, help="prompts for each subject")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--image", type=float, default=4.0, help="image guidance")
    parser.add_argument("--text", type=float, default=6.0, help="text guidance")
    parser.add_argument("--bootstrap", type=int, default=1000)
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
