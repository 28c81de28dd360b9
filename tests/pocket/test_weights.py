"""The weights that ship: small enough, opened by the stock libraries, and doing what their log says."""

import hashlib
import json

import numpy as np
import pytest
import torch

from diptych import Student
from diptych.judges.attributes import AttributeReader
from diptych.judges.embedding import EmbeddingJudge
from diptych.pocket import captions, world
from diptych.pocket.render import render
from diptych.utils.models import resolve
from diptych.utils.paths import packaged

WEIGHTS = packaged("pocket/weights")
REFERENCES = packaged("examples/references")
FLOORS = {"curator": 0.95, "scorer": 0.95}
"""A little under what the judges reach on strangers of one kind (their exact held-out errors are in the log)."""
ENCODER = "5cf4a552ba8fb1e849d95c9b28154b2cf0971a1c89334168e7af866df51b6d86"
"""sha256 of the encoder's tensors. Another encoder needs another teacher, student and other pairs."""


@pytest.fixture(scope="module")
def student():
    made = Student.load("pocket")
    made.pipeline.set_progress_bar_config(disable=True)
    return made


def renders(count: int, seed: int):
    from PIL import Image

    out = []
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        identity = world.sample_identity(rng)
        scenes = [world.sample_scene(rng) for _ in range(2)]
        out.append((identity, scenes, [Image.fromarray(render(identity, scene)) for scene in scenes]))
    return out


def test_all_weights_together_are_at_most_25_mib():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 25 * 2**20


def test_the_log_says_how_each_model_came_to_be():
    log = json.loads((WEIGHTS / "log.json").read_text())
    for role in ("vae", "teacher", "curator", "scorer", "reader"):
        assert log[role]["steps"] > 0 and log[role]["curve"] and log[role]["machine"], role
        assert any(line.keys() & {"samples", "panels"} for line in log[role]["curve"]), role
    student = log["student"]
    assert student["summary"]["samples_seen"] > 0 and student["curve"][-1]["loss"] < student["curve"][0]["loss"]


def test_stock_diffusers_draws_with_the_teacher():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(resolve("pocket", "teacher"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a cat on the beach",
        height=world.PANEL,
        width=world.PANEL,
        num_inference_steps=2,
        max_sequence_length=pipe.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (world.PANEL, world.PANEL) and np.asarray(image).std() > 5


def test_the_vae_keeps_what_a_held_out_picture_shows():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(resolve("pocket", "teacher") / "vae", torch_dtype=torch.float32)
    pictures = np.stack([np.asarray(images[0]) for _, _, images in renders(16, seed=901)])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((x - y) / 2).pow(2).mean((1, 2, 3)))
    assert psnr.mean() > 24


def test_the_encoder_is_the_one_that_the_teacher_the_student_and_the_pairs_were_made_with():
    from safetensors.torch import load_file

    weights = load_file(WEIGHTS / "teacher" / "vae" / "diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if name.startswith("encoder.")):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    assert digest.hexdigest() == ENCODER
    config = json.loads((WEIGHTS / "teacher" / "vae" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == (0.9081603288650513, 0.07317960262298584)


def test_judges_tell_subjects_of_one_kind_apart():
    for role in ("curator", "scorer"):
        judge = EmbeddingJudge.load("pocket", role=role)
        rng = np.random.default_rng(17)
        same, other = [], []
        for identity, scenes, images in renders(40, seed=902):
            from PIL import Image

            stranger = world.sample_identity(rng, kind=identity.kind)
            third = Image.fromarray(render(stranger, scenes[1]))
            a, b, c = judge.embed([*images, third])
            same.append(float(a @ b))
            other.append(float(a @ c))
        auc = np.mean(np.array(same)[:, None] > np.array(other)[None])
        assert auc > FLOORS[role], (role, auc)


def test_the_reader_reads_places_and_lights():
    reader = AttributeReader.load("pocket")
    drawn = renders(60, seed=903)
    read = reader.read([images[0] for _, _, images in drawn])
    place = np.mean([r.values["place"] == scenes[0].place for r, (_, scenes, _) in zip(read, drawn, strict=True)])
    colour = np.mean(
        [r.values["colour"] == scenes[0].light.colour for r, (_, scenes, _) in zip(read, drawn, strict=True)]
    )
    assert place > 0.9 and colour > 0.9


def test_the_same_seed_gives_the_same_bytes(student):
    options = {"seed": 4, "steps": 3}
    first = student.generate(REFERENCES / "cat.png", "a cat on the beach", **options)
    second = student.generate(REFERENCES / "cat.png", "a cat on the beach", **options)
    other = student.generate(REFERENCES / "cat.png", "a cat on the beach", seed=5, steps=3)
    assert first.tobytes() == second.tobytes() != other.tobytes()


def test_the_left_panel_of_the_student_is_its_reference_and_no_other(student):
    """The parallel objective: the identity mapping is on the left."""
    from diptych.data.images import open_image

    references = [open_image(REFERENCES / f"{kind}.png") for kind in ("robot", "cat", "fish")]
    out = student.pipeline(
        ["a robot in a forest"] * 3,
        reference=references,
        generator=[0, 1, 2],
        num_inference_steps=8,
        return_reference=True,
    )
    drawn = np.stack([np.asarray(image, dtype=float) for image in out.references])
    given = np.stack([np.asarray(image, dtype=float) for image in references])
    distance = np.abs(drawn[:, None] - given[None]).mean((2, 3, 4))
    assert (distance.argmin(1) == np.arange(3)).all(), distance.round(1)


def test_the_student_knows_its_words(student):
    assert student.unknown_words("a Cat on the beach") == []
    assert student.unknown_words("a teapot on the beach") == ["teapot"]
    assert student.words == frozenset(captions.WORDS)


def test_every_kind_has_a_reference():
    assert {path.stem for path in REFERENCES.glob("*.png")} == set(world.KINDS)
