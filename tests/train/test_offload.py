"""Frozen blocks that visit the device one at a time change where weights are, and no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kills
import pytest
import tiny_run
import torch

from diptych.recipe.schema import Distill
from diptych.student.weights.fold import widen
from diptych.train import parts
from diptych.train.distill import distill
from diptych.train.parts import Offload

LORA = {"mode": "lora", "rank": 4, "gradient_checkpointing": True}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_with_blocks_offloaded_is_the_same_training(world: Any, tmp_path: Path, precision: str) -> None:
    for name in ("none", "blocks"):
        recipe = tiny_run.make_recipe(world.teacher, **LORA, precision=precision, offload=name)
        distill(recipe, world.pairs, tmp_path / name)
    assert kills.result(tmp_path / "none", "lora") == kills.result(tmp_path / "blocks", "lora")


def test_one_block_visits_at_a_time_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    visits: list[int] = []
    load = Offload._load

    def counted(self: Offload, matrices: list[torch.nn.Parameter]) -> None:
        assert not self.present
        load(self, matrices)
        assert all(matrix.data_ptr() != self._waiting[matrix].data_ptr() for matrix in matrices)
        visits.append(len(self.present))

    monkeypatch.setattr(Offload, "_load", counted)
    transformer: Any = widen(tiny_run.make_transformer())
    options = Distill(mode="lora", rank=2, gradient_checkpointing=True, offload="blocks")
    trained = parts.select(transformer, options, "float32", torch.device("cpu"))
    text, tokens = torch.randn(1, 5, 24), torch.randn(1, 8, 32)
    (out,) = transformer(
        hidden_states=tokens,
        timestep=torch.tensor([0.5]),
        pooled_projections=torch.randn(1, 16),
        encoder_hidden_states=text,
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.zeros(8, 3),
        return_dict=False,
    )
    assert len(visits) == 3  # one double block and two single ones
    out.square().mean().backward()
    assert len(visits) == 6 and min(visits) > 0
    assert all(parameter.grad is not None for parameter in trained.parameters)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "full"}, "mode: lora"),
        ({"quantize": "nf4"}, "quantize: none"),
        ({"gradient_checkpointing": False}, "needs gradient_checkpointing"),
    ],
)
def test_what_it_does_not_go_with_is_refused(world: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run.make_recipe(world.teacher, **{**LORA, "offload": "blocks", **keys})
