"""One class for every stock pipeline with a reference: a sample's values reach the arguments that its call has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_world as tiny
from PIL import Image

import tiny as tiny_models
from diptych.evaluate.methods import baselines
from diptych.evaluate.methods.common import Context
from diptych.pocket.world import PANEL
from raising import raises


def bare(name: str) -> Any:
    """A pipeline without any model, to inspect its call."""
    import diffusers

    cls = getattr(diffusers, name)
    return cls.__new__(cls)


def settings(teacher: Path, judge_folders: Path, model: Path, **more: Any) -> Any:
    stock = {"model": str(model), "steps": 2, **more}
    recipe = tiny.make_recipe(teacher, judge_folders, methods=["pipeline"], pipeline=stock)
    values = recipe.values()
    values["paint"]["dtype"] = "float32"
    return type(recipe).model_validate(values)


@pytest.fixture(scope="module")
def folders(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random pipelines of three kinds, as folders."""
    from diffusers import FluxControlPipeline, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel

    root = tmp_path_factory.mktemp("stock")
    parts = {k: v for k, v in FluxPipeline.from_pretrained(teacher).components.items() if v is not None}
    FluxKontextPipeline(**parts).save_pretrained(root / "kontext")
    tiny.make_student(teacher, root / "student")
    wide = FluxTransformer2DModel.from_pretrained(root / "student" / "transformer")
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    FluxControlPipeline(transformer=wide, **{n: parts[n] for n in names}).save_pretrained(root / "control")
    for name in ("kontext", "control"):
        # transformers writes these tokenizers in another form; the teacher's are known to open.
        for tokenizer in ("tokenizer", "tokenizer_2"):
            shutil.rmtree(root / name / tokenizer)
            shutil.copytree(teacher / tokenizer, root / name / tokenizer)
    tiny_models.flux2_teacher(root / "flux2")
    return {name: root / name for name in ("kontext", "control", "flux2")}


OPTIONS: dict[str, dict[str, Any]] = {
    "kontext": {"guidance_scale": 2.5, "max_sequence_length": 32},
    "control": {"max_sequence_length": 32},
    "flux2": {"max_sequence_length": 32},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_stock_pipeline_answers_samples_from_their_references(
    name: str, folders: dict[str, Path], teacher: Path, judge_folders: Path, suite: Any, tmp_path: Path
) -> None:
    size = 64 if name == "flux2" else None  # it rejects smaller references
    recipe = settings(teacher, judge_folders, folders[name], options=OPTIONS[name], size=size)
    method = baselines.Stock(Context(recipe, tmp_path, suite))
    samples = suite.samples(2, 1)[:2]
    references = [suite.reference_image(s) for s in samples]
    drawn = method.generate(references, samples, [3, 4])
    assert [image.size for image in drawn] == [(PANEL, PANEL)] * 2 and drawn[0].mode == "RGB"
    assert method.generate(references[:1], samples[:1], [3])[0].tobytes() == drawn[0].tobytes()  # seeds hold
    assert method.generate(references[:1], samples[:1], [4])[0].tobytes() != drawn[0].tobytes()
    other = method.generate(references[1:], samples[:1], [3])[0]
    assert np.abs(np.asarray(other, float) - np.asarray(drawn[0], float)).max() > 0  # the reference matters


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("FluxKontextPipeline", "image"),
        ("Flux2Pipeline", "image"),
        ("Flux2KleinPipeline", "image"),
        ("FluxControlPipeline", "control_image"),
        ("QwenImageEditPipeline", "image"),
        ("QwenImageEditPlusPipeline", "image"),
        ("OmniGenPipeline", "input_images"),
        ("LongCatImageEditPipeline", "image"),
    ],
)
def test_the_reference_goes_where_the_pipeline_takes_it(name: str, argument: str) -> None:
    import inspect

    pipe = bare(name)
    assert baselines.reference_argument(pipe) == argument
    image = Image.new("RGB", (64, 48))
    given = baselines.arguments(pipe, argument, image, "a cat", 7, 48, 64, 4, {"guidance_scale": 2.0})
    call = inspect.signature(type(pipe).__call__)
    call.bind(pipe, **given)  # all of it is taken
    assert given["prompt"] == "a cat" and given["num_inference_steps"] == 4 and given["guidance_scale"] == 2.0
    assert given[argument] == ([image] if argument == "input_images" else image)
    assert given["generator"].initial_seed() == 7
    if "height" in call.parameters:
        assert (given["height"], given["width"]) == (48, 64)
    if name == "FluxKontextPipeline":  # which would generate a megapixel otherwise
        assert given["max_area"] == 48 * 64 and given["_auto_resize"] is False


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline", "FluxFillPipeline", "QwenImagePipeline"])
def test_a_pipeline_without_a_reference_is_rejected(name: str) -> None:
    with raises("method_unsuited", name, "evaluate.pipeline.argument"):
        baselines.reference_argument(bare(name))


def test_misspelt_options_are_reported_with_the_nearest() -> None:
    pipe = bare("FluxKontextPipeline")
    image = Image.new("RGB", (32, 32))
    with raises("recipe_invalid", "'guidance_scal'", "'guidance_scale'"):
        baselines.arguments(pipe, "image", image, "a", 0, 32, 32, None, {"guidance_scal": 1})
    with raises("recipe_conflict", "height"):
        baselines.arguments(pipe, "image", image, "a", 0, 32, 32, None, {"height": 1})
    with raises("recipe_invalid", "'imag'", "'image'"):
        baselines.reference_argument(pipe, "imag")


def test_the_prompt_can_be_wrapped_and_a_method_needs_a_model(
    folders: dict[str, Path], teacher: Path, judge_folders: Path, suite: Any, tmp_path: Path
) -> None:
    prompts: list[str] = []
    recipe = settings(teacher, judge_folders, folders["kontext"], prompt="show this subject: {prompt}")
    method = baselines.Stock(Context(recipe, tmp_path, suite))

    class Pipe:
        def __call__(self, image: Any, prompt: str, generator: Any) -> Any:
            prompts.append(prompt)
            return type("Out", (), {"images": [image]})

    method.context._slot["pipeline"] = Pipe()
    sample = suite.samples(2, 1)[0]
    method.generate([suite.reference_image(sample)], [sample], [0])
    assert prompts == [f"show this subject: {sample.prompt}"]
    empty = tiny.make_recipe(teacher, judge_folders, methods=["pipeline"])
    with raises("method_unsuited", "evaluate.pipeline.model"):
        baselines.Stock(Context(empty, tmp_path, suite)).fingerprint()
