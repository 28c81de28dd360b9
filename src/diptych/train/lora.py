"""The LoRA file of a training, and the model as that file gives it back.

Stock diffusers takes a trained input layer only as an adapter, so the file holds its change as one of rank 2C: A is the
identity, B the change of the weight, B's bias the change of the bias. That is exact; but two products in the place of
one round otherwise, so pictures drawn while training lasts are drawn in that form too (`as_loaded`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diptych.train.parts import ADAPTER, INPUT_LAYER, Trained
from diptych.utils.documents import parse_json


def save_lora(transformer: Any, trained: Trained, rank: int, folder: Path, metadata: dict[str, Any]) -> Path:
    """The control-LoRA of the current weights as `pytorch_lora_weights.safetensors`, with its adapter metadata.

    Stock `FluxControlPipeline.from_pretrained(teacher).load_lora_weights(folder)` widens the teacher itself and draws
    what the student draws. `metadata` goes into the file's header, as JSON under
    `diptych`.
    """
    from diffusers import FluxControlPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import save_file

    adapter = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    state: dict[str, Any] = {key: value.detach().float().cpu() for key, value in adapter.items() if ".lora_" in key}
    layers = sorted({key.partition(".lora_")[0] for key in state})
    # One file has biases on all adapters or on none (peft's `lora_bias` is one switch): the others' are zero.
    for layer in layers:
        state[f"{layer}.lora_B.bias"] = torch.zeros(state[f"{layer}.lora_B.weight"].shape[0])
    change = _change(transformer.get_submodule(INPUT_LAYER), trained)
    columns = change["weight"].shape[1]
    state[f"{INPUT_LAYER}.lora_A.weight"] = torch.eye(columns)
    state[f"{INPUT_LAYER}.lora_B.weight"] = change["weight"].cpu()
    state[f"{INPUT_LAYER}.lora_B.bias"] = change["bias"].cpu()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[*layers, INPUT_LAYER],
        rank_pattern={INPUT_LAYER: columns},
        alpha_pattern={INPUT_LAYER: columns},
        lora_bias=True,
    ).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    FluxControlPipeline.save_lora_weights(
        folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=config
    )
    path = folder / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), "diptych": json.dumps(metadata, sort_keys=True)}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    _sort_header(path)
    return path


def _sort_header(path: Path) -> None:
    """safetensors writes its metadata keys in a random order; sorted, the same weights are the same file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors after it start at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@contextmanager
def as_loaded(transformer: Any, trained: Trained) -> Iterator[None]:
    """The transformer with its adapters as `save_lora`'s file gives them to a pipeline, all in the base's precision.

    Where every weight is trained there is nothing to change.
    """
    if not trained.start:
        yield
        return
    layer = transformer.get_submodule(INPUT_LAYER)
    dtype = next(p.dtype for p in transformer.parameters() if not p.requires_grad and p.is_floating_point())
    learnt = [parameter.data for parameter in trained.parameters]
    transformer.set_submodule(INPUT_LAYER, _Beside(trained.start, _change(layer, trained), dtype))
    try:
        for parameter in trained.parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(trained.parameters, learnt, strict=True):
            parameter.data = data
        transformer.set_submodule(INPUT_LAYER, layer)


class _Beside(torch.nn.Module):
    """The input layer as it was, and its change as an adapter beside it."""

    def __init__(self, start: dict[str, torch.Tensor], change: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.start = {name: tensor.to(dtype) for name, tensor in start.items()}
        self.change = {name: tensor.to(dtype) for name, tensor in change.items()}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, **self.start) + F.linear(tokens, **self.change)


def _change(layer: torch.nn.Module, trained: Trained) -> dict[str, torch.Tensor]:
    """What training has added to the input layer's weight and bias, float32."""
    return {name: (p.detach() - trained.start[name]).float() for name, p in layer.named_parameters()}
