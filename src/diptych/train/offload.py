"""Frozen blocks that wait in main memory and visit the device one at a time: LoRA training of FLUX.1 on a 16 GB card.

A block's frozen matrices come before its forward pass and go after it. With gradient checkpointing, which the recipe
must ask for, nothing of that pass is kept; the backward pass runs the block's forward once more, and what it keeps of
the weights for the gradients is freed with them. So the device holds one block's matrices at a time, each is copied
twice a step, and every number is the one computed without. What learns, and every vector, stays on the device.

diffusers' group offload and accelerate's hooks swap out what learns as well, so gradients would land on another device
than their parameters.
"""

from __future__ import annotations

from typing import Any

import torch


class Offload:
    """The hooks on a transformer's blocks; `remove` takes them off and leaves the matrices where they wait."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        """`transformer` is on the CPU and knows what it trains: the rest of it goes to `device` here."""
        self.device = device
        self.present: set[torch.nn.Parameter] = set()  # matrices that are on a visit
        self._waiting: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list[Any] = []
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            matrices = [p for p in block.parameters() if not p.requires_grad and p.ndim > 1]
            for matrix in matrices:
                self._waiting[matrix] = matrix.data.pin_memory() if device.type == "cuda" else matrix.data
                matrix.data = self._waiting[matrix]
            self._handles += [
                block.register_forward_pre_hook(lambda *_, own=matrices: self._bring(own)),
                # Checkpointing ends a second forward pass with an exception once it has what it needs.
                block.register_forward_hook(lambda *_, own=matrices: self._take(own), always_call=True),
            ]
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            if tensor not in self._waiting:
                tensor.data = tensor.data.to(device)

    def _bring(self, matrices: list[torch.nn.Parameter]) -> None:
        for matrix in matrices:
            # A copy, also where both are the CPU: what the backward pass keeps is then never what waits.
            matrix.data = self._waiting[matrix].to(self.device, non_blocking=True, copy=True)
            self.present.add(matrix)

    def _take(self, matrices: list[torch.nn.Parameter]) -> None:
        for matrix in matrices:
            matrix.data = self._waiting[matrix]
            self.present.discard(matrix)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
