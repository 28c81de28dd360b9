"""What any stage of a run needs is checked before the first row is made, and a refusal leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diptych import recipe
from diptych.data.engine import LocalEngine
from diptych.errors import UsageError, UserError
from diptych.recipe.schema import Recipe
from diptych.recipe.tasks import load as load_task
from diptych.run.ready import check
from diptych.run.runner import STAGES, Stages, run
from diptych.utils import models
from diptych.utils.console import Display
from diptych.utils.paths import packaged

QUIET = Display(quiet=True)
ENDPOINT = "{base_url: 'http://localhost:1/v1', model: m, api_key_env: DIPTYCH_TEST_KEY}"
VLLM = "{model: owner/name}"


def made(*sets: str) -> Recipe:
    return recipe.load("demo", ["device=cpu", "threads=1", "write.count=4", *sets])


def refused(tmp_path: Path, *sets: str, stages: tuple[str, ...] = STAGES) -> str:
    """What `run` says of the demo with these keys; the folder must not be there."""
    with pytest.raises(UserError) as told:
        run(made(*sets), tmp_path / "run", stages, QUIET)
    assert not (tmp_path / "run").exists()
    return str(told.value)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["curate.judge=pockett"], ["curator", "pockett"]),
        (["evaluate.scorer=pockett"], ["scorer", "pockett"]),
        (["evaluate.reader=pockett"], ["reader", "pockett"]),
        (["curate.screens.classifiers=[{name: nsfw, model: nothing, label: nsfw}]"], ["screen", "nothing"]),
        ([f"curate.vlm={{endpoint: {ENDPOINT}}}"], ["DIPTYCH_TEST_KEY"]),
        (["curate.vlm={local: nothing}"], ["vlm", "nothing"]),
        (["write.writer=llm", f"write.endpoint={ENDPOINT}"], ["DIPTYCH_TEST_KEY"]),
        (["write.grammar=nothing"], ["nothing"]),
        (["distill.mode=lora", "distill.lora_targets=[to_q, to_x]"], ["distill.lora_targets", "to_x"]),
        (["distill.mode=lora", "distill.lora_targets=atention"], ["distill.lora_targets", "atention"]),
        (["distill.mode=lora", "distill.lora_targets=[x_embedder]"], ["x_embedder"]),
        (["distill.init=nothing"], ["student", "nothing"]),
        (["distill.mode=lora", "distill.quantize=nf4"], ["distill.quantize", "nf4", "cpu"]),
        (["distill.buckets=[[64, 60]]"], ["60", "multiple"]),
        (["distill.data=[{path: own}, {path: nothing}]"], ["nothing"]),
        (["evaluate.methods=[student, pipeline]"], ["evaluate.pipeline.model"]),
        (["evaluate.methods=[student, adapter]", "evaluate.adapter.path=nothing"], ["evaluate.adapter.path"]),
        (["evaluate.methods=[student, tuned]", "evaluate.tuning.lora_targets=[to_x]"], ["evaluate.tuning", "to_x"]),
        (["curate.copies={}", "task=relight"], ["curate.copies"]),
    ],
)
def test_a_mistake_in_any_stage_is_told_before_the_first_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str], words: list[str]
) -> None:
    monkeypatch.delenv("DIPTYCH_TEST_KEY", raising=False)
    said = refused(tmp_path, *sets)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("section", ["write", "curate.vlm"])
def test_vllm_that_is_not_installed_is_told(tmp_path: Path, section: str) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    writer = ["write.writer=llm"] if section == "write" else []
    assert "vLLM is not installed" in refused(tmp_path, *writer, f"{section}.vllm={VLLM}")


def test_a_tracker_or_optimizer_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert "distill.trackers: wandb" in refused(tmp_path, "distill.trackers=[tensorboard, wandb]")
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    assert "distill.optimizer: prodigy" in refused(tmp_path, "distill.optimizer=prodigy")


def test_the_columns_of_other_people_s_data_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "edits").mkdir()
    pq.write_table(pa.table({"before": [b"x"], "text": ["a cat"]}), tmp_path / "edits" / "a.parquet")
    for columns, word in (("{}", "reference"), ("{conditioning: befor}", "befor")):
        assert word in refused(
            tmp_path, f"distill.data=[{{path: own}}, {{path: {tmp_path}/edits, columns: {columns}}}]"
        )


def test_the_scorer_may_not_be_the_judge_that_curates_even_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(models.resolve("pocket", "scorer"), tmp_path / "renamed")
    assert "evaluate.scorer" in refused(tmp_path, f"curate.judge={tmp_path}/renamed")


def test_a_classifier_without_the_label_is_told(tmp_path: Path) -> None:
    reader = models.resolve("pocket", "reader")
    said = refused(tmp_path, f"curate.screens.classifiers=[{{name: a, model: {reader}, label: 'place:mars'}}]")
    assert "place:mars" in said


def test_a_judge_s_folder_must_hold_a_whole_model(tmp_path: Path) -> None:
    shutil.copytree(models.resolve("pocket", "curator"), tmp_path / "judge")
    for path in (tmp_path / "judge").glob("*.safetensors"):
        path.unlink()
    assert f"{tmp_path}/judge" in refused(tmp_path, f"curate.judge={tmp_path}/judge")
    (tmp_path / "judge" / "config.json").write_text("{}")
    assert f"{tmp_path}/judge" in refused(tmp_path, f"curate.judge={tmp_path}/judge")


def test_a_teacher_that_paints_but_cannot_be_distilled_is_told(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(packaged("pocket/weights") / "teacher", teacher)
    index = json.loads((teacher / "model_index.json").read_text())
    index["transformer"][1] = "SD3Transformer2DModel"
    (teacher / "model_index.json").write_text(json.dumps(index))
    assert "SD3Transformer2DModel" in refused(tmp_path, f"teacher={teacher}")


def test_a_lora_to_go_on_from_must_fit_what_is_trained(tmp_path: Path) -> None:
    """The student that ships is a control-LoRA of rank 128 on attention and feed-forward layers."""
    said = refused(tmp_path, "distill.mode=lora", "distill.init=pocket", "distill.rank=128")
    assert "distill.lora_targets" in said
    keys = ["distill.mode=lora", "distill.init=pocket", "distill.lora_targets=attention+mlp"]
    assert "distill.rank" in refused(tmp_path, *keys, "distill.rank=8")
    check_only(made(*keys, "distill.rank=128"), tmp_path, "distill")


def check_only(wanted: Recipe, folder: Path, *stages: str) -> None:
    check(Stages(wanted, load_task(wanted.task), folder, QUIET), stages, LocalEngine())


def test_a_stage_alone_looks_at_its_own_needs_alone(tmp_path: Path) -> None:
    bad = ["evaluate.scorer=pockett", "distill.lora_targets=[to_x]", "distill.mode=lora"]
    check_only(made(*bad), tmp_path, "write", "paint", "curate")
    with pytest.raises(UsageError, match="to_x"):
        check_only(made(*bad), tmp_path, "distill")


@pytest.mark.parametrize("name", [n for n in recipe.names() if not n.startswith("flux")])
def test_the_recipes_that_ship_are_ready(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = recipe.load(name, ["device=cpu", "distill.data=[]"])
    read: list[Any] = []
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda self, *a, **k: read.append(self) or load(self, *a, **k)
    )
    check_only(loaded, tmp_path, *STAGES)
    assert read == []  # no weight was loaded


def test_what_is_complete_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_TEST_KEY", "secret")
    wanted = made()
    run(wanted, tmp_path / "run", ("write",), QUIET)
    monkeypatch.setattr("diptych.run.ready.write", lambda recipe: pytest.fail("it is complete"))
    check_only(wanted, tmp_path / "run", "write")
    with pytest.raises(UserError, match="scorer"):  # a run that goes on looks at what is left
        run(made("evaluate.scorer=pockett"), tmp_path / "run", display=QUIET)
