"""Black Forest Labs' keys of a FLUX transformer as diffusers' keys, and back. `original.yaml` names the layers.

diffusers' converter fixes the width at 3072. This one takes it from the tensors, and works on tensors that are still on
disk. Black Forest Labs store q, k and v (and, in single blocks, the MLP's first linear) in one matrix, which is split
by rows. They also order shift and scale of the last modulation the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from diptych.student.weights.tensors import Stored
from diptych.utils.documents import facts

INPUT = "img_in"
MODULATION = "final_layer.adaLN_modulation.1"  # shift and scale are the other way round
_LAYERS: Mapping[str, Mapping[str, list[str]]] = facts(__file__)
_FOLDERS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_NORMS = ("query_norm", "key_norm")  # their weight is called `scale`


def layer_names(blocks: str = "") -> Iterable[str]:
    """Names of the layers in a kind of block, in the spelling that `blocks` belongs to (`double_blocks`,
    `transformer_blocks`, …). For "", the layers outside of blocks, in both spellings."""
    if blocks in _FOLDERS:
        return _LAYERS[blocks]
    theirs = next((name for name, folder in _FOLDERS.items() if folder == blocks), "")
    ours = [name for names in _LAYERS[theirs].values() for name in names]
    return ours if theirs else [*_LAYERS[""], *ours]


def folder_of(blocks: str) -> str:
    """diffusers' name of a kind of block of Black Forest Labs."""
    return _FOLDERS[blocks]


def layers_of(layer: str) -> tuple[str, ...]:
    """diffusers' layers for one of Black Forest Labs' layers, in the order of its rows. Empty for an unknown layer."""
    if layer in _LAYERS[""]:
        return tuple(_LAYERS[""][layer])
    blocks, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    if blocks not in _FOLDERS or not number.isdecimal():
        return ()
    return tuple(f"{_FOLDERS[blocks]}.{number}.{name}" for name in _LAYERS[blocks].get(inner, ()))


def original_of(layer: str) -> str | None:
    """Black Forest Labs' layer that a layer of diffusers is equal to, or a part of. None for an unknown layer."""
    folder, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    blocks = next((theirs for theirs, ours in _FOLDERS.items() if ours == folder), "")
    wanted = inner if blocks else layer
    name = next((theirs for theirs, names in _LAYERS[blocks].items() if wanted in names), None)
    return f"{blocks}.{number}.{name}" if name and blocks else name


def to_original(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """diffusers' keys as Black Forest Labs' keys: the inverse of `from_original`, bit for bit."""
    out: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        theirs = original_of(layer)
        assert theirs is not None, key
        names = layers_of(theirs)
        if theirs == MODULATION:
            tensor = _swapped(tensor)
        elif len(names) > 1:
            tensor = _stacked([tensors[f"{name}.{part}"] for name in names])
        out[f"{theirs}.{'scale' if part == 'weight' and theirs.endswith(_NORMS) else part}"] = tensor
    return out


def is_original(keys: Iterable[str]) -> bool:
    """Whether these are Black Forest Labs' keys."""
    return f"{INPUT}.weight" in keys


def from_original(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Black Forest Labs' keys as diffusers' keys. An unknown key keeps its name; a later check reports it."""
    width = tensors[f"{INPUT}.weight"].shape[0]
    out: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        part = "weight" if part == "scale" and layer.endswith(_NORMS) else part
        names = layers_of(layer) if part in ("weight", "bias") else ()
        if not names:
            out[key] = tensor
            continue
        if len(names) == 1:
            out[f"{names[0]}.{part}"] = _swapped(tensor) if layer == MODULATION else tensor
            continue
        ends = [*(width * i for i in range(len(names))), tensor.shape[0]]
        for name, start, stop in zip(names, ends[:-1], ends[1:], strict=True):
            out[f"{name}.{part}"] = tensor.rows(start, stop)
    return out


def _stacked(parts: list[Stored]) -> Stored:
    """Several tensors on top of each other."""
    rows = sum(part.shape[0] for part in parts)
    return Stored((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def _swapped(tensor: Stored) -> Stored:
    """[shift; scale] as [scale; shift]."""
    half = tensor.shape[0] // 2

    def read() -> torch.Tensor:
        value = tensor.read()
        return torch.cat([value[half:], value[:half]])

    return Stored(tensor.shape, tensor.dtype, read)
