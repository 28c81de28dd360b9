"""A tiny world of models, made once, and a run evaluated in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_world as tiny
from oracle_judges import Oracle

ROLES = ("curator", "scorer", "reader")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_teacher(tmp_path_factory.mktemp("evaluate") / "teacher")


@pytest.fixture(scope="session")
def suite() -> Any:
    return tiny.make_suite()


@pytest.fixture(scope="session")
def oracle(suite: Any) -> Oracle:
    return Oracle(suite, 4, 2)


@pytest.fixture(scope="session")
def judge_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that stand for the judges' weights: what tells them apart is their content."""
    root = tmp_path_factory.mktemp("judges")
    for role in ROLES:
        (root / role).mkdir()
        (root / role / "config.json").write_text(json.dumps({"role": role}))
    return root


def _put(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.evaluate.scoring import judging

    monkeypatch.setattr(judging.VisionModels, "embed", lambda *_: oracle.embed)
    monkeypatch.setattr(judging.VisionModels, "reader", lambda *_: oracle)


@pytest.fixture
def oracles(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """Puts the oracle in the judges' place."""
    _put(oracle, monkeypatch)
    return oracle


@pytest.fixture
def run_dir(teacher: Path, tmp_path: Path) -> Path:
    """A run folder that holds a student and nothing else."""
    tiny.make_student(teacher, tmp_path / "run" / "student")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def evaluated(
    teacher: Path, judge_folders: Path, suite: Any, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder that has been evaluated; to be copied, not changed."""
    from diptych.evaluate import harness

    folder = tmp_path_factory.mktemp("evaluated")
    tiny.make_student(teacher, folder / "student")
    with pytest.MonkeyPatch.context() as patch:
        _put(oracle, patch)
        harness.evaluate_run(tiny.make_recipe(teacher, judge_folders), folder, suite=suite)
    return folder
