"""Z-Image (base): `ZImageTransformer2DModel`; Qwen 3 reads the prompt, and texts keep their lengths.

The transformer counts time from noise to image and gives clean − noise. It takes each row's latents as a short video,
whose frames have separate positions: a reference is a further frame, of the target's size. Its class fixes as many
channels out as in, so its input cannot be widened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from diptych.errors import UsageError
from diptych.student.families.base import Family, Reference, Size, Text, pack, unpack

ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


class ZImage(Family):
    """All tokens share one time, so a clean reference is modulated as the noisy target is."""

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    editor = None
    transformer = "ZImageTransformer2DModel"
    input_layer = "all_x_embedder.2-1"
    blocks = ("noise_refiner", "context_refiner", "layers")
    conditionings = ("tokens",)
    texts = ("embeds", "mask")
    lora_targets: ClassVar = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

    def embed(self, pipe: Any, prompts: Sequence[str], length: int) -> Text:
        # The stock function writes its chat template into the list that it is given.
        rows, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
        mask = torch.nn.utils.rnn.pad_sequence([row.new_ones(len(row)) for row in rows], batch_first=True).bool()
        return Text(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask=mask)

    def shift(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float | None:
        return super().shift({**scheduler, "use_dynamic_shifting": True}, tokens, steps)

    def channels(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 4 * config["in_channels"], 4 * config["in_channels"]

    def widened(self, config: Mapping[str, Any]) -> None:
        """None: the class gives as many channels as it takes."""

    def velocity(
        self,
        transformer: Any,
        x: torch.Tensor,
        sigma: torch.Tensor,
        text: Text,
        size: Size,
        *,
        references: Sequence[Reference] = (),
        condition: torch.Tensor | None = None,
        guidance: float | None = None,
        attention: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        if condition is not None:
            raise UsageError("method_unsuited", "Z-Image's input cannot be widened; use conditioning tokens")
        if other := next((r.size for r in references if r.size != size), None):
            raise UsageError(
                "size_invalid",
                f"Z-Image takes references of the image's size, {tuple(size)} tokens, not {tuple(other)}",
            )
        frames = torch.stack(
            [unpack(x, size), *(unpack(r.tokens, size) for r in references if r.tokens is not None)], dim=2
        )
        lengths = [len(row) for row in text.embeds] if text.mask is None else text.mask.sum(1).tolist()
        (v,) = transformer(
            list(frames),
            1 - sigma,
            [row[:length] for row, length in zip(text.embeds, lengths, strict=True)],
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        return -pack(torch.stack([frame[:, 0] for frame in v]))
