"""The pocket trainings: rows fixed by their number, a trainer that continues where it was, tokenizers that survive."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from diptych.pocket import world
from diptych.pocket.pretrain import judges, renders, teacher, tokenizers, trainer, vae
from diptych.pocket.pretrain.trainer import Pretraining


def test_rendering_continues_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(renders, "CHUNK", 4)
    renders.make(tmp_path, 8, processes=1, report=lambda line: None)
    whole = (np.array(renders.load(tmp_path)[0]), renders.load(tmp_path)[1])
    (tmp_path / "rows" / "0000004.json").unlink()
    assert len(renders.load(tmp_path)[1]) == 4
    renders.make(tmp_path, 8, processes=1, report=lambda line: None)
    again = renders.load(tmp_path)
    assert np.array_equal(again[0], whole[0]) and again[1] == whole[1]


def test_a_pair_depends_on_its_number_alone():
    first, second = renders.pair(12), renders.pair(12)
    assert np.array_equal(first[0], second[0]) and first[1] == second[1]
    tasks = {renders.pair(n)[1]["task"] for n in range(30)}
    assert tasks == {"subject", "relight"}


def test_a_training_killed_and_continued_equals_one_straight_through(tmp_path):
    def train(folder, steps, trainer=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        trainer = Pretraining(folder, {"model": model}, rate=0.1, warmup=3)
        while trainer.step < steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(trainer.step))
            trainer.update((model(x) - 1).pow(2).mean())
        trainer.save()
        with trainer.averaged():
            return model.weight.detach().clone()

    straight = train(tmp_path / "a", 20)
    train(tmp_path / "b", 7)
    assert torch.equal(train(tmp_path / "b", 20), straight)


def test_the_trainer_never_saves_over_a_good_state_after_a_loss_that_is_not_a_number(tmp_path):
    model = torch.nn.Linear(1, 1)
    trainer = Pretraining(tmp_path, {"model": model}, rate=0.1)
    trainer.update(model(torch.ones(1, 1)).sum())
    trainer.save()
    good = (tmp_path / "state.pt").read_bytes()
    trainer.update(model(torch.full((1, 1), torch.nan)).sum())
    trainer.update(model(torch.ones(1, 1)).sum())
    for refused in (trainer.save, lambda: trainer.log(loss=0)):
        with pytest.raises(RuntimeError, match=f"by step 3; the last good state is in {tmp_path}"):
            refused()
    assert (tmp_path / "state.pt").read_bytes() == good


def test_the_teacher_is_taught_every_rendered_pair_as_it_was_said_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(renders, "CHUNK", 4)
    renders.make(tmp_path / "pairs", 8, processes=1, report=lambda line: None)
    vae.make().save_pretrained(tmp_path / "vae")
    teacher.tables(tmp_path, 8)
    teacher.encode(tmp_path, 8, "cpu", report=lambda line: None)
    _, rows = renders.load(tmp_path / "pairs")
    latents, prompts = np.load(tmp_path / "latents.npy"), np.load(tmp_path / "prompts.npy")
    side = world.PANEL // vae.FACTOR
    assert latents.shape == (8, vae.LATENTS, side, 2 * side) and np.isfinite(latents).all()
    _, t5 = tokenizers.load_or_make(tmp_path / "teacher_training")
    for n, row in enumerate(rows):
        for place, name in enumerate(teacher.TEXTS):
            wanted = t5(row[name][-1], padding="max_length", max_length=tokenizers.MAX_LENGTH).input_ids
            assert prompts[n, place, 1, 1].tolist() == wanted
        numbers, choices = trainer.traits_of(renders.plan(n)[0][1])
        assert np.allclose(np.load(tmp_path / "numbers.npy")[n, 1], numbers)
        assert np.load(tmp_path / "choices.npy")[n, 1].tolist() == choices
    assert len({latents[n].tobytes() for n in range(8)}) == 8


def test_work_spread_over_processes_comes_back_in_order():
    numbers = list(range(7))
    assert renders.spread(str, numbers, 2) == renders.spread(str, numbers, 1) == [str(n) for n in numbers]


def test_a_teacher_begins_anew_only_where_another_vae_needs_other_layers(tmp_path, monkeypatch):
    both = tokenizers.make_tokenizers()
    first = teacher.Teacher(teacher.make_transformer(), *tokenizers.make_encoders(*both))
    teacher.save(tmp_path, first, vae.make(), *both)
    monkeypatch.setattr(vae, "LATENTS", 2 * vae.LATENTS)
    second = teacher.Teacher(teacher.make_transformer(), *tokenizers.make_encoders(*both))
    anew = teacher.load_weights(second, tmp_path)
    assert sorted(anew) == ["proj_out.bias", "proj_out.weight", "x_embedder.weight"]
    a, b = first.transformer.state_dict(), second.transformer.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a if key not in anew)


def test_tokenizers_survive_a_save_and_end_marks_are_found(tmp_path):
    clip, t5 = tokenizers.make_tokenizers()
    tokenizers.save(tmp_path, clip, t5)
    text = "a cat jumping on the beach, soft golden light from the left"
    for name, tokenizer in (("tokenizer", clip), ("tokenizer_2", t5)):
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.model_max_length == tokenizers.MAX_LENGTH
    encoder, _ = tokenizers.make_encoders(clip, t5)
    assert encoder.config.eos_token_id == clip.eos_token_id == len(clip) - 1 != 2


def test_tokenizers_are_the_same_in_every_process(tmp_path):
    clip, t5 = tokenizers.load_or_make(tmp_path)
    script = (
        "import sys, json; from diptych.pocket.pretrain import tokenizers\n"
        "print(json.dumps(tokenizers.make_tokenizers()[0].get_vocab()))"
    )
    for seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert json.loads(out.stdout) == clip.get_vocab()
    again = tokenizers.load_or_make(tmp_path)
    assert again[0].get_vocab() == clip.get_vocab() and again[1].get_vocab() == t5.get_vocab()


def test_triplets_carry_the_truth():
    panels, labels = judges.triplet(3, seed=1)
    assert panels.shape == (3, world.PANEL, world.PANEL, 3) and labels.shape == (3, len(judges.GROUPS))
    rng = np.random.default_rng([1, 3])
    identity = world.sample_identity(rng)
    kind = list(judges.GROUPS).index("kind")
    assert all(judges.GROUPS["kind"][row[kind]] == identity.kind for row in labels)


def test_a_judge_learns_from_its_own_third_with_the_truth_of_every_panel(tmp_path, monkeypatch):
    monkeypatch.setattr(renders, "CHUNK", 12)
    renders.make(tmp_path / "pairs", 24, processes=1, report=lambda line: None)
    vae.make().save_pretrained(tmp_path / "vae")
    quiet = {"device": "cpu", "report": lambda line: None}
    pairs = {role: judges.JudgePairs(tmp_path, role, 100, **quiet) for role in judges.SEEDS}
    panels, rows = renders.load(tmp_path / "pairs")
    assert sum(len(p.panels) for p in pairs.values()) == sum(row["task"] == "subject" for row in rows)
    own = [n for n in range(1, 24, 3) if rows[n]["task"] == "subject"]
    scorer = pairs["scorer"]
    for place, n in enumerate(own):
        subjects, scenes, row = renders.plan(n)
        assert scorer.same[place] == row["same"] == (subjects[0] is subjects[1])
        numbers, choices = trainer.traits_of(subjects[1])
        assert np.allclose(scorer.numbers[place, 1], numbers) and scorer.choices[place, 1].tolist() == choices
        assert scorer.labels[place, 0].tolist() == judges.truth(subjects[0], scenes[0])
    untouched = [
        np.array_equal(a, b) for i, n in enumerate(own) for a, b in zip(scorer.panels[i], panels[n], strict=True)
    ]
    assert any(untouched) and not all(untouched)  # most, not all, have been through the VAE


def test_a_judges_losses_fall_when_it_is_right():
    head = judges.Head(8)
    same = torch.tensor([True, True, False, False])
    a = torch.eye(8)[:4]
    right = torch.where(same[:, None], a, torch.eye(8)[4:])
    assert head.pair_loss(a, right, same) < head.pair_loss(a, right.flip(0), same)
    torch.manual_seed(0)
    vectors, numbers = torch.randn(16, 8), torch.randn(16, trainer.TRAITS)
    choices = torch.zeros(16, 5, dtype=torch.long)
    before = head.traits.loss(vectors, numbers, choices)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        head.traits.loss(vectors, numbers, choices).backward()
        optimizer.step()
    assert head.traits.loss(vectors, numbers, choices) < 0.8 * before


def test_features_are_averaged_over_each_panel():
    side, panels = 4, 2
    canvas = torch.zeros(3, side, panels * side, 5)
    canvas[:, :, :side], canvas[:, :, side:] = 1, torch.arange(5.0)
    features = teacher.panel_features(canvas.flatten(1, 2), panels)
    assert torch.equal(features[::2], torch.ones(3, 5)) and torch.equal(features[1::2], torch.arange(5.0).repeat(3, 1))
