"""Licenses by teacher: what is noted, what is inherited, and whose pairs may train whom."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diptych.data import records
from diptych.data.sources import license_of
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.run.select import SelectStage
from diptych.train.prepare import Material, refuse_restricted
from diptych.utils import licenses, models
from raising import raises

FLUX_1, FLUX_2, STABILITY = (
    "flux-1-dev-non-commercial-license",
    "flux-non-commercial-license",
    "stabilityai-ai-community",
)
DEV = {"guidance_embeds": True, "num_attention_heads": 24}


def folder(path: Path, config: dict[str, Any] | None = None, readme: str = "") -> Path:
    (path / "transformer").mkdir(parents=True)
    (path / "transformer" / "config.json").write_text(json.dumps(config or {}))
    if readme:
        (path / "README.md").write_text(f"---\n{readme}\n---\n")
    return path


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("black-forest-labs/FLUX.1-dev", FLUX_1),
        ("someone/flux1-dev-anime", FLUX_1),
        ("black-forest-labs/FLUX.1-Krea-dev", FLUX_1),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
        ("black-forest-labs/FLUX.2-klein-base-9B", FLUX_2),
        ("black-forest-labs/FLUX.2-dev@main", FLUX_2),
        ("Qwen/Qwen-Image-2512", "apache-2.0"),
        ("Qwen/Qwen-Image-2.1", None),
        ("someone/qwen-image-fine-tune", None),
        ("Tongyi-MAI/Z-Image", "apache-2.0"),
        ("stabilityai/stable-diffusion-3.5-medium", STABILITY),
        ("pocket", "apache-2.0"),
    ],
)
def test_what_is_made_from_a_teacher_has_its_license(name: str, license: str | None) -> None:
    fields, terms = licenses.inherited(name, None)
    assert licenses.stated(fields) == license
    assert ("look it up" in terms) == (license is None)
    row = licenses.named(license) if license else None
    assert (row is not None) == (license is not None) and (row is None or dict(row.card) == fields)


@pytest.mark.parametrize(
    ("config", "license"),
    [
        (DEV, FLUX_1),
        ({**DEV, "guidance_embeds": False}, None),
        ({"_class_name": "Flux2Transformer2DModel", "num_attention_heads": 32}, FLUX_2),
        ({"_class_name": "Flux2Transformer2DModel", "num_attention_heads": 24}, None),
        ({"_class_name": "SD3Transformer2DModel", "num_attention_heads": 38, "qk_norm": "rms_norm"}, STABILITY),
        ({"_class_name": "SD3Transformer2DModel", "num_attention_heads": 24}, None),
    ],
)
def test_a_copy_under_another_name_is_recognized_by_its_config(
    config: dict[str, Any], license: str | None, tmp_path: Path
) -> None:
    fields, _ = licenses.inherited("mine", folder(tmp_path / "mine", config))
    assert licenses.stated(fields) == license


def test_a_readme_replaces_a_permissive_license_and_not_a_restrictive_one(tmp_path: Path) -> None:
    qwen = folder(tmp_path / "Qwen-Image", readme="license: cc-by-nc-4.0")
    assert licenses.inherited("Qwen-Image", qwen)[0] == {"license": "cc-by-nc-4.0"}
    dev = folder(tmp_path / "mine", DEV, readme="license: apache-2.0")
    fields, terms = licenses.inherited("mine", dev)
    assert licenses.stated(fields) == FLUX_1 and "Non-Commercial" in terms


def test_conditions_are_noted_once_and_permissive_licenses_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    licenses._noted.clear()
    path = folder(tmp_path / "mine", DEV)
    models.resolve(str(path), "teacher")
    models.resolve(str(path), "teacher")
    notes = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert notes == [licenses.table()["flux-1-dev"].note]
    assert licenses.note("Qwen/Qwen-Image", None) is None
    assert licenses.note("stabilityai/stable-diffusion-3.5-large", None) is not None


# Pairs ----------------------------------------------------------------------------------------------------------------


def pairs(path: Path, **manifest: Any) -> Dataset:
    data = Dataset(path, records.schema(records.PAIR))
    data.write_shard(0, [], "test")
    data.publish({"fingerprint": "test", **manifest})
    return data


def test_the_license_of_pairs_is_in_their_manifest_their_run_or_their_card(tmp_path: Path) -> None:
    assert license_of(pairs(tmp_path / "new", license=FLUX_1)) == FLUX_1
    assert license_of(pairs(tmp_path / "old", licence="mit")) == "mit"
    assert license_of(pairs(tmp_path / "import", license="unknown")) is None
    of_run = pairs(tmp_path / "run" / "pairs")
    (tmp_path / "run" / "recipe.yaml").write_text("teacher: black-forest-labs/FLUX.2-dev\n")
    assert license_of(of_run) == FLUX_2
    card: Any = SimpleNamespace(url=str(folder(tmp_path / "card", readme=f"license: other\nlicense_name: {FLUX_1}")))
    assert license_of(card) == FLUX_1
    assert license_of(pairs(tmp_path / "plain")) is None


def test_the_pairs_of_a_run_record_their_teacher_and_its_license() -> None:
    recipe = Recipe.model_validate({"name": "x", "teacher": "black-forest-labs/FLUX.1-dev"})
    made_by = SelectStage(Dataset("nowhere"), recipe, tasks.load(recipe.task), {}).made_by()
    assert (made_by["teacher"], made_by["license"]) == (recipe.teacher, FLUX_1)


def test_pairs_of_a_flux_non_commercial_teacher_train_no_other_family(tmp_path: Path) -> None:
    dev = pairs(tmp_path / "dev", license=FLUX_1)
    for teacher in ("Qwen/Qwen-Image", "black-forest-labs/FLUX.2-klein-base-4B", "pocket"):
        facts = (str(tmp_path / "dev"), teacher, FLUX_1, "2(d)", "distill.allow_restricted_pairs=true")
        with raises("license_conflict", *facts, kind=UsageError):
            refuse_restricted(teacher, dev)
    refuse_restricted("black-forest-labs/FLUX.1-dev", dev)
    refuse_restricted("someone/flux1-dev-anime", dev)
    refuse_restricted("pocket", pairs(tmp_path / "free", license="apache-2.0"))
    refuse_restricted("pocket", pairs(tmp_path / "unknown"))


def test_a_training_refuses_them_before_it_starts(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from tiny_run import make_pairs  # pyright: ignore[reportMissingImports]

    data = make_pairs(tmp_path / "pairs", grids=2)
    data.publish({"fingerprint": "test", "license": FLUX_2})
    values: dict[str, Any] = {
        "name": "x",
        "teacher": "pocket",
        "distill": {"data": [{"path": str(tmp_path / "pairs")}]},
    }
    with raises("license_conflict", FLUX_2, kind=UsageError):
        Material.open(Recipe.model_validate(values), None)
    values["distill"]["allow_restricted_pairs"] = True
    assert len(Material.open(Recipe.model_validate(values), None).sets) == 1
