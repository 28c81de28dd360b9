"""How often each family's transformer runs, and what its guidance adds: `paint.true_guidance` means one thing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from diptych.errors import UsageError, UserError
from diptych.recipe.schema import Paint as PaintSettings
from diptych.stages import paint
from diptych.student.families import teachers as calls

SIZE = {"height": 32, "width": 64}
# Families that rescale the guided prediction: its direction is checked, and not its length.
RESCALED = ("LongCatImagePipeline", "Lumina2Pipeline")


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture(params=sorted(tiny.FAMILIES))
def pipe(request: pytest.FixtureRequest, made: dict[str, Any]) -> Any:
    if request.param not in made:
        torch.manual_seed(0)
        made[request.param] = tiny.FAMILIES[request.param]()
        made[request.param].set_progress_bar_config(disable=True)
    return made[request.param]


class Watch:
    """Counts rows and forwards, puts noise in the place of the predictions, and keeps what guidance made of it."""

    def __init__(self, pipe: Any) -> None:
        self.model = getattr(pipe, "transformer", None) or pipe.unet
        self.scheduler = pipe.scheduler
        self.rows: list[int] = []
        self.predictions: list[torch.Tensor] = []
        self.stepped: list[torch.Tensor] = []

    def __enter__(self) -> Watch:
        self.forward, self.step = self.model.forward, self.scheduler.step

        def forward(*args: Any, **kwargs: Any) -> Any:
            out, *rest = self.forward(*args, **kwargs)
            noise = [torch.randn(row.shape) for row in out]
            self.rows.append(len(noise))
            self.predictions += noise
            return (noise if isinstance(out, list) else torch.stack(noise), *rest)

        def step(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.stepped.append(output)
            return self.step(output, *args, **kwargs)

        self.model.forward, self.scheduler.step = forward, step
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.forward, self.scheduler.step


def draw(pipe: Any, true_guidance: float, images: int = 2, steps: int = 2) -> tuple[Watch, torch.Tensor]:
    settings = PaintSettings(steps=steps, true_guidance=true_guidance)
    options = paint.call_options(pipe, settings, images)
    with Watch(pipe) as seen:
        drawn = paint.generate(pipe, ["a red cat", "a blue dog"][:images], [1, 2][:images], **SIZE, **options)
    paint.check_size(pipe, drawn, **SIZE)
    return seen, drawn


def test_one_is_off_for_every_family_and_two_costs_what_the_table_says(pipe: Any) -> None:
    call = calls.of(type(pipe).__name__)
    assert draw(pipe, 1.0)[0].rows == [2, 2]
    guided, config = draw(pipe, 2.0)[0].rows, dict(pipe.config)
    assert len(guided) * guided[0] == 4 * call.branches(2.0, config)
    assert guided[0] == 2 * call.rows(2.0, config)


def test_guidance_is_the_same_mixture_for_every_family(pipe: Any) -> None:
    for w in (1.5, 3.0):
        seen, _ = draw(pipe, w, images=1, steps=1)
        parts = torch.stack([part.flatten() for part in seen.predictions], dim=1)
        shares = torch.linalg.lstsq(parts, seen.stepped[0].flatten()[:, None]).solution.flatten().abs().sort().values
        if calls.of(type(pipe).__name__).scale is None:
            assert len(shares) == 1
        elif type(pipe).__name__ in RESCALED:
            assert (shares[1] / shares[0]).item() == pytest.approx(w / (w - 1), rel=0.3)
        else:
            assert shares.tolist() == pytest.approx([w - 1, w], rel=1e-3)


def test_prompts_stay_as_written(pipe: Any) -> None:
    if rewriter := getattr(pipe, "pe", None):
        rewriter.forward = None  # type: ignore[assignment]
    options = paint.call_options(pipe, PaintSettings(steps=1, true_guidance=2.0), 1)
    state = torch.random.get_rng_state()
    first, again = (paint.generate(pipe, ["a red cat"], [1], **SIZE, **options) for _ in range(2))
    assert torch.equal(first, again), "the second call was given another prompt, or drew from other noise"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_folders_of_other_families_count_alike(teacher: Path, tmp_path: Path) -> None:
    counted = {"FluxPipeline": [2] * 4, "Flux2KleinPipeline": [2] * 4, "StableDiffusion3Pipeline": [4] * 2}
    counted |= {"QwenImagePipeline": [2] * 4}
    folders = [teacher, *(getattr(tiny, f"{name}_teacher")(tmp_path / name) for name in ("flux2", "sd3", "qwen"))]
    for folder in folders:
        pipe = paint.open_teacher(folder, torch.float32)
        assert draw(pipe, 1.0)[0].rows == [2, 2]
        assert draw(pipe, 2.0)[0].rows == counted[type(pipe).__name__]
    klein = tmp_path / "flux2" / "model_index.json"
    klein.write_text(json.dumps(json.loads(klein.read_text()) | {"is_distilled": True}))
    pipe = paint.open_teacher(klein.parent, torch.float32)
    assert draw(pipe, 2.0)[0].rows == [2, 2] and calls.of("Flux2KleinPipeline").branches(2.0, pipe.config) == 1


def test_every_class_of_the_table_has_the_arguments_that_it_names() -> None:
    import inspect

    import diffusers

    found = {name: getattr(diffusers, name, None) for name, traits in calls.table().items() if traits.known}
    there = {name: cls for name, cls in found.items() if cls is not None and "Dummy" not in type(cls).__name__}
    # A diffusers may lack some, or a package that they need, but never the two that everybody has.
    assert {"FluxPipeline", "StableDiffusion3Pipeline"} <= there.keys()
    for name, cls in there.items():
        call = calls.of(name)
        asks = inspect.signature(cls.__call__).parameters
        named = {call.scale, call.embedded, *call.switches} - {None}
        assert named <= set(asks) and {"prompt", "height", "width", "generator"} <= set(asks), name
        rewrites = {key for key, value in asks.items() if calls.rewrites(key) and value.default is True}
        assert all(call.switches.get(key) is False for key in rewrites), name


def test_guidance_that_a_class_cannot_have_is_refused_and_one_it_lacks_is_said() -> None:
    with pytest.raises(UsageError, match=r"true_guidance 1\.5.*above 2"):
        calls.doubt("Cosmos2TextToImagePipeline", 1.5)
    assert calls.of("Cosmos2TextToImagePipeline").arguments(3.0) == {"guidance_scale": 2.0}
    assert calls.of("Cosmos2TextToImagePipeline").arguments(1.0) == {"guidance_scale": 0.0}
    assert calls.of("Krea2Pipeline").arguments(2.0) == {"guidance_scale": 1.0}
    assert "no effect" in str(calls.doubt("Flux2Pipeline", 2.0)) and calls.doubt("Flux2Pipeline", 1.0) is None
    with pytest.raises(UsageError, match="one prompt a call"):
        calls.doubt("DreamLitePipeline", 1.0)


class Unknown:
    """A pipeline of a class that nobody has met, by its call and config."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.components: dict[str, Any] = {}

    def __call__(
        self, prompt, height, width, generator, guidance_scale=5.0, negative_prompt=None, magic_prompt_enhance=True
    ) -> None: ...


def test_a_class_that_is_not_known_keeps_the_prompt_and_is_told_about(
    recipe: Any, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = paint.call_options(Unknown(), PaintSettings(true_guidance=2.0), 1)
    assert options == {"guidance_scale": 2.0, "negative_prompt": [""], "magic_prompt_enhance": False}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion9Pipeline"}))
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no pipeline class"):
        paint.PaintStage(recipe.model_copy(update={"teacher": str(tmp_path)})).load()
    assert any("StableDiffusion9Pipeline" in r.getMessage() and "unknown" in r.getMessage() for r in caplog.records)
    assert not paint.warnings(recipe, teacher)
