"""Students of teachers other than FLUX.1: trained, resumed, saved, and opened by diptych and by the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import kills
import pytest
import tiny_run
import torch

import tiny
from diptych import DiptychPipeline, Student
from diptych.data.images import open_image
from diptych.errors import UsageError
from diptych.run import ready
from diptych.student import load
from diptych.student.families.base import unpack
from diptych.train.distill import distill
from raising import raises

SIDE = tiny_run.PANEL
TEACHERS: dict[str, Callable[[Path], Path]] = {
    "flux2": tiny.flux2_teacher,
    "qwen_image": tiny.qwen_teacher,
    "sd3": tiny.sd3_teacher,
    "z_image": tiny.zimage_teacher,
}
STOCK = {
    "flux2": "Flux2KleinPipeline",
    "qwen_image": "QwenImagePipeline",
    "sd3": "StableDiffusion3Pipeline",
    "z_image": "ZImagePipeline",
}
UNGUIDED: dict[str, dict[str, Any]] = {"flux2": {"guidance_scale": 1.0}, "z_image": {"guidance_scale": 0.0}}
LORA = {"mode": "lora", "rank": 4, "ema": 0}
CASES = [
    ("flux2", "tokens", "full"),
    ("flux2", "tokens", "lora"),
    ("flux2", "diptych", "full"),
    ("flux2", "channel", "full"),
    ("qwen_image", "tokens", "lora"),
    ("qwen_image", "diptych", "full"),
    ("sd3", "diptych", "full"),
    ("sd3", "channel", "full"),
    ("z_image", "tokens", "full"),
    ("z_image", "tokens", "lora"),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny teacher."""
    made: dict[str, Path] = {}

    def teacher(name: str) -> Path:
        if name not in made:
            made[name] = TEACHERS[name](tmp_path_factory.mktemp(name) / "teacher")
        return made[name]

    return teacher


def recipe(teacher: Path, **distill: Any) -> Any:
    given = {"conditioning": "tokens", "learning_rate": 1e-2, "steps": 2, "batch_size": 2, "validation_pairs": 2}
    made = tiny_run.make_recipe(teacher, **{**given, "sample_pairs": 1, "sample_steps": 2, **distill})
    return made.model_copy(update={"paint": made.paint.model_copy(update={"panel_size": SIDE})})


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(request: Any, teachers: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained student: `out`, `teacher`, `pairs`, and the values of its case."""
    name, conditioning, mode = request.param
    out, teacher = tmp_path_factory.mktemp(name) / "student", teachers(name)
    options = {"conditioning": conditioning, **(LORA if mode == "lora" else {})}
    if conditioning == "diptych":
        options["condition_init"] = "teacher"
    distill(recipe(teacher, **options), world.pairs, out)
    named = {"name": name, "conditioning": conditioning, "mode": mode}
    return SimpleNamespace(out=out, teacher=teacher, pairs=world.pairs, options=options, **named)


def base(trained: Any) -> Path | None:
    return trained.teacher if trained.mode == "lora" else None


def stock_pipeline(trained: Any) -> Any:
    """The student in the stock pipeline."""
    cls = getattr(diffusers, STOCK[trained.name])
    pipe = cls.from_pretrained(trained.teacher if trained.mode == "lora" else trained.out)
    if trained.mode == "lora":
        pipe.load_lora_weights(trained.out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_student_opens_and_sees_its_reference(trained: Any) -> None:
    lines, _ = kills.result(trained.out, trained.mode)
    assert len(lines) == 2 and all(line["loss"] > 0 for line in lines)
    assert (lines[0]["left"] > 0) == (trained.conditioning == "diptych")
    student = Student.load(trained.out, base(trained), device="cpu", progress_bar=False)
    settings = student.pipeline.settings
    assert (settings.conditioning, settings.sizes) == (trained.conditioning, ((SIDE, SIDE),))
    first, second = (open_image(row["conditioning"]) for row, _ in zip(trained.pairs, range(2), strict=False))
    given: dict[str, Any] = {"steps": 3, "size": (24, 16), "image_guidance": 2.0, "text_guidance": 1.5}
    images = student.generate([first, second, None], "a cat", batch_size=3, **given)
    assert [image.size for image in images] == [(24, 16)] * 3
    size = {"height": 16, "width": 24, "num_inference_steps": 3, "output_type": "latent"}
    pipe: Any = student.pipeline
    one, other, none = pipe("a cat", reference=[first, second, None], generator=0, **size).images
    assert min((a - b).abs().max() for a, b in ((one, other), (one, none), (other, none))) > 1e-5


@pytest.mark.parametrize("name", ["z_image", "flux2"])
def test_exact_speed_changes_nothing_and_step_caches_are_refused(name: str, teachers: Any) -> None:
    from diptych.student import settings
    from diptych.student.pipeline import as_student
    from diptych.student.runtime.applied import apply_speed
    from diptych.student.runtime.speed import parse

    stock = getattr(diffusers, STOCK[name]).from_pretrained(teachers(name))
    settings.register(stock.transformer, settings.Settings(conditioning="tokens"))
    pipe = as_student(stock, stock.transformer)
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": 0}
    plain = pipe("a cat", **given, output_type="latent").images
    with raises("speed_unsupported", "Step caches", kind=UsageError):
        apply_speed(pipe, parse("fast"))
    apply_speed(pipe, parse("exact"))
    torch.testing.assert_close(pipe("a cat", **given, output_type="latent").images, plain, rtol=0, atol=1e-5)


def test_the_stock_pipeline_opens_it_and_agrees(trained: Any) -> None:
    stock = stock_pipeline(trained)
    if trained.conditioning != "tokens":  # it has no input for the condition
        ours = load(trained.out, device="cpu").transformer.state_dict()
        theirs = stock.transformer.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        return
    pipe: Any = load(trained.out, base(trained), device="cpu", fuse=True)
    pipe.set_progress_bar_config(disable=True)
    height, width = (64, 80) if trained.name == "flux2" else (16, 24)
    canvas = pipe.canvas(height, width)
    noise = pipe.noise([0], canvas)
    of_stock = {"flux2": noise.transpose(1, 2).unflatten(2, canvas.size), "z_image": unpack(noise, canvas.size)}
    shared: dict[str, Any] = {"prompt": "a cat in the snow", "height": height, "width": width}
    shared |= {"num_inference_steps": 3, "output_type": "pt"}
    theirs_only = {"latents": of_stock.get(trained.name, noise), "max_sequence_length": pipe.text_length}
    theirs_only |= UNGUIDED.get(trained.name, {})
    references: list[tuple[Any, Any]] = [(None, {})]
    if trained.name == "flux2":
        image = open_image(next(iter(trained.pairs))["conditioning"]).resize((72, 64))
        references.append((image, {"image": image}))
    drawn = []
    for reference, argument in references:
        pixels = None if reference is None else pipe.image_processor.preprocess(reference)[0]
        ours = pipe(reference=pixels, latents=noise, **shared).images
        theirs = stock(**argument, **shared, **theirs_only).images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        drawn.append(ours)
    assert len(drawn) == 1 or (drawn[0] - drawn[1]).abs().max() > 1e-4


def test_a_training_resumes_where_it_stopped(trained: Any, tmp_path: Path) -> None:
    if trained.conditioning == "channel":
        pytest.skip("as diptych")
    distill(recipe(trained.teacher, **trained.options, **{"steps": 1}), trained.pairs, tmp_path / "out")
    distill(recipe(trained.teacher, **trained.options), trained.pairs, tmp_path / "out")
    (resumed, weights), (whole, wanted) = (kills.result(out, trained.mode) for out in (tmp_path / "out", trained.out))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole] and weights == wanted


@pytest.mark.parametrize(
    ("name", "options", "fact"),
    [
        ("flux2", {"conditioning": "diptych", **LORA}, "mode: full"),
        ("flux2", {"positions": "left"}, "positions"),
        ("qwen_image", {"reference_attention": "self"}, "reference_attention"),
        ("sd3", {}, "diptych"),
        ("z_image", {"conditioning": "diptych"}, "tokens"),
    ],
)
def test_what_a_family_cannot_do_is_refused_before_training(
    name: str, options: dict[str, Any], fact: str, teachers: Any, world: Any, tmp_path: Path
) -> None:
    wrong = recipe(teachers(name), **options)
    for check in (lambda: ready.student(wrong, teachers(name)), lambda: distill(wrong, world.pairs, tmp_path)):
        with raises("method_unsuited", fact, kind=UsageError):
            check()


def test_presets_of_flux1_are_refused(teachers: Any) -> None:
    folder = teachers("z_image")
    with raises("option_unsuited", "ZImageTransformer2DModel", kind=UsageError):
        load(folder, device="cpu", memory=8)
    with raises("model_mismatch", "ZImagePipeline"):
        DiptychPipeline.from_pretrained(folder)
    with raises("model_unsupported", "text-to-image"):
        load(folder, device="cpu")
