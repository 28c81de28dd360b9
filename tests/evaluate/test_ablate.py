"""A study for real, in the tiny world: one run's data, students and an adapter trained with two seeds, one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_world as tiny
import yaml

from diptych import recipe as recipes
from diptych.cli import app
from diptych.data import places
from diptych.errors import UsageError
from diptych.run import ablate
from diptych.run.runner import run
from diptych.utils.console import Display

QUIET = Display(quiet=True)


@pytest.fixture
def study(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three trained variants with two seeds and two baselines, on random models of the real classes."""
    from diptych.evaluate import suites

    few = tiny.make_suite(10, 10)
    monkeypatch.setattr(suites, "load", lambda name: few)
    judges = tiny.make_judges(tmp_path / "judges")
    values: dict[str, Any] = tiny.make_recipe(teacher, judges, samples=3, prompts=1, steps=2).values()
    values |= {"write": {"count": 8, "shard_size": 4}, "paint": {"steps": 2, "batch_size": 4}}
    values["curate"] |= {"batch_size": 4, "thresholds": {"same": -1, "near_copy": 0, "seam": -1}}
    values["distill"] |= {"batch_size": 4, "warmup": 1, "validation_pairs": 2, "sample_every": 0, "validate_every": 3}
    values["evaluate"]["adapter"] = {"encoder": str(judges / "curator")}
    values["evaluate"]["tuning"] = {"learning_rates": [1e-3, 1e-2], "steps": [1], "rank": 2, "batch_size": 2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    path = tmp_path / "study.yaml"
    variants: dict[str, Any] = {
        "full": {"about": "all of it"},
        "adapter": {"method": "adapter"},
        "again": {"sets": {"distill": {"init": "{full}/student", "steps": 1}}},
        "words": {"method": "text_only"},
        "tuned": {"method": "tuned", "beside": ["words"], "sets": {"evaluate": {"samples": 2}}},
    }
    said = {"name": "tiny", "recipe": "base.yaml", "seeds": [0, 1], "sets": {"distill": {"steps": 2}}}
    path.write_text(yaml.safe_dump({**said, "variants": variants}, sort_keys=False))
    return path


def test_a_study_trains_what_is_missing_and_ends_in_one_table(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part = ablate.ablate(str(study), out, QUIET, only=["full"])
    assert list(part["variants"]) == ["full"] and len(part["missing"]) == 6
    found = ablate.ablate(str(study), out, QUIET)
    assert list(found["variants"]) == ["full", "adapter", "again", "words", "tuned"] and not found["missing"]
    assert found == json.loads((out / "ablations.json").read_text())
    for name, row in found["variants"].items():
        seeds, pictures = (1 if name in ("words", "tuned") else 2), (2 if name == "tuned" else 3)
        assert row["seeds"] == len(row["cp_pf_by_seed"]) == seeds and row["n"] == pictures
        assert ("difference" in row) == (name != "full") and row["seconds_per_image"] > 0
        assert name == "full" or row["difference"]["seeds"] == 2  # a baseline stands beside all trainings
        assert found["splits"]["kinds"][name]["n"] == 2
    tuned = found["variants"]["tuned"]
    assert set(tuned["sweep"]) == {"tuned-0.001-1", "tuned-0.01-1"} and tuned["training_seconds"] > 0
    assert tuned["cp_pf"] == tuned["sweep"][tuned["picked"]] == max(tuned["sweep"].values())
    text = (ablate.place(out, "words", 0) / "samples" / "scores.jsonl").read_text()
    words = [line for line in map(json.loads, text.splitlines()) if line["split"] == "identities"][:2]
    alone = sum(line["cp"] for line in words) * sum(line["pf"] for line in words) / 4
    beside = tuned["beside"]["words"]
    assert beside["seeds"] == 1 and beside["cp_pf"] == pytest.approx(tuned["cp_pf"] - alone, abs=2e-4)
    trained = sum(row["seeds"] * row["training_seconds"] for row in found["variants"].values())
    assert found["subjects"] == 3 and found["seconds"] > trained
    page = (out / "ablations.md").read_text()
    assert page.count("| full |") == 2 and "- `full`: all of it" in page and "Not run yet" not in page
    assert "## Held-out kinds" in page and f"`tuned` is `{tuned['picked']}`, the best of" in page
    assert f"`tuned` compared with `words`, paired, on the same 2 images: {beside['cp_pf']:+.3f}" in page

    # Anchors and judges are measured once.
    first, other = (json.loads((ablate.place(out, "full", s) / "report/metrics.json").read_text()) for s in (0, 1))
    assert set(first["anchors"]) == {"truth", "other"} and "auc" in first["judges"]["scorer"]
    assert not other["anchors"] and "auc" not in other["judges"]["scorer"] and "curation" not in other

    # One run's data for all, and another training for each seed.
    grid = next((out / "base" / "grids").glob("*.parquet"))
    students = []
    for name, seed in (("full", 0), ("full", 1), ("again", 0)):
        run = ablate.place(out, name, seed)
        assert grid.samefile(run / "grids" / grid.name)
        assert "paint" not in [event.get("stage") for event in places.read(run)]
        students.append((run / "student/transformer/diffusion_pytorch_model.safetensors").read_bytes())
    assert len(set(students)) == 3
    caches = [next((ablate.place(out, "full", seed) / ablate.LATENTS).rglob("*.safetensors")) for seed in (0, 1)]
    assert caches[0].samefile(caches[1])

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert {**ablate.ablate(str(study), out, QUIET), "seconds": found["seconds"]} == found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times


def test_a_variant_that_needs_other_data_is_rejected_before_training(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(study.read_text())
    values["variants"]["more"] = {"sets": {"write": {"count": 9}}}
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    code = app.call(["ablate", str(study), "--out", str(tmp_path / "out"), "--json"])
    said = capsys.readouterr().err
    assert code == 2 and "variants.more changes write.count" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()  # nothing was painted either
    with pytest.raises(UsageError, match=r"--only nope: .*full, adapter, again, words, tuned"):
        ablate.ablate(str(study), tmp_path / "out", QUIET, only=["nope"])


def test_an_existing_run_keeps_its_prompts_and_grids(study: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(study.read_text())
    base = recipes.load(str(study.parent / "base.yaml"))
    run(base, tmp_path / "base", ablate.ROWS, QUIET)
    values["sets"]["write"] = {"count": 9}
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    found = ablate.ablate(str(study), tmp_path / "out", QUIET, base=tmp_path / "base", only=["words"])
    assert found["variants"]["words"]["n"] == 3 and not (tmp_path / "out" / "base").exists()
    frozen = recipes.load(str(ablate.place(tmp_path / "out", "words", 0) / "recipe.yaml"))
    assert frozen.write.count == base.write.count
    with pytest.raises(UsageError, match=r"changes write\.count"):
        ablate.ablate(str(study), tmp_path / "out", QUIET, base=tmp_path / "base", sets=["write.count=9"])


def test_help_states_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.call(["ablate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "100 minutes on two CPU cores" in said
