"""A study: its file, and a table whose intervals cover subjects and trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diptych import recipe as recipes
from diptych.evaluate import ablations
from diptych.evaluate.evaluation import overlay
from diptych.evaluate.scoring import metrics
from diptych.evaluate.scoring.metrics import ScoreArrays
from diptych.recipe.schema import Distill
from raising import raises

TIMES = 400


def write(folder: Path, **changes: Any) -> str:
    values: dict[str, Any] = {"name": "s", "recipe": "demo", "variants": {"full": {}, "less": {"sets": {}}}}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return str(path)


def outcome(cp: float, seed: int, subjects: int = 12) -> ScoreArrays:
    rng = np.random.default_rng(seed)
    own = np.random.default_rng(99).normal(0, 0.1, subjects)  # an easy subject is easy for every method
    identity = np.repeat(np.arange(subjects), 4)
    values = cp + own[identity] + rng.normal(0, 0.02, len(identity))
    return ScoreArrays(identity, values, np.full(len(identity), 0.8), rng.uniform(size=len(identity)) < 0.1)


@pytest.mark.parametrize("name", ablations.names())
def test_every_variant_of_a_study_that_ships_is_a_recipe(name: str) -> None:
    study, _ = ablations.load(name)
    start = recipes.load(study.recipe).values()
    for label, variant in study.variants.items():
        said = variant.sets.get("distill", {})
        if set(said) - set(Distill.model_fields):
            continue  # a key of distill that this version has not
        own = ablations.fill(variant.sets, dict.fromkeys(variant.needs(), Path("elsewhere")))
        recipes.check(overlay(start, study.sets, own, {"name": label}), name)
    assert {"full", "no-curation", "right-panel-only", "channel", "adapter", "sfo"} <= set(study.variants)
    assert {"text_only", "inpaint", "copy", "tuned"} <= {variant.method for variant in study.variants.values()}
    assert len(study.seeds) >= 3


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"varients": {}}, ("varients", "'variants'")),
        ({"full": "ful"}, ("'ful'", "'full'")),
        ({"seeds": [1, 1]}, ("seeds",)),
        (
            {"variants": {"full": {"sets": {"distill": {"init": "{later}/student"}}}, "later": {}}},
            ("variants.full.sets", "'later'"),
        ),
        ({"variants": {"full": {"beside": ["later"]}, "later": {}}}, ("variants.full.beside", "'later'")),
        ({"variants": {"full": {}, "../x": {}}}, ("'../x'",)),
        ({"variants": {"full": {"method": "inpaint"}}}, ("variants.full.method",)),
    ],
)
def test_an_invalid_study_is_one_line(tmp_path: Path, changes: Any, facts: tuple[str, ...]) -> None:
    with raises("recipe_invalid", *facts) as caught:
        ablations.load(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_an_unknown_study_is_reported_with_the_nearest() -> None:
    with raises("name_unknown", "pokcet", "'pocket'"):
        ablations.load("pokcet")


def test_names_in_braces_become_folders() -> None:
    sets = {"distill": {"init": "{full}/student", "data": [{"path": "{full}"}], "steps": 3}}
    found = ablations.fill(sets, {"full": Path("/runs/full/seed-1")})
    assert found["distill"]["init"] == "/runs/full/seed-1/student" and found["distill"]["steps"] == 3
    assert found["distill"]["data"] == [{"path": "/runs/full/seed-1"}]
    assert overlay({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


def test_a_row_is_the_mean_of_its_seeds_and_its_difference_is_paired() -> None:
    full = [outcome(0.7, seed) for seed in (1, 2, 3)]
    less = [outcome(0.6, seed) for seed in (4, 5, 6)]
    row = ablations.row(less, full, TIMES)
    each = [o.means()["cp_pf"] for o in less]
    assert row["cp_pf"] == pytest.approx(np.mean(each), abs=1e-4) and row["cp_pf_by_seed"] == np.round(each, 4).tolist()
    gap = row["difference"]
    assert gap["cp_pf"] == pytest.approx(-0.08, abs=0.02) and gap["ci95"][1] < 0 and gap["p"] < 0.01
    # Each alone is as uncertain as its subjects are different; their difference is not.
    width = row["ci95"]["cp_pf"][1] - row["ci95"]["cp_pf"][0]
    assert gap["ci95"][1] - gap["ci95"][0] < 0.5 * width
    assert ablations.row(full, full, TIMES)["difference"] == {
        "cp_pf": 0.0,
        "ci95": [0.0, 0.0],
        "p": 1.0,
        "apart": False,
    }
    assert ablations.row([outcome(0.1, 7)], full, TIMES)["difference"]["apart"]


def test_trainings_that_differ_widen_the_interval() -> None:
    steady = [outcome(0.6, 1), outcome(0.6, 1), outcome(0.6, 1)]
    moody = [outcome(0.4, 1), outcome(0.6, 1), outcome(0.8, 1)]
    widths = [np.ptp(ablations.row(each, None, TIMES)["ci95"]["cp"]) for each in (steady, moody)]
    one = np.ptp(metrics.summary(steady[0], TIMES)["ci95"]["cp"])
    assert widths[0] == pytest.approx(one, rel=0.1) and widths[1] > 1.3 * widths[0]


def test_runs_of_different_samples_are_not_averaged() -> None:
    with raises("suite_mismatch"):
        ablations.row([outcome(0.5, 1), outcome(0.5, 1, subjects=5)], None, TIMES)
    assert "difference" not in ablations.row([outcome(0.5, 1)], [outcome(0.5, 1, subjects=5)], TIMES)


def test_a_study_of_two_subjects_gives_no_p_value() -> None:
    def two(level: float) -> metrics.ScoreArrays:
        return metrics.ScoreArrays(np.arange(2), np.array([level, level + 0.01]), np.ones(2), np.zeros(2, bool))

    row = ablations.row([two(0.9)], [two(0.3)], 500)
    assert row["difference"]["p"] >= 0.5 and not row["difference"]["apart"]
    assert row["difference"]["ci95"][0] < 0 < row["difference"]["ci95"][1]
    shown = {**row, "training_seconds": 1.0, "about": "", "beside": {"full": row["difference"]}}
    study = {"name": "x", "suite": "pocket", "version": 1, "subjects": 2, "prompts": 1, "seeds": [0], "full": "full"}
    ran = {"splits": {}, "missing": [], "machine": {"cores": 2, "processor": "x86"}, "seconds": 60.0}
    said = ablations.markdown({**study, **ran, "variants": {"variant": shown}})
    assert said.count("too few subjects") == 2 and "p 0." not in said
