"""The decoder's training: what it learns from, what it leaves alone, how it resumes, and how it is exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.pocket.pretrain import __main__ as commands
from diptych.pocket.pretrain import decoder, renders, vae
from diptych.utils.paths import packaged

TEACHER = packaged("pocket/weights") / "teacher"
WEIGHTS = "diffusion_pytorch_model.safetensors"
quiet = {"device": "cpu", "report": lambda line: None}


@pytest.fixture(scope="module")
def teacher():
    return decoder.open_teacher(TEACHER, torch.device("cpu"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"POOL": 8, "PORTION": 4, "USES": 1, "HELD_OUT": 2}.items():
        monkeypatch.setattr(decoder, name, value)
    renders.make(tmp_path / "pairs", 16, processes=1, report=lambda line: None)
    return tmp_path


def pool_of(teacher, work: Path) -> decoder.LatentPool:
    return decoder.LatentPool(teacher, *renders.load(work / "pairs"), np.random.default_rng(0))


def test_one_step_is_the_teachers_estimate_of_the_clean_latents(teacher, work: Path) -> None:
    grid = decoder.canvases(np.asarray(renders.load(work / "pairs")[0][:1]))
    latents, prompt, sigma = decoder.encode(teacher.vae, grid), "a cat on the beach and the same cat in a cave", 0.4
    config, ids = teacher.vae.config, teacher._prepare_latent_image_ids(1, 4, 8, torch.device("cpu"), torch.float32)
    clean = teacher._pack_latents((latents - config.shift_factor) * config.scaling_factor, *latents.shape)
    x_t = (1 - sigma) * clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        text, pooled, text_ids = teacher.encode_prompt(
            prompt, None, max_sequence_length=teacher.tokenizer_2.model_max_length
        )
        velocity = teacher.transformer(
            x_t, text, pooled, torch.tensor([sigma]), img_ids=ids, txt_ids=text_ids, return_dict=False
        )[0]
    estimate = teacher._unpack_latents(x_t - sigma * velocity, 64, 128, teacher.vae_scale_factor)
    wanted = estimate / config.scaling_factor + config.shift_factor
    recovered = decoder.recover(teacher, latents, [prompt], sigma, steps=1, guidance=1.0, seed=5)
    assert torch.allclose(recovered, wanted, atol=1e-4)
    near = decoder.recover(teacher, latents, [prompt], 0.05, steps=1, guidance=1.0, seed=5)
    assert (near - latents).abs().mean() < (recovered - latents).abs().mean() / 2


@pytest.mark.parametrize(("shares", "kind"), [((1, 0, 0), "true"), ((0, 0, 1), "recovered"), ((0, 1, 0), "white")])
@pytest.mark.parametrize("singles", [0.0, 1.0])
def test_a_batch_has_the_image_of_each_latent(teacher, work: Path, monkeypatch, shares, kind, singles) -> None:
    monkeypatch.setattr(decoder, "SHARES", shares)
    monkeypatch.setattr(decoder, "SINGLES", singles)
    pool = pool_of(teacher, work)
    images, latents = pool.batch(6)
    known = pool.true if kind == "white" else getattr(pool, kind)
    source, shown = (torch.cat(x.chunk(2, dim)) if singles else x for x, dim in ((known, 3), (pool.images, 2)))
    assert len(images) == len(latents) == (12 if singles else 6)
    for image, latent in zip(images, latents, strict=True):
        places = [n for n, other in enumerate(shown) if torch.equal(image, other)]  # a render may be there twice
        error = min(float((latent - source[place]).std() / pool.spread.mean()) for place in places)
        assert (0 < error < 1.3 * decoder.WHITE) if kind == "white" else error == 0


def test_a_pool_replaces_its_oldest_grids(teacher, work: Path) -> None:
    pool = pool_of(teacher, work)
    before = pool.true
    pool.refresh()
    assert len(pool.true) == len(pool.images) == len(pool.recovered) == decoder.POOL
    assert torch.equal(pool.true[: decoder.POOL - decoder.PORTION], before[decoder.PORTION :])


def test_a_decoder_trained_further_leaves_the_encoder_as_it_is(work: Path) -> None:
    decoder.train(work, TEACHER, 5, samples=16, batch=4, **quiet)
    first, trained = (vae.make().from_pretrained(folder) for folder in (TEACHER / "vae", work / "decoder"))
    for before, after in zip(first.encoder.parameters(), trained.encoder.parameters(), strict=True):
        assert torch.equal(before, after)
    assert first.config.scaling_factor == trained.config.scaling_factor
    changed = zip(first.decoder.parameters(), trained.decoder.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in changed)


def test_a_stopped_decoder_training_resumes_and_ends_after_its_samples(work: Path) -> None:
    lines = []
    given = {"samples": 24, "batch": 4, "device": "cpu", "report": lines.append}
    decoder.train(work, TEACHER, 0.0, **given)
    assert json.loads(lines[-1])["step"] == 0
    for _ in range(2):
        decoder.train(work, TEACHER, 5, **given)
        assert json.loads(lines[-1])["samples"] == 24
    state = torch.load(work / "decoder_training" / "state.pt", weights_only=True)
    assert state["step"] == 6
    starts = [line for line in (work / "decoder_training" / "log.jsonl").read_text().splitlines() if "start" in line]
    assert len(starts) == 1


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's teacher and log, and a work folder with a decoder beside it."""
    weights = tmp_path / "weights"
    shutil.copytree(TEACHER / "vae", weights / "teacher" / "vae")
    shutil.copyfile(TEACHER.parent / "log.json", weights / "log.json")
    monkeypatch.setattr(commands, "WEIGHTS", weights)
    return weights


def decoder_in(work: Path, change: str) -> None:
    trained = vae.make().from_pretrained(TEACHER / "vae")
    with torch.no_grad():
        next(getattr(trained, change).parameters()).add_(0.01)
    trained.save_pretrained(work / "decoder")
    (work / "decoder_training").mkdir()
    lines = [{"step": 0, "seconds": 0.0, "start": "teacher"}, {"step": 2, "seconds": 1.0, "samples": 24}]
    (work / "decoder_training" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_exported_decoder_keeps_the_encoder_and_its_history(tmp_path: Path, package: Path) -> None:
    decoder_in(tmp_path, "decoder")
    known = json.loads((package / "log.json").read_text())["vae"]
    for _ in range(2):
        commands.export(tmp_path)
        log = json.loads((package / "log.json").read_text())["vae"]
        assert log["steps"] == 2 and log["before"] == known
    exported, shipped = package / "teacher" / "vae" / WEIGHTS, TEACHER / "vae" / WEIGHTS
    assert commands.encoder_tensors(exported) == commands.encoder_tensors(shipped)
    assert exported.read_bytes() != shipped.read_bytes() and exported.stat().st_size == shipped.stat().st_size


def test_a_decoder_of_another_encoder_is_not_exported(tmp_path: Path, package: Path) -> None:
    decoder_in(tmp_path, "encoder")
    before = (package / "teacher" / "vae" / WEIGHTS).read_bytes()
    with pytest.raises(SystemExit, match="another encoder"):
        commands.export(tmp_path)
    assert (package / "teacher" / "vae" / WEIGHTS).read_bytes() == before
