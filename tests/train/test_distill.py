"""The distill stage from pairs to a student folder: what it writes, what it refuses, and that nothing disturbs it."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych.data import records
from diptych.data.store import Dataset
from diptych.errors import UsageError
from diptych.recipe import load as load_recipe
from diptych.recipe.schema import Distill, Preference
from diptych.run.runner import run
from diptych.train import cache, checkpoint, processes
from diptych.train.captions import OnlineCaptions
from diptych.train.checkpoint import identity, may_change
from diptych.train.distill import distill, finish
from diptych.train.loop import Trainer, train
from diptych.utils.console import Display
from raising import raises


def test_the_student_is_an_ordinary_folder_that_stock_diffusers_opens(straight: Any) -> None:
    from diffusers import FluxControlPipeline

    pipe = FluxControlPipeline.from_pretrained(straight.out)
    assert (pipe.transformer.config.in_channels, pipe.transformer.config.out_channels) == (32, 16)
    card = (straight.out / "README.md").read_text()
    assert "20 / 4" in card and "license" in card
    assert (straight.out / "training" / "samples" / "step-000012.png").is_file()


def test_what_is_saved_is_the_average_of_the_weights(straight: Any) -> None:
    from safetensors.torch import load_file

    saved = load_file(straight.out / "transformer" / "diffusion_pytorch_model.safetensors")
    last = checkpoint.load(straight.out / "training")
    assert last is not None and last.step == 12
    assert all(torch.equal(saved[name], tensor) for name, tensor in last.tensors["ema"].items())
    assert not torch.equal(last.tensors["ema"]["proj_out.weight"], last.tensors["weights"]["proj_out.weight"])


def test_metrics_have_each_step_once_and_validation_when_due(straight: Any) -> None:
    lines, _ = kills.result(straight.out)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation" in line] == [4, 8, 12]
    assert set(lines[3]["validation"]["right"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    assert [line["learning_rate"] for line in lines[:4]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


def test_a_finished_training_is_not_repeated(world: Any, straight: Any) -> None:
    weights = straight.out / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert distill(tiny_run.make_recipe(world.teacher), world.pairs, straight.out) == straight.summary
    assert weights.stat().st_mtime_ns == before


def test_a_killed_training_ends_as_an_undisturbed_one_bit_for_bit(world: Any, straight: Any, tmp_path: Path) -> None:
    out = tmp_path / "student"
    saving = out / "training"
    assert kills.kill_when(
        kills.start(world.folder, out), lambda: kills.steps_logged(out) >= 3
    )  # before any checkpoint
    assert kills.kill_when(kills.start(world.folder, out), lambda: kills.steps_logged(out) >= 6)  # between two
    # While one is being written, or as near to it as this process can see.
    kills.kill_when(
        kills.start(world.folder, out),
        lambda: any(saving.glob(".step-000008*")) or kills.steps_logged(out) >= 10,
    )
    kills.finish(world.folder, out)
    assert kills.result(out) == kills.result(straight.out)


def test_ctrl_c_saves_a_checkpoint_that_goes_on_exactly(world: Any, straight: Any, tmp_path: Path) -> None:
    out = tmp_path / "student"
    recipe = tiny_run.make_recipe(world.teacher)

    def press(step: int, total: int, text: str) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, world.pairs, out, press)
    assert signal.getsignal(signal.SIGINT) is before
    stopped = checkpoint.load(out / "training")
    assert stopped is not None and stopped.step == 6  # not a multiple of checkpoint_every
    distill(recipe, world.pairs, out)
    assert kills.result(out) == kills.result(straight.out)


def test_a_cut_checkpoint_costs_the_steps_since_the_one_before(world: Any, straight: Any, tmp_path: Path) -> None:
    out = tmp_path / "student"
    recipe = tiny_run.make_recipe(world.teacher)

    class Stop(Exception):
        pass

    def stop(step: int, total: int, text: str) -> None:
        if step == 9:
            raise Stop

    with pytest.raises(Stop):
        distill(recipe, world.pairs, out, stop)
    newest = out / "training" / "step-000008" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    distill(recipe, world.pairs, out)
    assert kills.result(out) == kills.result(straight.out)


def test_loss_falls_when_four_pairs_are_learnt_by_heart(world: Any, tmp_path: Path) -> None:
    pairs = tiny_run.make_pairs(tmp_path / "pairs", grids=2)
    free = {"reference_dropout": 0, "text_dropout": 0, "both_dropout": 0, "validation_pairs": 0}
    recipe = tiny_run.make_recipe(world.teacher, steps=150, learning_rate=4e-3, checkpoint_every=1000, **free)
    distill(recipe, pairs, tmp_path / "out")
    lines, _ = kills.result(tmp_path / "out")
    for panel in ("left", "right"):
        first, last = (sum(line[panel] for line in part) / 10 for part in (lines[:10], lines[-10:]))
        assert last < 0.6 * first, (panel, first, last)


def test_a_training_that_diverges_stops_and_says_what_to_do(world: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, learning_rate=1e30, warmup=0, checkpoint_every=1, validation_pairs=0)
    with raises("training_diverged", "Step 2", "distill.learning_rate", "step-000001"):
        distill(recipe, world.pairs, tmp_path / "out")
    last = checkpoint.load(tmp_path / "out" / "training")
    assert last is not None and last.step == 1
    assert all(torch.isfinite(t).all() for t in last.tensors["weights"].values())


def test_another_recipe_is_refused_by_the_names_of_its_keys(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    distill(tiny_run.make_recipe(world.teacher, steps=2), world.pairs, out)
    fact = "distill.learning_rate was 0.001 and is 0.0005"
    with raises("checkpoint_invalid", out, fact, "distill.ema", kind=UsageError) as error:
        distill(tiny_run.make_recipe(world.teacher, steps=3, learning_rate=5e-4, ema=0.5), world.pairs, out)
    assert "distill.warmup" not in str(error.value)
    other = tiny_run.make_pairs(tmp_path / "other", grids=11)
    with raises("checkpoint_invalid", "pairs was", kind=UsageError):
        distill(tiny_run.make_recipe(world.teacher, steps=3), other, out)


def test_more_steps_continue_a_finished_training(
    world: Any, straight: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    distill(tiny_run.make_recipe(world.teacher, steps=8), world.pairs, out)
    distill(tiny_run.make_recipe(world.teacher, steps=12), world.pairs, out)
    assert kills.result(out) == kills.result(straight.out)
    assert "shards" not in capfd.readouterr().err, "a library's own bar"


def test_the_best_checkpoint_can_be_the_student(world: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out, keep = tmp_path / "out", {"keep": 3}
    distill(tiny_run.make_recipe(world.teacher, **keep), world.pairs, out)
    (out / "training" / checkpoint.BEST).write_text("step-000004")  # as if it had got worse from there
    summary = distill(tiny_run.make_recipe(world.teacher, **keep, export="best"), world.pairs, out)
    lines = {line["step"]: line for line in kills.result(out)[0]}
    assert (summary["exported"], summary["steps"]) == (4, 12)
    assert summary["validation"] == lines[4]["validation"]
    saved = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    best = checkpoint.read(out / "training" / "step-000004").tensors["ema"]
    assert saved.keys() == best.keys() and all(torch.equal(saved[name], best[name]) for name in saved)


def test_too_few_pairs_are_refused_with_advice(world: Any, tmp_path: Path) -> None:
    empty = Dataset(tmp_path / "none", records.schema(records.PAIR))
    empty.publish({})
    with raises("run_empty", tmp_path / "none", "curate.thresholds"):
        distill(tiny_run.make_recipe(world.teacher), empty, tmp_path / "a")
    few = tiny_run.make_pairs(tmp_path / "few", grids=1)
    with raises("run_empty", "2 pairs", "batch of 4", "write.count"):
        distill(tiny_run.make_recipe(world.teacher), few, tmp_path / "b")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_costs_nothing(world: Any, straight: Any, tmp_path: Path) -> None:
    out, recipe = tmp_path / "student", tiny_run.make_recipe(world.teacher)
    with full_disk(10_000), raises("path_unwritable", out / "training" / "latents", "File too large"):
        distill(recipe, world.pairs, out)
    with full_disk(100_000), raises("path_unwritable", "step-000004", "File too large"):
        distill(recipe, world.pairs, out)
    trainer = train(tiny_run.prepare(recipe, world.pairs, out))
    with full_disk(100_000), raises("path_unwritable", f"student to {out}"):
        finish(trainer, recipe, out)
    assert not (out / "model_index.json").exists()
    distill(recipe, world.pairs, out)
    assert kills.result(out) == kills.result(straight.out)


def test_a_step_that_goes_wrong_leaves_a_report_of_its_batch(world: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, steps=8, checkpoint_every=2)
    trainer = Trainer(tiny_run.prepare(recipe, world.pairs, tmp_path / "out"))
    trainer.train_step(trainer.next_batch(1))
    batch = trainer.next_batch(2)
    batch.clean[0, 0, 0] = float("nan")
    before = [parameter.detach().clone() for parameter in trainer.trained.parameters]
    with raises("training_diverged", "Step 2", "nan", "stopped.json"):
        trainer.train_step(batch)
    assert all(map(torch.equal, before, trainer.trained.parameters))
    report = json.loads((tmp_path / "out" / "training" / "stopped.json").read_text())
    ids = {sample.id for sample in trainer.job.latents.samples}
    assert report["step"] == 2 and report["loss"] == "nan" and len(report["before"]) == 1
    assert len(report["batch"]) == 4 and {one["id"] for one in report["batch"]} <= ids


def test_what_the_guard_has_seen_is_in_the_checkpoint(world: Any, tmp_path: Path) -> None:
    job = tiny_run.prepare(tiny_run.make_recipe(world.teacher), world.pairs, tmp_path / "out")
    job.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(job)
    trainer.train_step(trainer.next_batch(1))
    trainer.guard.spikes = 2
    trainer.save()
    again = Trainer(tiny_run.prepare(tiny_run.make_recipe(world.teacher), world.pairs, tmp_path / "out"))
    assert (again.step, again.guard.spikes, again.guard.recent) == (1, 2, trainer.guard.recent)


def test_a_damaged_latent_is_made_anew(
    world: Any, straight: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, recipe = tmp_path / "student", tiny_run.make_recipe(world.teacher)
    tiny_run.prepare(recipe, world.pairs, out)
    newest = max((out / "training" / "latents").rglob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    distill(recipe, world.pairs, out)
    assert f"{newest} is damaged" in caplog.text
    assert kills.result(out) == kills.result(straight.out)


def test_what_does_not_fit_into_memory_is_read_and_encoded_as_it_is_needed(
    world: Any, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LATENTS_IN_MEMORY", 0)
    monkeypatch.setattr("diptych.train.captions.TEXT_IN_MEMORY", 0)
    recipe = tiny_run.make_recipe(world.teacher)
    assert isinstance(tiny_run.prepare(recipe, world.pairs, tmp_path / "out").text, OnlineCaptions)
    distill(recipe, world.pairs, tmp_path / "out")
    got, wanted = ([line["loss"] for line in kills.result(out)[0]] for out in (tmp_path / "out", straight.out))
    assert got == pytest.approx(wanted, rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_encoded(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "join", lambda device: (processes.Processes(0, 3), device))
    with raises("option_invalid", "batch_size 4", "3 processes", kind=UsageError):
        distill(tiny_run.make_recipe(world.teacher), world.pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vanished_shard_is_named(world: Any, tmp_path: Path) -> None:
    pairs = tiny_run.make_pairs(tmp_path / "pairs")
    (shard,) = (tmp_path / "pairs").glob("*00001.parquet")
    shard.unlink()
    with raises("run_incomplete", tmp_path / "pairs"):
        distill(tiny_run.make_recipe(world.teacher), pairs, tmp_path / "out")


def test_an_unreadable_pair_is_left_out_and_listed_but_many_stop_the_run(world: Any, tmp_path: Path) -> None:
    rows = list(world.pairs)
    for count, name in ((1, "one"), (5, "five")):
        data = Dataset(tmp_path / name, records.schema(records.PAIR))
        broken = [{**row, "image": {"bytes": b"no image", "path": None}} for row in rows[:count]]
        data.write_shard(0, broken + rows[count:])
        data.publish({})
    recipe = tiny_run.make_recipe(world.teacher, steps=1)
    summary = distill(recipe, Dataset(tmp_path / "one"), tmp_path / "a")
    assert [skipped["id"] for skipped in summary["pairs_skipped"]] == [rows[0]["id"]]
    with raises("rows_failed", "5 of 24 pairs"):
        distill(recipe, Dataset(tmp_path / "five"), tmp_path / "b")


def test_bfloat16_computes_nearly_the_same_loss(world: Any, straight: Any, tmp_path: Path) -> None:
    distill(tiny_run.make_recipe(world.teacher, steps=2, precision="bfloat16"), world.pairs, tmp_path / "out")
    rough, exact = kills.result(tmp_path / "out")[0], kills.result(straight.out)[0]
    assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert rough[0]["loss"] != exact[0]["loss"]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_sample_sheet_is_what_later_inference_draws(world: Any, straight: Any, tmp_path: Path, mode: str) -> None:
    from PIL import Image

    from diptych import student
    from diptych.data.images import read_provenance

    out = straight.out
    if mode == "lora":
        out = tmp_path / "lora"
        distill(tiny_run.make_recipe(world.teacher, mode="lora", rank=4, learning_rate=1e-2), world.pairs, out)
    path = out / "training" / "samples" / "step-000012.png"
    sheet, made_by = Image.open(path).convert("RGB"), read_provenance(path)
    assert made_by is not None
    captions = {row["id"]: row["caption"] for row in world.pairs}
    pipe = student.load(out, base=world.teacher, device="cpu")
    side = tiny_run.PANEL
    for line, name in enumerate(made_by["pairs"]):
        reference = sheet.crop((0, line * side, side, (line + 1) * side))
        drawn: Any = pipe(captions[name], reference=reference, generator=line, num_inference_steps=20)
        shown = sheet.crop((2 * side, line * side, 3 * side, (line + 1) * side))
        assert drawn.images[0].tobytes() == shown.tobytes()


def test_a_lora_on_a_bfloat16_base_is_drawn_as_its_file_will_be(world: Any, tmp_path: Path) -> None:
    """As `parts.select` keeps the base where a GPU computes in bfloat16; the CPU draws it here."""
    from PIL import Image

    from diptych import student

    out = tmp_path / "lora"
    recipe = tiny_run.make_recipe(world.teacher, mode="lora", rank=4, learning_rate=1e-2)
    trainer = train(tiny_run.prepare(recipe, world.pairs, out))
    finish(trainer, recipe, out)
    for parameter in trainer.transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    trainer.job.pipe.vae.to(torch.bfloat16)
    learnt = [parameter.detach().clone() for parameter in trainer.trained.parameters]
    trainer.generate_samples()
    assert all(map(torch.equal, learnt, trainer.trained.parameters))  # they are float32 again
    sheet = Image.open(out / "training" / "samples" / "step-000012.png").convert("RGB")
    pipe = student.load(out, base=world.teacher, device="cpu", dtype=torch.bfloat16)
    side = tiny_run.PANEL
    for line, row in enumerate(trainer.job.validation_rows):
        text = trainer.job.text.gather([trainer.job.latents.samples[row].caption])
        embeds, pooled = (each.bfloat16() for each in text)
        given: Any = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "num_inference_steps": 20}
        reference = sheet.crop((0, line * side, side, (line + 1) * side))
        drawn: Any = pipe(reference=reference, generator=line, **given)
        shown = sheet.crop((2 * side, line * side, 3 * side, (line + 1) * side))
        assert drawn.images[0].tobytes() == shown.tobytes()


def test_a_lora_loads_in_stock_diffusers_and_draws_what_training_drew(world: Any, tmp_path: Path) -> None:
    import numpy as np
    from diffusers import FluxControlPipeline
    from PIL import Image

    from diptych import student
    from diptych.student.canvas import Canvas, split_panels
    from diptych.train import parts

    out = tmp_path / "lora"
    recipe = tiny_run.make_recipe(world.teacher, mode="lora", rank=4, learning_rate=1e-2)
    trainer = train(tiny_run.prepare(recipe, world.pairs, out))
    finish(trainer, recipe, out)
    file = out / "pytorch_lora_weights.safetensors"
    header = file.read_bytes()[8:]
    at = [header.index(f'"{key}":'.encode()) for key in ("diptych", "format", "lora_adapter_metadata")]
    assert at == sorted(at), "the same weights must be the same file, so its metadata keys are in order"
    assert not any(p.requires_grad for n, p in trainer.transformer.named_parameters() if n not in trainer.trained.names)
    assert {n.split(".")[0] for n in trainer.trained.names if "lora" not in n} == {"x_embedder"}

    canvas = Canvas(tiny_run.PANEL, tiny_run.PANEL, 4)
    row = trainer.job.validation_rows[0]
    _, condition = trainer.job.latents.gather([row])
    embeds, pooled = trainer.job.text.gather([trainer.job.latents.samples[row].caption])
    noise = torch.randn(1, canvas.tokens, 16, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    given |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": canvas.height, "width": canvas.width}

    def draw(pipe: Any, **other: Any) -> torch.Tensor:
        # Stock diffusers samples the posterior of a control *image*; condition latents go in as they are.
        pipe.prepare_image = lambda *_, **__: condition
        pipe.set_progress_bar_config(disable=True)
        return pipe(control_image=condition, **given | other).images

    stock = FluxControlPipeline.from_pretrained(world.teacher)
    stock.load_lora_weights(str(out))
    ours = FluxControlPipeline(**trainer.job.pipe.components)
    with parts.averaged(trainer.ema, trainer.trained):
        wanted = draw(ours)
    torch.testing.assert_close(draw(stock), wanted, rtol=1e-4, atol=1e-5)
    reopened = student.load(out, base=world.teacher, device="cpu")
    torch.testing.assert_close(draw(FluxControlPipeline(**reopened.components)), wanted, rtol=1e-4, atol=1e-5)
    # The sheet's first line, from the same latents, condition latents and embeddings.
    sheet, side, ours = Image.open(out / "training" / "samples" / "step-000012.png"), tiny_run.PANEL, trainer.job.pipe
    condition = ours.encode_reference([sheet.convert("RGB").crop((0, 0, side, side))], canvas)
    with torch.no_grad():
        pixels = ours.decode_canvas(draw(stock, num_inference_steps=20, latents=ours.noise([0], canvas)), canvas)
    (drawn,) = ours.image_processor.postprocess(split_panels(pixels)[1], output_type="np")
    shown = np.asarray(sheet.convert("RGB").crop((2 * side, 0, 3 * side, side)))
    assert np.abs(255 * drawn - shown).max() <= 1  # a picture is rounded
    stock.set_adapters(stock.get_active_adapters(), [0.0])
    assert not torch.allclose(draw(stock), wanted, atol=1e-2)  # without the adapter it is another picture


def test_an_unknown_lora_target_is_refused_with_the_nearest(world: Any, tmp_path: Path) -> None:
    with raises("layer_unknown", "'to_qq'", "'to_q'", kind=UsageError):
        distill(tiny_run.make_recipe(world.teacher, mode="lora", lora_targets=["to_qq"]), world.pairs, tmp_path / "out")


def test_training_goes_on_from_a_student_that_init_names(world: Any, straight: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, steps=4, init=str(straight.out))
    distill(recipe, world.pairs, tmp_path / "out")
    lines, _ = kills.result(tmp_path / "out")
    # The first validation after four more steps is better than the teacher's after four.
    assert lines[3]["validation"]["loss"] < kills.result(straight.out)[0][3]["validation"]["loss"]


def test_dropout_gives_the_null_reference_and_the_empty_prompt(world: Any, tmp_path: Path) -> None:
    def batch(**dropout: float) -> Any:
        none = {"reference_dropout": 0, "text_dropout": 0, "both_dropout": 0}
        job = tiny_run.prepare(
            tiny_run.make_recipe(world.teacher, **{**none, **dropout}), world.pairs, tmp_path / "out"
        )
        return job, Trainer(job).next_batch(1)

    job, plain = batch()
    empty, _ = job.text.gather([""])
    assert plain.condition.abs().amin(dim=(1, 2)).shape == (4,) and plain.condition.any(dim=2).all()
    _, unseen = batch(reference_dropout=1)
    assert not unseen.condition.any() and torch.equal(unseen.prompt_embeds, plain.prompt_embeds)
    _, unsaid = batch(text_dropout=1)
    assert torch.equal(unsaid.condition, plain.condition)
    assert torch.equal(unsaid.prompt_embeds, empty.expand_as(unsaid.prompt_embeds))
    _, neither = batch(both_dropout=1)
    assert not neither.condition.any() and torch.equal(neither.prompt_embeds, unsaid.prompt_embeds)
    # What training sees of a reference is what the pipeline will see of it.
    from diptych.data.images import open_image

    row = next(r for r in world.pairs if r["id"] == job.latents.samples[0].id)
    seen = job.pipe.encode_reference([open_image(row["conditioning"])], job.canvas)
    torch.testing.assert_close(job.latents.gather([0])[1], seen, rtol=1e-4, atol=1e-5)


def test_whole_grids_are_held_out(world: Any, tmp_path: Path) -> None:
    job = tiny_run.prepare(tiny_run.make_recipe(world.teacher), world.pairs, tmp_path / "out")
    grids = [{job.latents.samples[row].grid_id for row in rows} for rows in (job.train_rows, job.validation_rows)]
    assert len(job.validation_rows) == 4 and not grids[0] & grids[1]
    assert sorted(job.train_rows + job.validation_rows) == list(range(24))


def test_a_guidance_distilled_teacher_trains(world: Any, tmp_path: Path) -> None:
    teacher = tiny_run.make_teacher(tmp_path / "teacher", guidance_embeds=True)
    summary = distill(tiny_run.make_recipe(teacher, steps=1), world.pairs, tmp_path / "out")
    assert summary["steps"] == 1


def test_the_average_follows_its_decay(world: Any, tmp_path: Path) -> None:
    trainer = Trainer(tiny_run.prepare(tiny_run.make_recipe(world.teacher, warmup=0), world.pairs, tmp_path / "out"))
    assert trainer.ema is not None
    last = trainer.trained.names.index("proj_out.weight")
    average = trainer.trained.parameters[last].detach().clone()
    for step in range(1, 4):
        trainer.train_step(trainer.next_batch(step))
        decay = min(0.9, (1 + step - 1) / (10 + step - 1)) if step > 1 else 0.0  # diffusers' ramp
        average = decay * average + (1 - decay) * trainer.trained.parameters[last].detach()
    torch.testing.assert_close(trainer.ema.shadow_params[last], average)


def test_other_peoples_pairs_train_alone_or_beside_the_runs_own(world: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"conditioning": "before", "image": "after", "caption": "words"}
    rows = [{theirs: row[ours] for ours, theirs in names.items()} for row in world.pairs]
    (tmp_path / "theirs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "theirs" / "x.parquet", row_group_size=7)
    theirs = {"path": str(tmp_path / "theirs"), "columns": names}

    alone = distill(tiny_run.make_recipe(world.teacher, data=[theirs]), None, tmp_path / "alone")
    assert alone["pairs"] + alone["validation_pairs"] == 24 and not alone["pairs_skipped"]
    card = (tmp_path / "alone" / "README.md").read_text()
    assert f"{tmp_path}/theirs | 24 pairs, weight 1" in card and "teacher generated" not in card

    both = tiny_run.make_recipe(world.teacher, data=[{"path": "own"}, {**theirs, "weight": 0.5}], validation_pairs=0)
    job = tiny_run.prepare(both, world.pairs, tmp_path / "both")
    assert (
        job.latents.counts == [24, 24]
        and job.material.weights == [1.0, 0.5]
        and len({sample.id for sample in job.latents.samples}) == 48
    )
    clean, condition = job.latents.gather(range(48))
    assert torch.equal(clean[:24], clean[24:]) and torch.equal(condition[:24], condition[24:])
    assert Trainer(job).order.epoch_size == 36
    with raises("checkpoint_invalid", "another", kind=UsageError):
        train(tiny_run.prepare(tiny_run.make_recipe(world.teacher), world.pairs, tmp_path / "alone"))


def test_a_run_on_other_peoples_pairs_neither_writes_nor_paints(world: Any, tmp_path: Path) -> None:
    recipe = tiny_run.make_recipe(world.teacher, data=[{"path": str(world.folder / "pairs")}])
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"suite": "none"})})
    summary = run(recipe, tmp_path / "run", display=Display(quiet=True))
    assert list(summary["stages"]) == ["distill", "evaluate"] and Path(summary["report"]).exists()
    assert not (tmp_path / "run" / "prompts").exists()
    with raises("recipe_conflict", "paint", "distill.data", kind=UsageError):
        run(recipe, tmp_path / "run", stages=("paint",), display=Display(quiet=True))


def test_a_run_goes_on_with_keys_that_change_no_weight_and_refuses_others(world: Any, tmp_path: Path) -> None:
    data = [{"path": str(world.folder / "pairs")}]

    def go(**keys: Any) -> list[dict[str, Any]]:
        recipe = tiny_run.make_recipe(world.teacher, data=data, **keys)
        run(recipe, tmp_path / "run", stages=("distill",), display=Display(quiet=True))
        return kills.result(tmp_path / "run" / "student")[0]

    short = go(steps=4)
    longer = go(steps=6, micro_batch=2, keep=1)
    assert longer[:4] == short and len(longer) == 6
    assert load_recipe(tmp_path / "run" / "recipe.yaml").distill.micro_batch == 2  # what really ran
    weights = tmp_path / "run" / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert go(steps=6, micro_batch=1) == longer and weights.stat().st_mtime_ns == before  # it was finished
    for keys, fact in (({"steps": 4}, "steps (6 there, 4 here)"), ({"ema": 0.5}, "ema"), ({"rank": 3}, "rank")):
        with raises("recipe_mismatch", f"distill.{fact}", kind=UsageError):
            go(**{"steps": 6, **keys})
    assert load_recipe(tmp_path / "run" / "recipe.yaml").distill.steps == 6


def test_sampling_is_not_harmless_where_negatives_are_drawn() -> None:
    plain, wish = Distill(), Distill(preference=Preference(), init="student")
    assert "sample_steps" in may_change(plain, plain) and "sample_steps" not in may_change(wish, wish)
    assert "sample_steps" not in identity(plain, 0) and "sample_steps" in identity(wish, 0)
    assert "steps" in may_change(plain, Distill(steps=9000)) - may_change(plain, Distill(steps=1))
    cosine, longer = (Distill(schedule="cosine", steps=steps) for steps in (4000, 9000))
    assert "steps" not in may_change(cosine, longer)
