"""The ComfyUI nodes: the shipped workflows run on the pocket model, with ComfyUI's two nodes emulated by the test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych import Student
from diptych.pocket import world
from raising import raises

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
REFERENCE = Path(__file__).parents[2] / "examples" / "references" / "cat.png"


@pytest.fixture(scope="module")
def nodes() -> Any:
    """The folder as ComfyUI imports it."""
    found = [str(FOLDER)]
    spec: Any = importlib.util.spec_from_file_location(
        "comfyui_diptych", FOLDER / "__init__.py", submodule_search_locations=found
    )
    module = sys.modules["comfyui_diptych"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_image(picture: Image.Image | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """ComfyUI's LoadImage: the picture, and as a mask what is transparent in it (its mask editor paints that); of a
    picture without an alpha channel a mask of 64×64 zeros, whatever its size."""
    picture = picture or Image.open(REFERENCE)
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
    if "A" not in picture.getbands():
        return pixels, torch.zeros((1, 64, 64))
    return pixels, 1 - torch.from_numpy(np.asarray(picture.getchannel("A"), dtype=np.float32) / 255)[None]


def run(nodes: Any, workflow: dict[str, Any], picture: Image.Image | None = None, **changed: Any) -> torch.Tensor:
    """What SaveImage is given; `changed` are inputs of diptych's nodes."""
    results: dict[str, tuple[Any, ...]] = {}
    for number, node in workflow.items():  # the files list a node after those it needs
        inputs = {
            name: results[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        if node["class_type"] == "SaveImage":
            return inputs["images"]
        if node["class_type"] == "LoadImage":
            results[number] = load_image(picture)
            continue
        kind = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        asked = kind.INPUT_TYPES()
        known = asked["required"] | asked.get("optional", {})
        assert set(inputs) <= set(known) and set(asked["required"]) <= set(inputs)
        inputs |= {name: value for name, value in changed.items() if name in known}
        results[number] = getattr(kind(), kind.FUNCTION)(**inputs)
    raise AssertionError("no SaveImage")


@pytest.mark.parametrize("name", ["draw", "relight"])
def test_a_workflow_draws_what_the_library_draws(nodes: Any, name: str) -> None:
    workflow = json.loads((FOLDER / "workflows" / f"{name}.json").read_text())
    drawn = run(nodes, workflow, steps=2, seed=3)
    student = Student.load("pocket", speed="exact", progress_bar=False)
    if name == "draw":
        prompt = workflow["3"]["inputs"]["prompt"]
        own = student.generate(REFERENCE, prompt, steps=2, seed=3)
    else:
        own = student.relight(REFERENCE, workflow["3"]["inputs"]["light"], steps=2, seed=3)
    assert drawn.shape == (1, world.PANEL, world.PANEL, 3) and drawn.dtype == torch.float32
    assert torch.equal(drawn[0], torch.from_numpy(np.asarray(own, dtype=np.float32) / 255))


def test_where_no_mask_was_painted_a_relit_picture_stays(nodes: Any) -> None:
    picture = Image.open(REFERENCE).convert("RGBA")
    half = picture.width // 2
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, half, picture.height))  # the mask editor's brush makes transparent
    picture.putalpha(alpha)
    workflow = json.loads((FOLDER / "workflows" / "relight.json").read_text())
    drawn = (run(nodes, workflow, picture, steps=2, seed=3)[0] * 255).round().byte().numpy()
    student = Student.load("pocket", speed="exact", progress_bar=False)
    painted = Image.eval(alpha, lambda value: 255 - value)
    own = student.relight(REFERENCE, workflow["3"]["inputs"]["light"], steps=2, seed=3, mask=painted)
    assert np.array_equal(drawn, np.asarray(own))
    fitted = np.asarray(picture.convert("RGB").resize(drawn.shape[:2], Image.Resampling.LANCZOS), dtype=int)
    free, kept = np.s_[:, : half - 4], np.s_[:, half + 4 :]
    assert np.abs(drawn[kept] - fitted[kept]).mean() < 8 < np.abs(drawn[free] - fitted[free]).mean()


def test_a_batch_of_references_gives_as_many_pictures(nodes: Any) -> None:
    (student,) = nodes.NODE_CLASS_MAPPINGS["DiptychLoad"]().load("pocket", "", "none", "exact")
    pixels, _ = load_image()
    node = nodes.NODE_CLASS_MAPPINGS["DiptychGenerate"]()
    own = dict.fromkeys(("guidance", "image_guidance", "text_guidance", "size"), 0)
    sampling: dict[str, Any] = {"seed": 0, "steps": 1, "fit": "crop", **own}
    (drawn,) = node.generate(student, torch.cat([pixels, pixels.flip(2)]), "a cat on the moon", **sampling)
    assert drawn.shape == (2, world.PANEL, world.PANEL, 3) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_of_any_channels_are_what_the_library_opens(nodes: Any, mode: str, dtype: torch.dtype) -> None:
    from diptych.data.images import to_rgb

    picture = Image.open(REFERENCE).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture = picture.convert(mode)
    pixels = np.asarray(picture, dtype=np.float32).reshape(picture.height, picture.width, -1) / 255
    batch = torch.from_numpy(pixels).to(dtype)[None].repeat(2, 1, 1, 1)
    seen = nodes.nodes.to_images(batch)
    assert len(seen) == 2 and {one.mode for one in seen} == {"RGB"}
    apart = np.abs(np.asarray(seen[1], dtype=int) - np.asarray(to_rgb(picture), dtype=int))
    assert apart.max() <= (0 if dtype is torch.float32 else 4)


def test_a_tensor_that_is_not_a_batch_of_images_is_rejected(nodes: Any) -> None:
    for shape in ((0, 8, 8, 3), (8, 8, 3), (1, 8, 8, 5), (1, 8, 8, 0)):
        with raises("argument_type", shape[-2]):
            nodes.nodes.to_images(torch.zeros(shape))


def test_a_prompt_stays_as_it_is_without_an_endpoint(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_LLM_URL", raising=False)
    node = nodes.NODE_CLASS_MAPPINGS["DiptychEnhance"]()
    assert node.enhance(load_image()[0], "a cat on the moon", "", "") == ("a cat on the moon",)


def test_an_unknown_model_says_so(nodes: Any) -> None:
    with raises("model_not_found", "nosuchmodel"):
        nodes.NODE_CLASS_MAPPINGS["DiptychLoad"]().load("nosuchmodel/", "", "none", "exact")
