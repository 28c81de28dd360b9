"""What the tests of the stages share: tiny models, made once, and grids drawn by the pocket renderer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `curation_models` is also what other processes run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import curation_models

    return curation_models.make_teacher(tmp_path_factory.mktemp("stages") / "teacher")


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import curation_models

    return curation_models.make_judge(tmp_path_factory.mktemp("stages") / "judge")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import curation_models

    return curation_models.make_classifier(tmp_path_factory.mktemp("stages") / "classifier")


@pytest.fixture
def recipe(teacher: Path, judge: Path, tmp_path: Path) -> Any:
    import curation_models

    from diptych.recipe import load

    path = tmp_path / "tiny.yaml"
    path.write_text(curation_models.recipe_text(teacher, judge))
    return load(path)


@pytest.fixture(scope="session")
def subject_panels() -> list[tuple[np.ndarray, np.ndarray]]:
    """150 pairs of renders (64, 64, 3): one subject in two scenes in different places."""
    from diptych.pocket import world
    from diptych.pocket.render import render

    pairs = []
    for index in range(150):
        rng = np.random.default_rng([7, index])
        who, left, right = world.sample_identity(rng), world.sample_scene(rng), world.sample_scene(rng)
        while right.place == left.place:
            right = world.sample_scene(rng)
        pairs.append((render(who, left, 64), render(who, right, 64)))
    return pairs


@pytest.fixture(scope="session")
def relit_panels() -> list[tuple[np.ndarray, np.ndarray]]:
    """100 pairs of renders (64, 64, 3): one scene under two lights."""
    from diptych.pocket import world
    from diptych.pocket.render import render

    pairs = []
    for index in range(100):
        rng = np.random.default_rng([8, index])
        who, scene = world.sample_identity(rng), world.sample_scene(rng)
        pairs.append((render(who, scene, 64), render(who, world.relight(rng, scene), 64)))
    return pairs


@pytest.fixture(scope="session")
def drifted_panels() -> list[tuple[np.ndarray, np.ndarray]]:
    """100 pairs of renders (64, 64, 3): one scene in one light, the second with its subject's attributes drawn anew."""
    from diptych.pocket import world
    from diptych.pocket.render import render

    pairs = []
    for index in range(100):
        rng = np.random.default_rng([9, index])
        who, scene = world.sample_identity(rng), world.sample_scene(rng)
        pairs.append((render(who, scene, 64), render(world.drift(rng, who), scene, 64)))
    return pairs
