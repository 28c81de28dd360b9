"""Widen, fold and unfold: a DSD student's weights as a stock FLUX-Control transformer.

The release adds one layer to FLUX, `c_embedder`, and feeds the blocks `x_embedder(x) + c_embedder(c)` (x the noisy
canvas, c the condition canvas). That equals one linear on `[x ; c]` with `W = [Wx | Wc]` and `b = bx + bc`, so the
released layout *folds* exactly into `FluxTransformer2DModel(in_channels=2·C, out_channels=C)`; `unfold` goes back. A
new student is the teacher with zero columns added: `widen`.

The sum `b = bx + bc` loses its two parts, so both are stored beside the folded weights (`files.SPLIT_FILE`), and
released → folded → released is bit-equal. The released file also has adapter tensors that its code ignores
(`….lora_A.default.weight`): they are dropped and counted. Any other key that does not match is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from diptych.errors import UserError, describe
from diptych.student import settings
from diptych.student.families import family_of
from diptych.student.families.base import Family
from diptych.student.families.flux1 import FLUX1
from diptych.utils import models

RELEASED_CLASS = "FluxTransformer2DConditionalModel"
INPUT = "x_embedder"
INPUT_LAYERS = (INPUT, "c_embedder")  # the layers that folding and unfolding change
_BLOCKS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
_BLOCK_KEY = re.compile(r"^(transformer_blocks|single_transformer_blocks)\.(\d{1,6})\.")
_ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.lora_(?:[AB]|magnitude_vector)\.[^.]+\.(?:weight|bias)$")


@dataclass(frozen=True)
class BiasSplit:
    """The two parts of a folded input bias, (inner_dim,) each, as the released file has them."""

    x: torch.Tensor
    c: torch.Tensor

    def of(self, bias: torch.Tensor) -> bool:
        """Whether `bias` is, bit for bit, the sum of the two parts. False once the bias was trained or cast."""
        same = self.x.dtype == self.c.dtype == bias.dtype and self.x.shape == bias.shape
        return same and torch.equal(self.x + self.c, bias.to(self.x.device))


@dataclass(frozen=True)
class Folded:
    """Weights and config of a stock FLUX-Control transformer, and what folding removed from them."""

    config: dict[str, Any]
    state_dict: dict[str, Any]  # tensors, or other values with a shape, which `fold` passes through
    split: BiasSplit | None = None
    adapters: tuple[str, ...] = ()  # names of the ignored adapter tensors


def widen(transformer: Any) -> Any:
    """A new student: the teacher with in_channels doubled, the same out_channels, and zero columns for the condition.

    Its output is the teacher's for every condition. All tensors but the input layer's weight *share* the teacher's
    storage, so that a 12 B model is not in memory twice. Training the student in place therefore changes the teacher;
    pass a `copy.deepcopy` to prevent that. Built explicitly, because `from_pretrained` of plain FLUX weights into a
    widened layer leaves that layer uninitialized or on the meta device.
    """
    config = dict(transformer.config)
    if getattr(transformer, "peft_config", None):
        raise UserError(
            "lora_unsupported", "A transformer with an unfused LoRA cannot be widened. Fuse and unload the LoRA first."
        )
    family = family_of(type(transformer).__name__)
    channels, out_channels = family.channels(config)
    if channels != out_channels:
        raise UserError(
            "model_unsupported",
            f"This transformer is already widened: it has {channels} input channels and {out_channels} output "
            "channels. Pass a text-to-image transformer.",
        )
    if (wide := family.widened(config)) is None:
        family.check("diptych")
    state, name = dict(transformer.state_dict()), f"{family.input_layer}.weight"
    state[name] = torch.cat([state[name], torch.zeros_like(state[name])], dim=1)
    return build({**config, **(wide or {})}, state, type(transformer)).train(transformer.training)


def image_columns(weight: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    """Columns (D, C) with which a widened input layer (D, 2C) reads its condition as it reads an image.

    They are the teacher's columns without their component along `empty` (C,), the mean latents of the black panel that
    stands where there is no reference. The left panel's tokens then look to the teacher like a panel with less noise.
    """
    columns = weight[:, : weight.shape[1] // 2]
    if empty is None or not empty.any():
        return columns.clone()
    along = (empty / empty.norm()).to(columns)
    return columns - torch.outer(columns @ along, along)


def fold(state_dict: Mapping[str, Any], config: Mapping[str, Any], where: str = "the released weights") -> Folded:
    """The released layout (`x_embedder` and `c_embedder`) as stock FLUX-Control weights.

    Only `INPUT_LAYERS` must be tensors; the rest may be anything with a shape, such as tensors on disk. UserError that
    names every key that is missing, unexpected or of the wrong shape.
    """
    stock = stock_config(config)
    check_layers(stock, state_dict, where)
    channels = stock["in_channels"]
    plain = {**stock, "out_channels": stock.get("out_channels") or channels}
    expected = shapes_of(plain)
    for part in ("weight", "bias"):
        expected[f"c_embedder.{part}"] = expected[f"x_embedder.{part}"]
    state, adapters = _without_adapters(state_dict, expected)
    check_keys(state, expected, where)

    split = BiasSplit(x=state.pop("x_embedder.bias"), c=state.pop("c_embedder.bias"))
    state["x_embedder.weight"] = torch.cat([state["x_embedder.weight"], state.pop("c_embedder.weight")], dim=1)
    state["x_embedder.bias"] = split.x + split.c
    return Folded({**plain, "in_channels": 2 * channels}, state, split, adapters)


def unfold(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], split: BiasSplit | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stock FLUX-Control weights as the released layout: (state_dict, config). Reads the input layer only.

    With the `split` that `fold` returned, the result is bit-equal to what was folded. Without it, or if the bias has
    changed since, the whole bias goes to `x_embedder` and `c_embedder.bias` is zero: the same function in other bits.
    """
    stock = stock_config(config)
    check_layers(stock, state_dict, "the folded weights")
    check_keys(state_dict, shapes_of(stock), "the folded weights")
    channels = student_channels(stock)
    state = dict(state_dict)
    weight, bias = state["x_embedder.weight"], state["x_embedder.bias"]
    if split is None or not split.of(bias):
        split = BiasSplit(x=bias, c=torch.zeros_like(bias))
    state["x_embedder.weight"], state["c_embedder.weight"] = (w.contiguous() for w in weight.split(channels, dim=1))
    state["x_embedder.bias"], state["c_embedder.bias"] = split.x, split.c
    released = {k: v for k, v in stock.items() if k != "out_channels"}
    return state, {"_class_name": RELEASED_CLASS, **released, "in_channels": channels}


def student_channels(config: Mapping[str, Any], where: str = "This transformer", family: Family = FLUX1) -> int:
    """Channels C of a student's canvas tokens, from its folded config. UserError if it is not a student.

    A student has twice as many input channels as output channels, unless its settings have `conditioning: tokens`.
    """
    channels, out = family.channels(config)
    if settings.of(config).conditioning == "tokens":
        if channels != out:
            raise UserError(
                "model_mismatch",
                f"{where} has {channels} input channels and {out} output channels; with conditioning tokens, a student "
                "has as many of both.",
            )
        return out
    if channels == out:
        raise UserError(
            "model_unsupported",
            f"{where} is a text-to-image transformer ({channels} input and output channels), not a student. "
            "Distill a student from it, or widen it with diptych.student.weights.fold.widen.",
        )
    if channels != 2 * out:
        raise UserError(
            "model_unsupported",
            f"{where} has {channels} input channels and {out} output channels; a student has twice as many input "
            "channels as output channels.",
        )
    return out


def build(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], cls: Any = FluxTransformer2DModel) -> Any:
    """A stock transformer in eval mode with exactly these tensors (shared, not copied). Every key must match."""
    from accelerate import init_empty_weights

    check_layers(config, state_dict, "the weights")
    # Tables of positions, which other classes than FLUX.1's compute when they are built, stay off the meta device.
    with torch.device("meta") if cls is FluxTransformer2DModel else init_empty_weights(include_buffers=False):
        model = cls.from_config(stock_config(config))  # which also registers a student's settings
    check_keys(state_dict, {k: tuple(v.shape) for k, v in model.state_dict().items()}, "the weights")
    model.load_state_dict(dict(state_dict), strict=True, assign=True)
    unset = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not unset, unset
    return model.eval()


def check_keys(state_dict: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """UserError that names each key of `state_dict` that is missing, unexpected or of the wrong shape."""
    faults = []
    if missing := sorted(expected.keys() - state_dict.keys()):
        faults.append(f"missing {some(missing)}")
    if extra := sorted(state_dict.keys() - expected.keys()):
        faults.append(f"unexpected {some(extra)}")
    shapes = [
        f"{key} is {tuple(tensor.shape)} but should be {expected[key]}"
        for key, tensor in state_dict.items()
        if key in expected and tuple(tensor.shape) != expected[key]
    ]
    if shapes:
        faults.append(f"wrong shapes: {some(sorted(shapes))}")
    if faults:
        raise _misfit(where, "; ".join(faults))


def _misfit(where: str, faults: str) -> UserError:
    return UserError(
        "model_mismatch",
        f"{where}: the weights do not match their config: {faults}. Nothing was loaded; fetch both again, from the "
        "same source.",
    )


def some(names: list[str], most: int = 12) -> str:
    """Names for a message: the first `most`, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _without_adapters(state_dict: Mapping[str, Any], expected: Iterable[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state without the adapter tensors of layers that the model has, and the names of these tensors. Others stay,
    so that a later check can report them."""
    layers = {key.rpartition(".")[0] for key in expected}
    matches = {key: _ADAPTER_KEY.match(key) for key in state_dict}
    adapters = {key for key, match in matches.items() if match and match["module"] in layers}
    return {key: tensor for key, tensor in state_dict.items() if key not in adapters}, tuple(sorted(adapters))


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `FluxTransformer2DModel` in `config` and a student's settings, without diffusers' private
    keys."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == settings.KEY}


def check_layers(config: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """UserError unless the weights have as many blocks as their config says. Called before such a model is built."""
    for kind, count in count_blocks(keys).items():
        if (stated := config.get(kind)) is not None and stated != count:
            raise _misfit(where, f"{kind} is {stated}, and the weights have {count} such blocks")


def count_blocks(keys: Iterable[str]) -> dict[str, int]:
    """The number of blocks of each kind that have weights, under its name in a config."""
    counts = dict.fromkeys(_BLOCKS.values(), 0)
    for key in keys:
        if match := _BLOCK_KEY.match(key):
            kind = _BLOCKS[match[1]]
            counts[kind] = max(counts[kind], int(match[2]) + 1)
    return counts


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a FLUX transformer's tensors, from its config. UserError if no model can be built from it."""
    models.check(config, "the transformer's config")
    try:
        with torch.device("meta"):
            model = FluxTransformer2DModel.from_config(dict(config))
    except (RuntimeError, ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise UserError(
            "model_unsupported", f"This config does not describe a transformer ({describe(error)}). Fetch it again."
        ) from error
    assert isinstance(model, FluxTransformer2DModel)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
