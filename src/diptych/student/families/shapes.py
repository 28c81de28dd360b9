"""The tensors of a model, from its config alone.

FLUX.1's parts follow rules (`RULES`), so that a plan needs neither torch nor diffusers. Any other model is built on the
meta device.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diptych.utils import models
from diptych.utils.documents import parse_json

Shape = tuple[int, ...]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Tensors:
    """A model's parameters: `shapes` by name, shared ones once, and the names of its linear layers."""

    shapes: Mapping[str, Shape]
    linears: frozenset[str]

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(map(math.prod, self.shapes.values()))

    def of(self, layer: str) -> dict[str, Shape]:
        """The parameters of a layer: `weight` and, if it has one, `bias`."""
        names = ("weight", "bias")
        return {name: self.shapes[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in self.shapes}


def tensors(library: str, name: str, config: Config) -> Tensors:
    """The tensors of a model class of `diffusers` or `transformers` with this config."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return _tensors(library, name, json.dumps(plain, sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _tensors(library: str, name: str, config: str) -> Tensors:
    values = parse_json(config)
    models.check(values, f"the config of a {name}")
    if name in RULES:
        shapes = RULES[name](values)
        # All matrices except these are weights of linear layers.
        tables = ("embedding", "shared", "relative_attention_bias")
        matrices = (key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2)
        return Tensors(shapes, frozenset(layer for layer in matrices if not layer.endswith(tables)))
    import torch

    model = meta(library, name, values)
    linears = frozenset(layer for layer, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return Tensors({key: tuple(parameter.shape) for key, parameter in model.named_parameters()}, linears)


def meta(library: str, name: str, config: Config) -> Any:
    """A model on the meta device, without weights."""
    import torch

    cls: Any = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        return cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))


def _linear(name: str, into: int, out: int, bias: bool = True) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int, bias: bool = True) -> dict[str, Shape]:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def flux(config: Config) -> dict[str, Shape]:
    """The tensors of `FluxTransformer2DModel`."""
    head, channels = config.get("attention_head_dim", 128), config.get("in_channels", 64)
    width = config.get("num_attention_heads", 24) * head
    patch = config.get("patch_size", 1) ** 2
    shapes: dict[str, Shape] = {}
    embedders = [("timestep_embedder", 256), ("text_embedder", config.get("pooled_projection_dim", 768))]
    if config.get("guidance_embeds", False):
        embedders.insert(1, ("guidance_embedder", 256))
    for name, into in embedders:
        shapes |= _linear(f"time_text_embed.{name}.linear_1", into, width)
        shapes |= _linear(f"time_text_embed.{name}.linear_2", width, width)
    shapes |= _linear("context_embedder", config.get("joint_attention_dim", 4096), width)
    shapes |= _linear("x_embedder", channels, width)
    for number in range(config.get("num_layers", 19)):
        block = f"transformer_blocks.{number}"
        for norm in ("norm1", "norm1_context"):
            shapes |= _linear(f"{block}.{norm}.linear", width, 6 * width)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes |= _norm(f"{block}.attn.{norm}", head, bias=False)
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes |= _linear(f"{block}.attn.{name}", width, width)
        for name in ("ff", "ff_context"):
            shapes |= _linear(f"{block}.{name}.net.0.proj", width, 4 * width)
            shapes |= _linear(f"{block}.{name}.net.2", 4 * width, width)
    for number in range(config.get("num_single_layers", 38)):
        block = f"single_transformer_blocks.{number}"
        shapes |= _linear(f"{block}.norm.linear", width, 3 * width)
        shapes |= _linear(f"{block}.proj_mlp", width, 4 * width)
        shapes |= _linear(f"{block}.proj_out", 5 * width, width)
        for norm in ("norm_q", "norm_k"):
            shapes |= _norm(f"{block}.attn.{norm}", head, bias=False)
        for name in ("to_q", "to_k", "to_v"):
            shapes |= _linear(f"{block}.attn.{name}", width, width)
    shapes |= _linear("norm_out.linear", width, 2 * width)
    return shapes | _linear("proj_out", width, patch * (config.get("out_channels") or channels))


def clip_text(config: Config) -> dict[str, Shape]:
    """The tensors of `CLIPTextModel`."""
    width, wide = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    shapes: dict[str, Shape] = {
        "embeddings.token_embedding.weight": (config.get("vocab_size", 49408), width),
        "embeddings.position_embedding.weight": (config.get("max_position_embeddings", 77), width),
    }
    for number in range(config.get("num_hidden_layers", 12)):
        layer = f"encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, wide) | _linear(f"{layer}.mlp.fc2", wide, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    return shapes | _norm("final_layer_norm", width)


def t5_encoder(config: Config) -> dict[str, Shape]:
    """The tensors of `T5EncoderModel`."""
    width, heads = config.get("d_model", 512), config.get("num_heads", 8)
    inner, wide = heads * config.get("d_kv", 64), config.get("d_ff", 2048)
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    shapes: dict[str, Shape] = {"shared.weight": (config.get("vocab_size", 32128), width)}
    buckets = config.get("relative_attention_num_buckets", 32)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
    for number in range(config.get("num_layers", 6)):
        block = f"encoder.block.{number}.layer"
        for name in ("q", "k", "v"):
            shapes |= _linear(f"{block}.0.SelfAttention.{name}", width, inner, bias=False)
        shapes |= _linear(f"{block}.0.SelfAttention.o", inner, width, bias=False)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            shapes |= _linear(f"{block}.1.DenseReluDense.{name}", width, wide, bias=False)
        shapes |= _linear(f"{block}.1.DenseReluDense.wo", wide, width, bias=False)
        for layer in (0, 1):
            shapes |= _norm(f"{block}.{layer}.layer_norm", width, bias=False)
    return shapes | _norm("encoder.final_layer_norm", width, bias=False)


def autoencoder(config: Config) -> dict[str, Shape]:
    """The tensors of `AutoencoderKL`."""
    widths, latent = list(config.get("block_out_channels", (64,))), config.get("latent_channels", 4)
    resnets = config.get("layers_per_block", 1)
    shapes: dict[str, Shape] = {}

    def conv(name: str, into: int, out: int, size: int = 3) -> None:
        shapes.update({f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)})

    def resnet(name: str, into: int, out: int) -> None:
        shapes.update(_norm(f"{name}.norm1", into) | _norm(f"{name}.norm2", out))
        conv(f"{name}.conv1", into, out)
        conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.conv_shortcut", into, out, 1)

    def middle(name: str, width: int) -> None:
        for number in (0, 1):
            resnet(f"{name}.mid_block.resnets.{number}", width, width)
        if config.get("mid_block_add_attention", True):
            attention = f"{name}.mid_block.attentions.0"
            shapes.update(_norm(f"{attention}.group_norm", width))
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes.update(_linear(f"{attention}.{layer}", width, width))

    def ends(name: str, width: int, out: int) -> None:
        shapes.update(_norm(f"{name}.conv_norm_out", width))
        conv(f"{name}.conv_out", width, out)

    conv("encoder.conv_in", config.get("in_channels", 3), widths[0])
    before = widths[0]
    for block, width in enumerate(widths):
        for number in range(resnets):
            resnet(f"encoder.down_blocks.{block}.resnets.{number}", before, width)
            before = width
        if block < len(widths) - 1:
            conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", width, width)
    middle("encoder", before)
    ends("encoder", before, 2 * latent)
    conv("decoder.conv_in", latent, before)
    middle("decoder", before)
    for block, width in enumerate(reversed(widths)):
        for number in range(resnets + 1):
            resnet(f"decoder.up_blocks.{block}.resnets.{number}", before, width)
            before = width
        if block < len(widths) - 1:
            conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", width, width)
    ends("decoder", before, config.get("out_channels", 3))
    if config.get("use_quant_conv", True):
        conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        conv("post_quant_conv", latent, latent, 1)
    return shapes


RULES: Mapping[str, Callable[[Config], dict[str, Shape]]] = {
    "FluxTransformer2DModel": flux,
    "CLIPTextModel": clip_text,
    "T5EncoderModel": t5_encoder,
    "AutoencoderKL": autoencoder,
}
