"""Keys and values of reference tokens, computed once: attention for `distill.reference_attention: self`.

Reference tokens that attend only to themselves do not change while an image is sampled. So they pass through the
transformer once (`capture`), at noise level 0 and without text, and each attention layer's keys and values are recorded
after the rotary embedding. In the main pass, text and target attend to all their tokens and to these.

    install(transformer)                                     # adds both to stock attention
    keys = capture(transformer, tokens, ids)                 # one pass over the reference tokens
    transformer(..., joint_attention_kwargs={"references": keys})
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, _get_qkv_projections

from diptych.student.families.base import Text
from diptych.student.families.flux1 import FLUX1

GUIDANCE = 1.0  # distilled guidance of the reference pass, independent of the main pass


class Keys:
    """Keys and values of the reference tokens in each attention layer. `rows` selects rows of the batch."""

    def __init__(self) -> None:
        self._of: dict[FluxAttention, tuple[torch.Tensor, torch.Tensor]] = {}
        self._index: torch.Tensor | None = None

    def record(self, layer: FluxAttention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Records key and value (B, R, heads, head size) of a layer. Later calls for a layer have no effect: a
        checkpointed block runs twice, and the main pass uses the first tensors."""
        self._of.setdefault(layer, (key, value))

    def of(self, layer: FluxAttention) -> tuple[torch.Tensor, ...]:
        """Key and value of a layer, for the selected rows."""
        if self._index is None:
            return self._of[layer]
        index = self._index
        return tuple(
            x.expand(len(index), -1, -1, -1) if len(x) == 1 else x[index.to(x.device)] for x in self._of[layer]
        )

    def rows(self, index: torch.Tensor) -> Keys:
        """The keys and values of the rows in `index` (B,), which may repeat rows."""
        selected = Keys()
        selected._of = self._of
        selected._index = index.cpu() if self._index is None else self._index[index.cpu()]
        return selected


class ReferenceAttnProcessor(FluxAttnProcessor):
    """diffusers' `FluxAttnProcessor` with two options: `captured` records keys and values, and `references` are further
    keys and values to attend to. Without options it is the stock processor."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        captured: Keys | None = None,
        references: Keys | None = None,
    ) -> Any:
        if captured is None and references is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)  # pyright: ignore
        projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)  # pyright: ignore[reportArgumentType]
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        texts = 0
        if encoder_hidden_states is not None:
            texts = encoder_hidden_states.shape[1]
            text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:])  # pyright: ignore
            text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
            query, key = torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        if captured is not None:
            captured.record(attn, key, value)  # pyright: ignore[reportArgumentType]
        if references is not None:
            key, value = (torch.cat(both, dim=1) for both in zip((key, value), references.of(attn), strict=True))  # pyright: ignore
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)  # pyright: ignore
        out = out.flatten(2, 3).to(query.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        if encoder_hidden_states is None:
            return out
        image_out = attn.to_out[1](attn.to_out[0](out[:, texts:].contiguous()))
        return image_out, attn.to_add_out(out[:, :texts].contiguous())


def install(transformer: torch.nn.Module) -> None:
    """Sets this processor in each attention layer, with the layer's attention back-end. It may be called again."""
    for module in transformer.modules():
        if isinstance(module, FluxAttention) and type(module.processor) is FluxAttnProcessor:
            stock, processor = module.processor, ReferenceAttnProcessor()
            processor._attention_backend, processor._parallel_config = stock._attention_backend, stock._parallel_config
            module.set_processor(processor)  # pyright: ignore[reportArgumentType]


def capture(transformer: Any, tokens: torch.Tensor, ids: torch.Tensor, attention: dict[str, Any] | None = None) -> Keys:
    """Keys and values of reference tokens (B, R, C) at positions `ids` (R, 3), from one pass at noise level 0, with no
    text tokens and zeros for the pooled text. `attention` is diffusers' joint_attention_kwargs.

    `transformer` may wrap the model (DDP). Gradients are computed.
    """
    keys, config = Keys(), getattr(transformer, "module", transformer).config
    rows = len(tokens)
    text = tokens.new_zeros(rows, 0, config.joint_attention_dim), tokens.new_zeros(rows, config.pooled_projection_dim)
    captured, scale = {**(attention or {}), "captured": keys}, GUIDANCE if config.guidance_embeds else None
    FLUX1.forward(transformer, tokens, ids, tokens.new_zeros(rows), Text(*text), scale, captured)
    return keys
