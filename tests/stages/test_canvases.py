"""The canvases of benchmarks/canvases.py, with a known truth: a hundred of them are cut as well as its thousand."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.recipe.schema import Thresholds
from diptych.stages.curate import seams

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


canvases = load("canvases")


def fault(canvas: Any) -> str:
    cut = seams.cut(canvas.image, canvas.rows, canvas.cols, canvas.panel_size)
    assert len(cut.panels) == canvas.rows * canvas.cols
    assert {panel.size for panel in cut.panels} == {(canvas.panel_size, canvas.panel_size)}
    return canvases.fault(canvas, cut.strength, cut.boxes, Thresholds().seam)


def test_nineteen_of_twenty_canvases_are_cut_right() -> None:
    faults = {}
    for index in range(100):
        canvas = canvases.make(3, index, size=64 if index % 4 else 256)
        if found := fault(canvas):
            faults[index, canvas.kind] = found
    assert len(faults) <= 5, faults


def test_the_truth_is_where_the_panels_are() -> None:
    for index, kind in enumerate(("plain", "border", "gutter", "border and gutter")):
        canvas = canvases.make(1, 3 * index, kind, 64)
        assert canvas.finish == "as drawn" and len(canvas.boxes) == canvas.rows * canvas.cols
        outside = np.ones((canvas.image.height, canvas.image.width), bool)
        for left, top, right, bottom in canvas.boxes:
            outside[top:bottom, left:right] = False
        colours = np.unique(np.asarray(canvas.image)[outside], axis=0)
        assert len(colours) == (0 if kind == "plain" else 1), kind


def test_a_canvas_is_the_same_each_time_and_shows_what_was_asked_for() -> None:
    one, again, other = (canvases.make(1, index, "gutter", 64, (2, 2)) for index in (5, 5, 6))
    assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert one.boxes == again.boxes and one.image.size == (128, 128)
    assert not canvases.make(1, 5, "one picture", 64).boxes and not canvases.make(1, 5, "fewer panels", 64).boxes


def test_a_fault_is_told_as_what_it_is() -> None:
    grid = canvases.make(1, 0, "plain", 256, (1, 2))
    picture = replace(grid, boxes=())
    near = [(0, 0, 254, 256), (254, 0, 512, 256)]
    off = [(0, 0, 253, 256), (253, 0, 512, 256)]
    assert canvases.fault(grid, 0.5, grid.boxes) == canvases.fault(grid, 0.5, near) == ""
    assert canvases.fault(grid, 0.5, off) == "off by 3 px"
    assert canvases.fault(grid, -0.1, grid.boxes) == "refused"
    assert canvases.fault(picture, 0.5, near) == "taken for a grid" and canvases.fault(picture, -0.1, near) == ""


@pytest.mark.parametrize("size", [64, 256])
def test_panels_hold_nothing_of_a_gutter_or_border(size: int) -> None:
    canvas = canvases.make(4, 0, "border and gutter", size, (1, 3))
    flat = np.asarray(canvas.image)[0, 0]
    cut = seams.cut(canvas.image, 1, 3, size)
    assert all(seam.gutter > 0 for seam in cut.seams) and all("gutter" in seam for seam in cut.evidence())
    for left, top, right, bottom in cut.boxes:
        panel = np.asarray(canvas.image.crop((left, top, right, bottom)))
        for edge in (panel[0], panel[-1], panel[:, 0], panel[:, -1]):
            assert np.mean((edge == flat).all(-1)) < 0.5


def test_the_benchmark_says_how_many_were_right(tmp_path: Path) -> None:
    benchmark = load("cutting")
    found = benchmark.run(6, 3, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(found))
    assert sum(kind["drawn"] for kind in found["kinds"].values()) == found["count"] == 6
    assert found["right"] == 6 - len(found["wrong"])
    assert f"| all | 6 | {found['right']} |" in benchmark.table(found)
