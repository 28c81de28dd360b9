"""Recipe keys of training that change how a step is made, and what they must leave as it is."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych.errors import UsageError
from diptych.recipe.schema import Distill
from diptych.train import checkpoint, parts
from diptych.train.distill import distill
from diptych.train.loop import Trainer
from diptych.train.metrics import read
from diptych.train.schedule import timestep_shift
from raising import raises


def lines_of(out: Path) -> list[dict[str, Any]]:
    return read(out / "training" / "metrics.jsonl")


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_make_the_same_step(world: Any, straight: Any, tmp_path: Path, size: int) -> None:
    distill(tiny_run.make_recipe(world.teacher, micro_batch=size), world.pairs, tmp_path / "out")
    for name in ("left", "right", "grad_norm"):
        got, wanted = ([line[name] for line in lines_of(out)] for out in (tmp_path / "out", straight.out))
        assert got == pytest.approx(wanted, rel=1e-4), name


def test_micro_batches_may_change_between_two_sittings(world: Any, tmp_path: Path) -> None:
    distill(tiny_run.make_recipe(world.teacher, steps=4), world.pairs, tmp_path / "out")
    distill(tiny_run.make_recipe(world.teacher, steps=6, micro_batch=2), world.pairs, tmp_path / "out")
    assert [line["step"] for line in lines_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_a_share_of_samples_is_told_the_instruction(world: Any, tmp_path: Path) -> None:
    pairs = tiny_run.make_pairs(tmp_path / "pairs", instruction="the same cat, in the grass")
    free = {"text_dropout": 0, "both_dropout": 0, "validation_pairs": 0}
    recipe = tiny_run.make_recipe(world.teacher, instructions=0.5, batch_size=24, **free)
    trainer = Trainer(tiny_run.prepare(recipe, pairs, tmp_path / "out"))
    asked: list[str] = []
    gather = trainer.job.text.gather
    trainer.job.text.gather = lambda captions: (asked.extend(captions), gather(captions))[1]  # pyright: ignore
    for step in range(1, 9):
        trainer.next_batch(step)
    share = sum(text.startswith("the same") for text in asked) / len(asked)
    assert 0.35 < share < 0.65 and len(asked) == 8 * 24


def test_a_pair_without_an_instruction_is_told_its_caption(world: Any, straight: Any, tmp_path: Path) -> None:
    distill(tiny_run.make_recipe(world.teacher, instructions=1.0), world.pairs, tmp_path / "out")
    got, wanted = ([line["loss"] for line in lines_of(out)] for out in (tmp_path / "out", straight.out))
    assert got == wanted


def test_an_automatic_shift_is_what_the_base_samples_with(world: Any, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    recipe = tiny_run.make_recipe(world.teacher, shift="auto")
    job = tiny_run.prepare(recipe, world.pairs, tmp_path / "out")
    assert job.options.shift == 1.0 == job.pipe.scheduler.config.shift
    job.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    line = 0.5 + (1.15 - 0.5) * (job.canvas.tokens - 256) / (4096 - 256)  # FLUX.1-dev's
    assert timestep_shift(job.pipe, job.canvas, 28) == pytest.approx(math.exp(line))
    job.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert timestep_shift(job.pipe, job.canvas, 28) == 3.0


def test_prodigy_finds_its_rate_and_resumes_exactly(world: Any, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    settings = {
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "warmup": 0,
        "checkpoint_every": 10,
        "validation_pairs": 0,
    }
    distill(tiny_run.make_recipe(world.teacher, steps=40, **settings), world.pairs, tmp_path / "straight")
    for steps in (20, 40):
        distill(tiny_run.make_recipe(world.teacher, steps=steps, **settings), world.pairs, tmp_path / "twice")
    assert kills.result(tmp_path / "straight") == kills.result(tmp_path / "twice")
    last = checkpoint.load(tmp_path / "twice" / "training")
    assert last is not None and last.tensors["optimizer"]["group.d"] > 1e-6  # where it starts


def test_eight_bits_train_and_resume_exactly(world: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Only matrices of 4096 numbers and more are kept in 8 bits.
    settings = {"optimizer": "adamw8bit", "mode": "lora", "rank": 128, "checkpoint_every": 2}
    distill(tiny_run.make_recipe(world.teacher, steps=8, **settings), world.pairs, tmp_path / "straight")
    for steps in (4, 8):
        distill(tiny_run.make_recipe(world.teacher, steps=steps, **settings), world.pairs, tmp_path / "twice")
    assert kills.result(tmp_path / "straight", "lora") == kills.result(tmp_path / "twice", "lora")
    last = checkpoint.load(tmp_path / "twice" / "training")
    assert last is not None and any(tensor.dtype == torch.uint8 for tensor in last.tensors["optimizer"].values())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_weights_of_the_base_do_not_decay_under_adapters(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    options = Distill(mode="lora", rank=2, optimizer=name, weight_decay=0.5, learning_rate=0.1)  # pyright: ignore
    trained = parts.select(tiny_run.make_transformer(), options, "float32", torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in trained.tensors().items()}
    optimizer = parts.optimizer(trained, options)
    for _ in range(3):
        for parameter in trained.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    after = trained.tensors()
    kept = {name for name in before if torch.equal(after[name], before[name]) and before[name].any()}
    assert kept == {"x_embedder.weight", "x_embedder.bias"}
    assert next(iter(parts.optimizer_tensors(optimizer))).startswith("0.")  # in the order of what is trained
    assert [p is q for p, q in zip(parts._parameters(optimizer), trained.parameters, strict=True)].count(False) == 0


def test_adapters_learn_on_a_base_in_eight_bits(world: Any, straight: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    settings = {"mode": "lora", "rank": 4, "quantize": "int8", "gradient_checkpointing": True, "steps": 4}
    distill(tiny_run.make_recipe(world.teacher, **settings), world.pairs, tmp_path / "out")
    got, wanted = lines_of(tmp_path / "out"), lines_of(straight.out)
    assert got[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=0.05) and got[0]["loss"] != wanted[0]["loss"]
    assert len({line["grad_norm"] for line in got}) == 4 and got[-1]["validation"]["loss"] > 0


def test_a_base_in_four_bits_is_refused_where_it_cannot_be(world: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, mode="lora", quantize="nf4")
    with raises("device_unavailable", "distill.quantize", "nf4", "cpu", kind=UsageError):
        distill(recipe, world.pairs, tmp_path / "out")


def test_trackers_are_told_what_the_log_is_told(world: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    distill(tiny_run.make_recipe(world.teacher, trackers=["tensorboard"]), world.pairs, out)
    events = EventAccumulator(str(out / "training" / "trackers" / "tiny")).Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    logged = {line["step"]: line["loss"] for line in lines_of(out)}
    assert shown == pytest.approx(logged, rel=1e-5)
    assert {event.step for event in events.Scalars("validation/right/0.5")} == {4, 8, 12}


def test_trackio_keeps_one_run_for_a_training_that_is_continued(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    script = (
        "import sys; from pathlib import Path; from diptych.train.metrics import Trackers\n"
        "for step in (1, 2):\n"
        "    told = Trackers(['trackio'], Path(sys.argv[1]), 'tiny', {'steps': 2})\n"
        "    told.log({'step': step, 'loss': 0.5 / step, 'validation': {'loss': 2.0}})\n"
        "    told.close()\n"
    )
    # In a process of its own: trackio reads where it writes to when it is imported.
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "files")],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == ""
    with closing(sqlite3.connect(tmp_path / "trackio" / "tiny.db")) as kept:
        rows = kept.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("tiny", 1), ("tiny", 2)]
    assert [json.loads(text) for *_, text in rows] == [{"loss": 0.5 / step, "validation/loss": 2.0} for step in (1, 2)]


def test_a_tracker_that_is_not_installed_is_named(world: Any, tmp_path: Path) -> None:
    try:
        import wandb  # noqa: F401  # pyright: ignore
    except ImportError:
        recipe = tiny_run.make_recipe(world.teacher, trackers=["wandb"])
        with raises("dependency_missing", "distill.trackers", "wandb", kind=UsageError):
            distill(recipe, world.pairs, tmp_path / "out")
    else:
        pytest.skip("wandb is installed")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantize": "nf4"}, "freezes"),
        ({"sharding": "full", "optimizer": "prodigy"}, "optimizer: adamw"),
        ({"shift": 0}, "shift"),
        ({"instructions": 1.5}, "instructions"),
    ],
)
def test_keys_that_cannot_be_are_refused(world: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run.make_recipe(world.teacher, **keys)
